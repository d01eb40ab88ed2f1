"""The contract of every format of standalone drafts: exact round trips, complete or refused, one clear line."""

from __future__ import annotations

import copy
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from redraft.drafts.base import is_private
from redraft.drafts.eagle1.module import fresh_eagle1
from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.groups import attach_private
from redraft.drafts.standalone import StandaloneDraft
from redraft.drafts.standalone.shapes import fresh_standalone, shape_for
from redraft.errors import UserError
from redraft.registries import EXPORTERS, FAMILIES
from redraft.target import Target

pytest.importorskip("gguf")

FORMATS = sorted(FAMILIES.get("standalone").writers)
ROWS = 300
IDS = torch.arange(4, 24)[None]
LLAMA3 = runpy.run_path(str(Path(__file__).parents[1] / "tiny_drafts.py"))["LLAMA3"]
SHAPES: dict[str, dict[str, Any]] = {
    "own head": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16, "num_key_value_heads": 1},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
}


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, two special tokens and two merges, as most public tokenizers are made.

    Not one merge: transformers 5.16 reads a list of one member from a GGUF file as the member itself.
    """
    words = ["<s>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "an"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("t", "h"), ("a", "n")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words[:2]])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", chat_template="{{ messages }}"
    )


@pytest.fixture
def make_target(tiny_target):
    def make(**config: Any) -> Target:
        model = tiny_target("llama", num_hidden_layers=2, vocab_size=ROWS, **config).model
        return Target(model, byte_level_tokenizer(), name="tuned/target")

    return make


def export(name: str, draft: StandaloneDraft, folder: Path, target: Target, **options: Any) -> Any:
    return EXPORTERS.get(name)(draft, folder, target, **options)


def read_back(name: str, folder: Path, dtype: torch.dtype) -> Any:
    """The file as transformers reads it, which is none of our code."""
    if name == "hf":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert name == "gguf", f"say here how a {name} export is read back"
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=dtype)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_another_reader_finds_the_same_model(name, shape, make_target, tmp_path):
    target = make_target(**SHAPES[shape])
    draft = fresh_standalone(target, layers=[1])
    report = export(name, draft, tmp_path / "out", target, speculative_tokens=4)
    back = read_back(name, tmp_path / "out", torch.float32)
    if name == "gguf":  # transformers reads no rotary type out of a GGUF file
        back.model.rotary_emb.inv_freq = draft.model.model.rotary_emb.inv_freq
    with torch.no_grad():
        assert torch.equal(back(IDS).logits, draft(IDS))
    assert report.format == name and report.folder == tmp_path / "out" and "4" in report.serve
    assert report.parameters == sum(p.numel() for p in draft.parameters())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_the_data_type_is_kept(name, dtype, make_target, tmp_path):
    target = make_target()
    draft = fresh_standalone(target, layers=[0]).to(dtype)
    report = export(name, draft, tmp_path / "out", target)
    back = read_back(name, tmp_path / "out", torch.float32)
    with torch.no_grad():
        assert torch.equal(back(IDS).logits, copy.deepcopy(draft).float()(IDS))
    assert report.bytes < 3 * report.parameters


@pytest.mark.parametrize("name", FORMATS)
def test_private_experts_are_merged(name, make_target, tmp_path):
    target = make_target()
    split = attach_private(fresh_standalone(target, layers=[0, 1]), 32, seed=3)
    with torch.no_grad():
        for key, parameter in split.named_parameters():
            if is_private(key):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    report = export(name, split, tmp_path / "out", target)
    assert report.merged_private and any("merged" in line for line in report.warnings)
    with torch.no_grad():
        assert torch.allclose(read_back(name, tmp_path / "out", torch.float32)(IDS).logits, split(IDS), atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_a_second_export_gives_the_same_files(name, make_target, tmp_path):
    target = make_target()
    for folder in ("one", "two"):
        export(name, fresh_standalone(target, layers=[0]), tmp_path / folder, target)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("name", FORMATS)
class TestRefusedExports:
    def refused(self, name, draft, target, tmp_path, message):
        with pytest.raises(UserError, match=message) as caught:
            export(name, draft, tmp_path / "out", target)
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda d: setattr(d, "tokenizer", None), "no tokenizer"),
            (lambda d: d.tokenizer.add_tokens(["extra"]), "another tokenizer"),
            (lambda d: setattr(d.model.config, "max_position_embeddings", 64), "covers 64"),
            (lambda d: d.model.lm_head.weight.data[3].fill_(float("nan")), "NaN"),
            (lambda d: d.model.model.norm.weight.data[0].fill_(float("inf")), "NaN or infinity"),
            (lambda d: d.double(), "float64"),
        ],
        ids=["no tokenizer", "other tokenizer", "short", "nan", "infinite norm", "float64"],
    )
    def test_unsound_drafts(self, name, spoil, message, make_target, tmp_path):
        target = make_target()
        draft = fresh_standalone(target, layers=[0])
        draft.tokenizer = copy.deepcopy(draft.tokenizer)
        spoil(draft)
        self.refused(name, draft, target, tmp_path, message)

    def test_a_padded_table(self, name, make_target, tmp_path):
        target = make_target()
        shape = shape_for(target, "1/2")
        shape.vocab_size = ROWS + 4
        draft = StandaloneDraft(AutoModelForCausalLM.from_config(shape), target.tokenizer)
        self.refused(name, draft, target, tmp_path, f"{ROWS + 4} rows")

    def test_drafts_that_read_the_targets_states(self, name, make_target, tmp_path):
        target = make_target()
        draft = fresh_draft(target, range(50)) if name == "hf" else fresh_eagle1(target)
        self.refused(name, draft, target, tmp_path, "export it for vllm")

    def test_a_draft_length_below_one(self, name, make_target, tmp_path):
        target = make_target()
        with pytest.raises(UserError, match="1 or more"):
            export(name, fresh_standalone(target, layers=[0]), tmp_path / "out", target, speculative_tokens=0)

    def test_other_work_in_the_folder_and_a_full_disk(self, name, make_target, tmp_path, full_disk):
        target = make_target()
        draft = fresh_standalone(target, layers=[0])
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "results.csv").write_text("1,2")
        with pytest.raises(UserError, match="holds other files"):
            export(name, draft, tmp_path / "out", target)
        shutil.rmtree(tmp_path / "out")
        full_disk()
        self.refused(name, draft, target, tmp_path, "no room on the disk")
