"""Every family and option by every reader: the file means the draft to it, or was refused by the name of the option.

What a reader makes of a file is asked of the file on disk; what the draft means, of our importer and of the draft.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from redraft import registries
from redraft.artifact import dtype_name
from redraft.drafts.eagle.angles import OURS, Rules, angles, merged
from redraft.drafts.eagle.kinds import wrong_kinds
from redraft.drafts.eagle.look import Look
from redraft.drafts.eagle1 import engines as eagle1_engines
from redraft.drafts.eagle3 import engines as eagle3_engines
from redraft.drafts.formats import matrix
from redraft.drafts.formats.meaning import TensorFacts, differences
from redraft.drafts.layers import Rotary
from redraft.drafts.opening import open_checkpoint
from redraft.errors import UserError
from redraft.registries import EXPORTERS

pytest.importorskip("gguf")

ENGINES = {"eagle1": eagle1_engines, "eagle3": eagle3_engines}
TARGET = matrix.facts()
CASES = [
    (family, option, name)
    for family, options in matrix.OPTIONS.items()
    for option in options
    for name in registries.FAMILIES.get(family).writers
]
# What refuses a draft, by the option that it has: a word of which the refusal must say.
NAMES = {
    "windows": "window",
    "own embedding": "embedding",
    "another width than the target's": "embedding|target_hidden_size",
    "no head_norm": "head_norm",
    "four features": "features",
    "features from the first to the last": "feature",
    "rope": "rope_parameters|rope_type|scale|truncate",
    "full vocabulary": "vocab",
}


def tensors_of(folder: Path) -> dict[str, TensorFacts]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
    return {name: TensorFacts(dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in found.items()}


@pytest.mark.parametrize(("family", "option", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_equal_or_refused_by_name(tmp_path, family, option, name):
    draft, writer = matrix.made(family, matrix.OPTIONS[family][option]), registries.FAMILIES.get(family).writers[name]
    try:
        EXPORTERS.get(name)(draft, tmp_path / "out", TARGET)
    except UserError as error:
        words = [word for part in option.split(", ") for word in part.split(" ")]
        named = [NAMES.get(option, "")] + [NAMES.get(word, word) for word in words]
        assert any(part in str(error) for word in named if word for part in word.split("|")), str(error)
        assert "cannot run this draft" in str(error) and "\n" not in str(error) and list(tmp_path.iterdir()) == []
        return
    folder = tmp_path / "out"
    if name == "gguf":  # one file of another kind, which tests of its own read back
        return
    config, tensors = json.loads((folder / "config.json").read_text()), tensors_of(folder)
    ours = ENGINES[family].meaning_of(draft.config)
    for reader in writer.readers:
        reading = ENGINES[family].read_as(reader, config, tensors, TARGET)
        assert reading.stops == []
        left = [d for d in differences(ours, reading) if not (d.what == "taps" and reader == "tensorrt-llm")]
        # A bias of zeros is none.
        zero = {d.what for d in left if d.what.endswith("bias") and not d.ours}
        assert {d.what for d in left} == zero
        state = draft.state_dict()
        assert all(what in ("fc_bias", "attention_bias", "output_bias") for what in zero)
        for what in zero:
            places = {"fc_bias": "fc.bias", "attention_bias": "q_proj.bias", "output_bias": "o_proj.bias"}
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                added = [file.get_tensor(n) for n in file.keys() if n.endswith(places[what])]
            assert added and not any(bool(bias.any()) for bias in added)
            assert not any(n.endswith(places[what]) for n in state)
        assert ours.keys() == reading.meaning.keys()
    options = {"trainer": writer.trainer} if writer.trainer else {}
    back = open_checkpoint(folder, TARGET, **options).draft.state_dict()
    assert all(torch.equal(back[n], tensor) for n, tensor in draft.state_dict().items())


def test_the_table_is_that_of_the_exporters():
    table = {(row.family, row.option, row.format): row for row in matrix.rows()}
    assert set(table) == set(CASES)
    assert {row.verdict for row in table.values()} == {"equal", "refused"}
    assert all(bool(row.why) == (row.verdict == "refused") for row in table.values())
    # Somebody holds each option but these.
    held = {(row.family, row.option) for row in table.values() if row.verdict == "equal"}
    nobody = {option for family, option in {(f, o) for f, o, _ in CASES} - held if family == "eagle3"}
    assert nobody == {"windows of two kinds", "windows of two widths", "qk_norm, output_bias"}


# -- angles ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", matrix.ROPES)
def test_settings_of_one_form_turn_alike_and_no_others(name):
    """The form that readings compare says all that the angles hang on."""
    rope = merged({"rope_parameters": matrix.THETA | matrix.ROPES[name], "max_position_embeddings": 64})
    form = angles(rope, 6, 64)
    plain = angles(merged({"rope_theta": 10000.0}), 6, 64)
    cosines, sines = Rotary(dict(rope), 6, 64)(torch.arange(20))
    usual = Rotary({"rope_theta": 10000.0, "rope_type": "default"}, 6, 64)(torch.arange(20))
    same = cosines.shape == usual[0].shape and torch.equal(cosines, usual[0]) and torch.equal(sines, usual[1])
    assert (form == plain) == same


def test_two_ways_of_writing_one_set_of_angles():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    spelled = yarn | {"beta_fast": 32, "beta_slow": 1, "attention_factor": 1.138629436111989}
    beside = {"rope_scaling": yarn, "rope_theta": 5e5, "max_position_embeddings": 128}
    inside = {"rope_parameters": spelled | {"rope_theta": 5e5}, "max_position_embeddings": 128}
    assert angles(merged(beside), 8, 128) == angles(merged(inside), 8, 128)
    # A zero scale is none to transformers, and a number to others.
    zero = yarn | {"mscale": 0.7, "mscale_all_dim": 0.0, "rope_theta": 5e5}
    assert angles(zero, 8, 128, OURS)["scale"] != angles(zero, 8, 128, Rules(zero_scales=True))["scale"]


@pytest.mark.parametrize("reader", eagle3_engines.READERS)
@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"eagle_config": 3},
        {"rope_scaling": {"rope_type": "spiral"}},
        {"rope_scaling": [1]},
        {"layer_types": 3},
        {"eagle_aux_hidden_state_layer_ids": ["a"]},
        {"num_hidden_layers": None},
        {"architectures": None},
        {"sliding_window": {}, "layer_types": ["sliding_attention"]},
        {"draft_vocab_size": "many"},
    ],
)
def test_no_config_ends_in_a_traceback(tmp_path, reader, change):
    EXPORTERS.get("plain")(matrix.made("eagle3", {}), tmp_path / "out", TARGET)
    config = json.loads((tmp_path / "out" / "config.json").read_text()) | change
    eagle3_engines.read_as(reader, config, tensors_of(tmp_path / "out"), TARGET)
    wrapped = {"speculators_model_type": "eagle3", "transformer_layer_config": config} | change
    eagle3_engines.read_as(reader, wrapped, {}, TARGET)


@pytest.mark.parametrize("reader", ["vllm-0.33", "sglang"])
@pytest.mark.parametrize("family", ENGINES)
def test_a_defect_of_ours_is_no_reason_to_stop(tmp_path, monkeypatch, family, reader):
    def fail(*_, **__):
        raise TypeError("a defect of ours")

    EXPORTERS.get("vllm" if family == "eagle1" else "plain")(matrix.made(family, {}), tmp_path / "out", TARGET)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    monkeypatch.setattr(Look, "__init__", fail)
    with pytest.raises(TypeError, match="of ours"):
        ENGINES[family].read_as(reader, config, {}, TARGET)
    (stop,) = ENGINES[family].read_as(reader, config | {"hidden_size": "wide"}, {}, TARGET).stops
    assert stop == "config.json has a value of the wrong kind: hidden_size 'wide'"


def test_null_among_rotary_settings_is_a_value_and_elsewhere_is_absent():
    assert not list(wrong_kinds({"head_dim": None, "rope_scaling": None, "eagle_config": {"layer_ids": None}}))
    told = {"rope_scaling": {"factor": None}, "transformer_layer_config": {"num_attention_heads": 0}}
    assert list(wrong_kinds(told)) == ["rope_scaling.factor None", "transformer_layer_config.num_attention_heads 0"]


def test_an_unknown_reader_is_told():
    for engines in ENGINES.values():
        with pytest.raises(UserError, match="'vllm-9' .*there are vllm-0.32"):
            engines.read_as("vllm-9", {}, {}, TARGET)
