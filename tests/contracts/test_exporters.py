"""The contract of every exporter and of the importer, for every family of drafts that reads the target's states.

Exact round trips, complete or refused, one clear line.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from redraft import registries
from redraft.drafts import files
from redraft.drafts.base import is_private
from redraft.drafts.formats.base import check_export
from redraft.drafts.groups import attach_low_rank, attach_private
from redraft.drafts.opening import open_checkpoint
from redraft.drafts.standalone import StandaloneDraft
from redraft.errors import UserError
from redraft.registries import EXPORTERS

SHARED = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("export_families.py"))))
FAMILIES, TARGET = SHARED.FAMILIES, SHARED.TARGET
refused, rewrite, theirs = SHARED.refused, SHARED.rewrite, SHARED.theirs


def case(family, *values):
    """A parameter set that is called after its family and after what of it is text."""
    return pytest.param(family, *values, id="-".join([family.name, *(v for v in values if isinstance(v, str))]))


PAIRS = [(family, name) for family in FAMILIES for name in family.formats]
each_format = pytest.mark.parametrize(("family", "name"), [case(*pair) for pair in PAIRS])
each_tensor = pytest.mark.parametrize(
    ("family", "name", "tensor"), [case(*pair, tensor) for pair in PAIRS for tensor in pair[0].tensors]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

# Every exporter with every option of every family: held and read back, or refused.
EVERY = [
    (family, name, option, name in family.formats and name not in unable)
    for family in FAMILIES
    for name in EXPORTERS.names()
    for option, (_, unable) in family.options.items()
    if name in family.formats or name not in registries.FAMILIES.get(family.name).writers
]
HELD = [case(family, name, option) for family, name, option, held in EVERY if held]
NOT_HELD = [case(family, name, option) for family, name, option, held in EVERY if not held]
# An engine cannot run the draft, or a format is none of its family.
REFUSED = r"cannot run this draft: |export it for "
# What an import says of files that hold more or less than others.
KNOWN_NOTES = "the full vocabulary onto itself|fc has a bias|without the norm before the head|turns the whole head"
MISFITS = [({"hidden_size": 32}, "features of width 16"), ({"vocab_size": 48}, "vocabulary of 40")]
LAYERS = [
    ({"model_type": "qwen3"}, "model_type 'qwen3'"),
    ({"num_hidden_layers": 2}, "num_hidden_layers 2"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
    ({"hidden_size": "wide"}, "not a usable config"),
    ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "config.json"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "partial_rotary"),
]


def test_every_family_is_held_to_this_contract():
    assert {family.name for family in FAMILIES} == set(registries.FAMILIES.names()) - {StandaloneDraft.family}


# -- round trips -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "name", "option"), HELD)
@each_dtype
def test_a_round_trip_gives_the_same_tensors_and_answers(tmp_path, family, name, option, dtype):
    draft = family.make(dtype, **family.options[option][0])
    check_export(name, draft, TARGET)
    assert list(tmp_path.iterdir()) == []
    report = EXPORTERS.get(name)(draft, tmp_path / "out", TARGET)
    opened = family.opened(name, tmp_path / "out")
    back, meta = opened.draft, opened.meta
    family.assert_equal(draft, back)
    assert meta["family"] == family.name
    assert [note for note in meta["notes"] if not re.search(KNOWN_NOTES, note)] == []
    state = load_file(tmp_path / "out" / "model.safetensors")
    shipped = sum(tensor.numel() for name, tensor in state.items() if tensor.is_floating_point())
    assert report.tensors == len(state) and report.parameters <= shipped
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert TARGET.name in report.serve and str(tmp_path / "out") in report.serve
    family.check_file(name, draft, meta, state)


@pytest.mark.parametrize(("family", "name", "option"), NOT_HELD)
@each_dtype
def test_a_format_that_does_not_hold_a_draft_refuses_it_by_one_line(tmp_path, family, name, option, dtype):
    draft = family.make(dtype, **family.options[option][0])
    refused(name, tmp_path, draft, REFUSED)
    with pytest.raises(UserError, match=REFUSED):
        check_export(name, draft, TARGET)  # before anything is spent on the draft
    assert list(tmp_path.iterdir()) == []


def test_every_format_is_one_of_a_family():
    known = [name for _, family in registries.FAMILIES.items() for name in family.writers]
    assert set(known) == set(EXPORTERS.names())


@each_format
@pytest.mark.parametrize("part", ["expert", "low rank"])
def test_a_private_part_is_merged(tmp_path, family, name, part):
    draft = attach_private(family.make(), 8) if part == "expert" else attach_low_rank(family.make(), 2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor, parameter in draft.named_parameters():
            if is_private(tensor):
                parameter.normal_(std=0.3, generator=generator)
    report = EXPORTERS.get(name)(draft, tmp_path / "out", TARGET)
    back = open_checkpoint(tmp_path / "out", TARGET).draft
    assert report.merged_private and any("merged" in line for line in report.warnings)
    family.assert_same(draft.merged(), back)
    answer, near = family.answer(back), family.tolerance
    torch.testing.assert_close(answer, family.answer(draft), atol=near, rtol=near)
    assert not torch.allclose(answer, family.answer(family.make()), atol=1e-2)


@each_format
def test_a_second_export_of_the_import_gives_the_same_files(tmp_path, family, name):
    back = open_checkpoint(family.exported(name, tmp_path / "one"), TARGET).draft
    EXPORTERS.get(name)(back, tmp_path / "two", TARGET)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    ("family", "option"), [case(family, option) for family in FAMILIES for option in family.options]
)
def test_our_own_format_is_imported_too(tmp_path, family, option):
    draft = family.make(**family.options[option][0])
    files.save_draft(tmp_path / "own", draft, {"method": "full"})
    opened = open_checkpoint(tmp_path / "own", TARGET)
    back, meta = opened.draft, opened.meta
    family.assert_same(draft, back)
    assert meta["format"] == "redraft" and meta["family"] == family.name and meta["method"] == "full"


# -- refused exports ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "name", "tensor"), [case(*pair, tensor) for pair in PAIRS for tensor in pair[0].weights]
)
def test_nan_is_named(tmp_path, family, name, tensor):
    draft = family.make()
    draft.state_dict()[tensor].view(-1)[-1] = float("nan")
    refused(name, tmp_path, draft, f"{tensor} holds NaN")


@each_format
class TestRefusedExports:
    def test_a_target_that_does_not_fit(self, family, name, tmp_path):
        for change, message in (*MISFITS, ({"vocab_size": 41}, "vocabulary of 40"), *family.misfits):
            refused(name, tmp_path, family.make(), message, SHARED.facts(**change))

    def test_routed_experts(self, family, name, tmp_path):
        refused(name, tmp_path, attach_private(family.make(), 8, experts=2), "eda-moe")

    def test_a_short_context_is_raised_or_refused(self, family, name, tmp_path):
        long = SHARED.facts(context=128)
        yarn = family.make(rope_parameters=SHARED.YARN)
        refused(name, tmp_path, yarn, "would change the yarn rotary angles", long)
        report = EXPORTERS.get(name)(family.make(), tmp_path / "out", long)
        back = open_checkpoint(tmp_path / "out", long).draft
        assert any("raised from 64" in line for line in report.warnings)
        assert back.config == replace(family.config, max_position_embeddings=128)
        assert torch.equal(family.answer(back), family.answer(family.make()))

    def test_a_draft_length_below_one(self, family, name, tmp_path):
        refused(name, tmp_path, family.make(), "must be 1 or more", speculative_tokens=0)

    def test_a_folder_with_other_work_and_a_full_disk(self, family, name, tmp_path, full_disk):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "results.csv").write_text("1,2")
        with pytest.raises(UserError, match="holds other files"):
            family.exported(name, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        full_disk()
        refused(name, tmp_path, family.make(), "no room on the disk")


MAPS = ("d2t", "t2d")


# -- refused imports ---------------------------------------------------------------------------------------------------
@each_tensor
def test_every_missing_tensor_is_named(tmp_path, family, name, tensor):
    folder = family.exported(name, tmp_path / "out")
    state = load_file(folder / "model.safetensors")
    # One map follows from the other: a file without both is not whole.
    for name_of in MAPS if tensor in MAPS else (tensor,):
        del state[theirs(folder, name_of)]
    rewrite(folder, state)
    with pytest.raises(UserError, match=f"missing .*{tensor}"):
        open_checkpoint(folder, TARGET)


@each_tensor
def test_every_misshaped_or_wrongly_typed_tensor_is_named(tmp_path, family, name, tensor):
    folder = family.exported(name, tmp_path / "out")
    whole, stored = load_file(folder / "model.safetensors"), theirs(folder, tensor)
    rewrite(folder, whole | {stored: torch.cat([whole[stored], whole[stored][:1]])})
    with pytest.raises(UserError, match=f"{tensor} has shape"):
        open_checkpoint(folder, TARGET)
    wrong = "float16" if tensor in MAPS else "int8"
    rewrite(folder, whole | {stored: whole[stored].to(getattr(torch, wrong))})
    with pytest.raises(UserError, match=f"{tensor} is {wrong}"):
        open_checkpoint(folder, TARGET)


@each_format
def test_extra_tensors_and_infinity_are_named(tmp_path, family, name):
    folder = family.exported(name, tmp_path / "out")
    whole = load_file(folder / "model.safetensors")
    for extra in family.extra_tensors:
        rewrite(folder, whole | {extra: torch.zeros(3)})
        with pytest.raises(UserError, match=f"extra {extra.replace('layers.0.', 'midlayer.')}"):
            open_checkpoint(folder, TARGET)
    last = family.weights[-1]
    whole[theirs(folder, last)][3] = float("inf")
    rewrite(folder, whole)
    with pytest.raises(UserError, match=f"{last} holds NaN or infinity"):
        open_checkpoint(folder, TARGET)


@pytest.mark.parametrize(
    ("family", "name", "change", "message"),
    [case(*pair, *misfit) for pair in PAIRS for misfit in (*MISFITS, *pair[0].misfits)],
)
def test_a_draft_that_does_not_fit_the_target(tmp_path, family, name, change, message):
    folder = family.exported(name, tmp_path / "out")
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder, SHARED.facts(**change))


@each_format
@pytest.mark.parametrize(("change", "message"), LAYERS)
def test_layers_that_we_do_not_compute_are_refused_by_name(tmp_path, family, name, change, message):
    folder = family.exported(name, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    if "transformer_layer_config" in config:
        change = {"transformer_layer_config": config["transformer_layer_config"] | change}
    rewrite(folder, **change)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(folder, TARGET)
    assert "\n" not in str(caught.value)
