"""GGUF files: the target's tokenizer copied or written, rotary angles, what is refused, and what transformers reads."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

gguf = pytest.importorskip("gguf")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config  # noqa: E402

import redraft  # noqa: E402
from redraft.drafts.eagle3 import fresh_draft  # noqa: E402
from redraft.drafts.files import save_draft  # noqa: E402
from redraft.drafts.formats.gguf import (  # noqa: E402
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    SPLITS,
    STRING,
    UINT32,
    UNUSED,
    interleave,
    reads_back,
    rope_factors,
    split_name,
    token_fields,
    write_file,
)
from redraft.drafts.standalone import StandaloneDraft  # noqa: E402
from redraft.drafts.standalone.gguf import check_shape  # noqa: E402
from redraft.drafts.standalone.shapes import fresh_standalone  # noqa: E402
from redraft.errors import UserError  # noqa: E402
from redraft.loading import gguf_of  # noqa: E402
from redraft.registries import EXPORTERS  # noqa: E402
from redraft.target import Target  # noqa: E402

CONTRACT = Path(__file__).resolve().parents[1] / "contracts" / "test_standalone_exports.py"
CONTRACT_TESTS = SimpleNamespace(**runpy.run_path(str(CONTRACT)))
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
WORDS = BYTES | {"use_regex": False}


@pytest.fixture
def target(tiny_target):
    model = tiny_target("llama", num_hidden_layers=2, vocab_size=300).model
    return Target(model, CONTRACT_TESTS.byte_level_tokenizer(), name="tuned/target")


def export(target, folder):
    return EXPORTERS.get("gguf")(fresh_standalone(target, layers=[0]), folder, target, speculative_tokens=3)


def test_the_command_reads_the_targets_tokenizer_where_the_file_holds_one(tiny_target, tmp_path):
    model = tiny_target("llama", num_hidden_layers=8, vocab_size=300).model
    target = Target(model, CONTRACT_TESTS.byte_level_tokenizer(), name="tuned/target")
    target.save(tmp_path / "target")
    save_draft(tmp_path / "draft", fresh_draft(target, list(range(40)), seed=0, intermediate=32), {})
    report = redraft.export(tmp_path / "draft", str(tmp_path / "target"), "gguf", tmp_path / "out")
    tokens = gguf.GGUFReader(report.folder / "model.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert tokens[:8] == target.tokenizer.convert_ids_to_tokens(list(range(8)))


# -- reading back ------------------------------------------------------------------------------------------------------
FIELDS = {
    "general.name": ("draft", STRING, 0),
    "a.count": (3, UINT32, 0),
    "a.base": (1e-6, FLOAT32, 0),
    "a.flag": (True, BOOL, 0),
    "a.places": ([2, -1, 5], ARRAY, INT32),
    "a.words": (["th", "an", "\u0120a"], ARRAY, STRING),
}
TENSORS = {"a.weight": torch.arange(15.0).view(5, 3).bfloat16(), "a.norm": torch.ones(7), "map": torch.arange(4)}


def test_a_file_reads_back_as_what_was_written_and_as_nothing_else(tmp_path):
    path = tmp_path / "model.gguf"
    write_file(path, "eagle3", FIELDS, TENSORS)
    whole = {"general.architecture": ("eagle3", STRING, 0)} | FIELDS
    assert reads_back(path, whole, TENSORS)
    others = {
        "general.name": ("drafs", STRING, 0),
        "a.count": (3, INT32, 0),
        "a.base": (2e-6, FLOAT32, 0),
        "a.flag": (False, BOOL, 0),
        "a.places": ([2, -1, 6], ARRAY, INT32),
        "a.words": (["th", "an"], ARRAY, STRING),
    }
    for name, other in others.items():
        assert not reads_back(path, whole | {name: other}, TENSORS), name
    assert not reads_back(path, FIELDS, TENSORS) and not reads_back(path, whole | {"b": FIELDS["a.flag"]}, TENSORS)
    for name, tensor in TENSORS.items():
        moved = tensor.clone()
        moved.view(-1)[-1] += 1
        assert not reads_back(path, whole, TENSORS | {name: moved}), name
        assert not reads_back(path, whole, {k: v for k, v in TENSORS.items() if k != name})
    assert not reads_back(path, whole, TENSORS | {"a.weight": TENSORS["a.weight"].view(3, 5)})


# -- tokenizers --------------------------------------------------------------------------------------------------------
def test_a_written_tokenizer_is_read_back_as_the_same(target, tmp_path):
    export(target, tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    told = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    words = sorted(target.tokenizer.get_vocab().items(), key=lambda item: item[1])
    assert told["tokenizer.ggml.tokens"][: len(words)] == [word for word, _ in words]
    assert len(told["tokenizer.ggml.tokens"]) == 300 and told["tokenizer.ggml.tokens"][-1] == "[PAD299]"
    assert told["tokenizer.ggml.token_type"][:3] == [3, 3, 1] and told["tokenizer.ggml.token_type"][-1] == UNUSED
    assert told["tokenizer.ggml.merges"] == ["t h", "a n"] and told["tokenizer.ggml.pre"] == "gpt-2"
    assert (told["tokenizer.ggml.bos_token_id"], told["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert told["tokenizer.ggml.add_bos_token"] is False and told["tokenizer.chat_template"] == "{{ messages }}"
    back = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    for text in ("the 12 pears, thrice", "naïve ☂"):
        assert back(text)["input_ids"] == target.tokenizer(text)["input_ids"]


def test_the_targets_own_file_gives_the_tokenizer(target, tmp_path):
    export(target, tmp_path / "target")
    target.name = str(tmp_path / "target")
    file = gguf_of(target.name)
    assert file == tmp_path / "target" / "model.gguf" and gguf_of("") is None and gguf_of(str(tmp_path)) is None
    report = export(target, tmp_path / "draft")
    assert "copied from model.gguf" in report.warnings[-1] and str(file) in report.serve
    assert "--spec-draft-n-max 3" in report.serve and "draft-simple" in report.serve
    mine, other = (gguf.GGUFReader(tmp_path / name / "model.gguf").fields for name in ("draft", "target"))
    names = {name for name in other if name.startswith("tokenizer.")}
    assert names and all(mine[name].contents() == other[name].contents() for name in names)


def test_a_file_of_another_vocabulary_is_refused(target, tmp_path):
    export(target, tmp_path / "target")
    file = gguf_of(str(tmp_path / "target"))
    with pytest.raises(UserError, match="it has 300 tokens, the draft's table has 280 rows"):
        token_fields(target.tokenizer, 280, file)
    other = copy.deepcopy(target.tokenizer)
    other.add_tokens(["extra"])
    with pytest.raises(UserError, match="token 260 is '\\[PAD260\\]'.*says 'extra'"):
        token_fields(other, 300, file)


@pytest.mark.parametrize("text", [b"", b"GGUF", b"no such thing at all, and long enough"])
def test_a_file_that_is_no_gguf_is_refused(text, target, tmp_path):
    (tmp_path / "target.gguf").write_bytes(text)
    with pytest.raises(UserError, match="no GGUF file that can be read"):
        token_fields(target.tokenizer, 300, gguf_of(str(tmp_path)))


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (BYTES, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}, "smollm"),
        *(
            ({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": regex}}, WORDS]}, name)
            for regex, name in SPLITS.items()
        ),
    ],
)
def test_ways_of_splitting_text_have_llamacpps_names(pre, name):
    assert split_name({"model": {"type": "BPE"}, "pre_tokenizer": pre, "normalizer": None}) == name
    assert sorted(SPLITS.values()) == ["llama-bpe", "qwen2"]


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "Unigram"}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": WORDS},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTES],
            }
        },
    ],
    ids=lambda change: json.dumps(change)[:40],
)
def test_a_tokenizer_without_a_name_is_refused(change):
    spec = {"model": {"type": "BPE"}, "pre_tokenizer": BYTES, "normalizer": None} | change
    with pytest.raises(UserError, match="cannot be written into a GGUF file.*own GGUF"):
        split_name(spec)


def test_a_tokenizer_that_merges_nothing_is_refused(tiny_target, tmp_path):
    bytes_alone = Tokenizer(models.BPE({word: i for i, word in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    target = tiny_target("llama", num_hidden_layers=1, vocab_size=256)
    target.tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone)
    with pytest.raises(UserError, match="cannot be written into a GGUF file.*merges nothing"):
        export(target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_of_whole_characters_is_refused(tiny_target, tmp_path):
    target = tiny_target("llama", num_hidden_layers=1)
    with pytest.raises(UserError, match="no byte-level BPE"):
        export(target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- shapes and angles -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LlamaConfig(attention_bias=True), "attention_bias True"),
        (LlamaConfig(mlp_bias=True), "mlp_bias True"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act 'gelu'"),
        (LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "rope_type 'yarn'"),
        (Qwen3Config(), "model_type 'qwen3'"),
    ],
)
def test_what_a_plain_llama_does_not_compute_is_refused(config, words):
    with pytest.raises(UserError, match=words):
        check_shape(config)


def test_rows_of_a_head_are_paired():
    """By hand: two heads of four rows; row i of the first half stands beside row i of the second."""
    rows = torch.arange(8.0)[:, None].repeat(1, 3)
    assert interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    wide = torch.arange(12.0)[:, None]
    assert interleave(wide, 2, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]  # two of six do not turn


def test_rotary_factors_are_those_of_the_formula(tiny_target):
    """llama3 (Meta): long waves are divided by the factor, short ones kept, those between mixed."""
    rope = CONTRACT_TESTS.LLAMA3
    model = tiny_target("llama", num_hidden_layers=1, head_dim=16, rope_parameters=rope).model
    found = rope_factors(rope, model.model.rotary_emb.inv_freq)
    for i, factor in enumerate(found.tolist()):
        wave = 2 * torch.pi * rope["rope_theta"] ** (2 * i / 16)
        share = (rope["original_max_position_embeddings"] / wave - 1) / 3
        mixed = min(max(share, 0.0), 1.0)
        assert factor == pytest.approx(1 / ((1 - mixed) / rope["factor"] + mixed), rel=1e-5)
    assert found[0] == 1 and found[-1] == 8


def test_without_the_package_there_is_one_line(target, tmp_path, monkeypatch):
    import importlib.util

    before = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else before(name, *a))
    with pytest.raises(UserError, match="needs the package gguf"):
        export(target, tmp_path / "out")


def test_the_target_itself_can_be_written(target, tmp_path):
    """llama.cpp needs both models as files."""
    report = EXPORTERS.get("gguf")(StandaloneDraft(target.model, target.tokenizer), tmp_path / "out", target)
    assert report.parameters == sum(p.numel() for p in target.model.parameters())
