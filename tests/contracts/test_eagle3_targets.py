"""What a draft has to do with its target: whose embedding, whose tokens, which windows, which adapter, and what of it a
reader says."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft.drafts.eagle3.reading import Eagle3Reader
from redraft.drafts.formats.matrix import tokenizer
from redraft.drafts.opening import open_checkpoint
from redraft.errors import UserError
from redraft.loading import read_facts
from redraft.registries import EXPORTERS

SHARED = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("export_families.py"))))
make, facts, rewrite, TARGET = SHARED.EAGLE3.make, SHARED.facts, SHARED.rewrite, SHARED.TARGET
CASES = Path(__file__).parents[1] / "artifacts" / "trainers"


@pytest.fixture
def theirs(tmp_path):
    EXPORTERS.get("plain")(make(), tmp_path / "theirs", TARGET)
    return tmp_path / "theirs"


def case(tmp_path, name):
    shutil.copytree(CASES / name / "checkpoint", tmp_path / "draft")
    return tmp_path / "draft", read_facts(str(CASES / "target"), tokenizer=False)


# -- embeddings --------------------------------------------------------------------------------------------------------
@pytest.fixture
def adapter(tmp_path):
    """An adapter in a folder, its base model beside it, and that one's table."""
    table = torch.randn(40, 16)
    for name, text in {
        "base/config.json": "{}",
        "lora/adapter_config.json": '{"base_model_name_or_path": "../base"}',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    save_file({"model.embed_tokens.weight": table}, tmp_path / "base" / "model.safetensors")
    changed(tmp_path / "lora", "layers.0.self_attn.q_proj.lora_A.weight")
    return tmp_path / "lora", table


def changed(folder, name):
    save_file({f"base_model.model.model.{name}": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("joint", [False, True])
def test_an_adapter_that_spares_the_embedding_has_that_of_its_base(adapter, tmp_path, joint):
    folder, table = adapter
    target = facts(name=f"{tmp_path / 'base'} + {folder}" if joint else str(folder))
    report = EXPORTERS.get("vllm")(make(), tmp_path / "out", target)
    assert report.warnings == ()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["embed_tokens.weight"], table)


@pytest.mark.parametrize("name", ["embed_tokens.lora_embedding_A", "lm_head.weight"])
def test_an_adapter_that_may_change_the_embedding_is_noted(adapter, tmp_path, name):
    folder, _ = adapter
    changed(folder, name)
    report = EXPORTERS.get("vllm")(make(), tmp_path / "out", facts(name=str(folder)))
    assert "its adapter may change them" in report.warnings[0] and "merge-target" in report.warnings[0]
    assert "embed_tokens.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_rounded_copy_of_the_targets_table_is_noted_when_it_is_swapped(tmp_path):
    draft, lender = make(torch.bfloat16, own_embedding=True), facts()
    EXPORTERS.get("plain")(draft, tmp_path / "out", TARGET)
    lender.embedding = torch.nn.Embedding(40, 16)
    with torch.no_grad():
        lender.embedding.weight.copy_(draft.embed_tokens.weight)
    assert open_checkpoint(tmp_path / "out", lender).meta["notes"] == []
    with torch.no_grad():
        lender.embedding.weight.mul_(1 + 2**-12)
    opened = open_checkpoint(tmp_path / "out", lender)
    assert len(opened.meta["notes"]) == 1 and "(bfloat16) is the target's but for rounding" in opened.meta["notes"][0]
    assert any(e.what == "embedding" and e.word.endswith("but for rounding") for e in opened.reading.entries)
    assert opened.draft.borrowing(lender).embed_tokens is None


# -- tokenizers --------------------------------------------------------------------------------------------------------
def renamed(folder, change):
    """The tokenizer beside a draft, with the entries of its vocabulary changed."""
    found = json.loads(tokenizer().backend_tokenizer.to_str())
    found["model"]["merges"] = []
    change(found["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(found))


def swap(words):
    words["a"], words["b"] = words["b"], words["a"]


def others(words):
    for token in [token for token in words if len(token) == 1]:
        words[f"{token}?"] = words.pop(token)


def test_the_tokenizer_beside_a_draft_is_compared_token_by_token(theirs):
    target = facts()
    renamed(theirs, lambda words: None)
    assert "not compared" in open_checkpoint(theirs, target).meta["notes"][0]
    target.tokenizer = tokenizer()
    assert open_checkpoint(theirs, target).meta["notes"] == []
    renamed(theirs, lambda words: words.update({"tool": words.pop("z")}))
    notes = open_checkpoint(theirs, target).meta["notes"]
    assert len(notes) == 1 and "at 1 of 260 ids" in notes[0] and "'tool', which the target calls 'z'" in notes[0]
    for change, message in ((swap, "'b' is .* in it"), (others, "256 of 260 ids are other tokens")):
        renamed(theirs, change)
        with pytest.raises(UserError, match=f"another tokenizer than the target's: {message}") as caught:
            open_checkpoint(theirs, target)
        assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer_beside_a_draft_is_one_line(theirs):
    target = facts()
    target.tokenizer = tokenizer()
    (theirs / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be loaded"):
        open_checkpoint(theirs, target)


def test_import_reads_the_targets_tokenizer(theirs, tmp_path, redraft):
    TARGET.config.save_pretrained(tmp_path / "target")
    renamed(theirs, swap)
    words = f"import {theirs} --target {tmp_path / 'target'} --out {tmp_path / 'ours'}"
    code, out, _ = redraft(words)
    assert code == 0 and "was not compared" in " ".join(out.split())
    shutil.rmtree(tmp_path / "ours")
    tokenizer().save_pretrained(tmp_path / "target")
    code, _, error = redraft(words)
    assert code == 2 and "another tokenizer" in error and error.count("\n") == 1 and not (tmp_path / "ours").exists()


# -- windows -----------------------------------------------------------------------------------------------------------
def windowed(kinds=None, window=8):
    target = facts()
    target.config = copy.copy(target.config)
    target.config.sliding_window, target.config.layer_types = window, kinds
    return target


@pytest.mark.parametrize("format", ["vllm", "plain"])
@pytest.mark.parametrize("kinds", [None, ["sliding_attention"] * 8])
def test_the_window_that_vllm_lends_the_draft_is_noted(tmp_path, format, kinds):
    report = EXPORTERS.get(format)(make(), tmp_path / "out", windowed(kinds))
    assert (
        sum("vLLM gives layers that see all positions the target's own window of 8" in w for w in report.warnings) == 1
    )


@pytest.mark.parametrize(
    ("target", "options"),
    [
        (windowed(["sliding_attention", "full_attention"] * 4), {}),
        (windowed(window=64), {}),
        (windowed(), {"windows": (8,)}),
        (windowed(), {"num_layers": 2, "windows": (8, 8)}),
    ],
)
def test_no_window_is_lent_otherwise(tmp_path, target, options):
    assert not any("window" in w for w in EXPORTERS.get("vllm")(make(**options), tmp_path / "out", target).warnings)


def test_the_refusal_of_windows_names_sglangs_flag(tmp_path):
    with pytest.raises(UserError, match=r"windows \[16\] is taken as \[0\] \(.*--speculative-draft-window-size"):
        EXPORTERS.get("sglang")(make(windows=(16,)), tmp_path / "out", TARGET)


# -- what a trainer adds, and what is not used -------------------------------------------------------------------------
def test_angles_that_modelopt_puts_in_at_export_are_told(tmp_path):
    folder, target = case(tmp_path, "modelopt-0.47.0-reduced")
    opened = open_checkpoint(folder, target)
    assert sum("put in the yarn angles" in note for note in opened.meta["notes"]) == 1
    assert any(e.what == "rope_parameters" and "puts in at export" in e.word for e in opened.reading.entries)
    # Those of a training name their base inside.
    scaling = json.loads((folder / "config.json").read_text())["rope_scaling"]
    rewrite(folder, rope_scaling=scaling | {"rope_theta": 10000.0})
    assert not any("put in" in note for note in open_checkpoint(folder, target).meta["notes"])


def test_an_adapter_beside_a_draft_is_the_targets(tmp_path):
    folder, target = case(tmp_path, "modelopt-0.47.0-reduced")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    opened = open_checkpoint(folder, target)
    entry = next(e for e in opened.reading.entries if e.what == "adapter_config.json")
    assert entry.how == "dropped" and "r 2" in entry.value and "q_proj" in entry.value
    assert any("reads the states of the target with it" in note for note in opened.meta["notes"])


def test_a_key_that_is_read_elsewhere_has_its_row_where_it_is_not(tmp_path):
    folder, target = case(tmp_path, "speculators-0.9.0-layers-3-windows")
    config = json.loads((folder / "config.json").read_text())
    config["transformer_layer_config"] |= {"norm_output": True}
    rewrite(
        folder, transformer_layer_config=config["transformer_layer_config"], hidden_act="gelu", eagle_config={"x": 1}
    )
    dropped = {e.what for e in open_checkpoint(folder, target).reading.entries if e.how == "dropped"}
    assert {"transformer_layer_config.norm_output", "hidden_act", "eagle_config.x"} <= dropped


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), AttributeError("x"), ValueError("x")])
def test_a_defect_of_ours_is_not_called_a_fault_of_the_file(theirs, monkeypatch, error):
    def broken(self):
        raise error

    monkeypatch.setattr(Eagle3Reader, "config", broken)
    with pytest.raises(type(error)):
        open_checkpoint(theirs, TARGET)
