"""redraft's own format: exact round trips, strictness both ways, atomic writes, disk space, schema."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft import artifact
from redraft.drafts import files
from redraft.drafts.base import is_private
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.drafts.groups import attach_private
from redraft.errors import UserError

CONFIG = runpy.run_path(str(Path(__file__).parents[1] / "tiny_drafts.py"))["EAGLE3"]
META = {"method": "eda+fc", "target": {"name": "tiny", "hash": "0123"}, "provenance": {"seed": 1}}


@pytest.fixture
def draft() -> Eagle3Draft:
    torch.manual_seed(0)
    return Eagle3Draft(CONFIG, torch.arange(0, 40, 4))


@pytest.fixture
def saved(tmp_path, draft):
    files.save_draft(tmp_path / "d", draft, META)
    return tmp_path / "d"


def same(left, right) -> bool:
    left, right = left.state_dict(), right.state_dict()
    return set(left) == set(right) and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_comes_back_bit_for_bit(tmp_path, draft, dtype):
    draft = draft.to(dtype)
    files.save_draft(tmp_path / "d", draft, META)
    back, meta = files.load_draft(tmp_path / "d")
    assert same(back, draft) and back.config == draft.config
    assert meta["kind"] == "draft" and meta["family"] == "eagle3" and meta["target"] == META["target"]
    assert meta["method"] == "eda+fc" and meta["provenance"] == {"seed": 1}
    assert meta["content_hash"] == artifact.tensors_hash(draft.state_dict())
    assert all(p.requires_grad for p in back.parameters())


def test_a_private_part_holds_only_its_tensors_and_loads_onto_the_base(tmp_path, draft):
    split = attach_private(draft, 8)
    torch.nn.init.normal_(split.midlayer.mlp.private.down_proj.weight)
    torch.nn.init.normal_(split.fc.weight)
    names = [n for n in split.state_dict() if is_private(n)] + ["fc.weight"]
    base_hash = artifact.tensors_hash(draft.state_dict())
    files.save_private(tmp_path / "p", split, names, base_hash, META)
    assert set(load_file(tmp_path / "p" / files.PRIVATE_FILE)) == set(names)
    before = artifact.tensors_hash(draft.state_dict())
    back, meta = files.load_private(tmp_path / "p", draft, base_hash)
    assert same(back, split) and back.config.private_width == 8 and meta["base_draft_hash"] == base_hash
    files.save_draft(tmp_path / "whole", back, meta)
    again, handed_on = files.load_draft(tmp_path / "whole")
    assert same(again, split) and "base_draft_hash" not in handed_on and handed_on["method"] == "eda+fc"
    back.fc.weight.data.zero_()
    assert artifact.tensors_hash(draft.state_dict()) == before
    with pytest.raises(UserError, match="belongs to the base draft"):
        files.load_private(tmp_path / "p", draft, "ffff")
    with pytest.raises(UserError, match="private artifact where a draft is needed"):
        files.load_draft(tmp_path / "p")


def test_a_private_part_without_its_expert_is_refused(tmp_path, draft):
    split = attach_private(draft, 8)
    files.save_private(tmp_path / "p", split, ["fc.weight"], "base", META)
    with pytest.raises(UserError, match="missing midlayer.mlp.private.down_proj.weight"):
        files.load_private(tmp_path / "p", draft, "base")


@pytest.mark.parametrize("name", sorted(Eagle3Draft(CONFIG).state_dict()))
def test_every_missing_tensor_is_named(saved, name):
    state = load_file(saved / "draft.safetensors")
    del state[name]
    save_file(state, saved / "draft.safetensors")
    with pytest.raises(UserError, match=f"missing {name}"):
        files.load_draft(saved)


@pytest.mark.parametrize("name", sorted(Eagle3Draft(CONFIG).state_dict()))
def test_every_misshaped_or_wrongly_typed_tensor_is_named(saved, name):
    whole = load_file(saved / "draft.safetensors")
    save_file(whole | {name: torch.cat([whole[name], whole[name][:1]])}, saved / "draft.safetensors")
    with pytest.raises(UserError, match=f"{name} has shape"):
        files.load_draft(saved)
    save_file(whole | {name: whole[name].to(torch.int8)}, saved / "draft.safetensors")
    with pytest.raises(UserError, match=f"{name} is int8 instead of"):
        files.load_draft(saved)


def test_extra_tensors_and_nan_are_named_together(saved):
    state = load_file(saved / "draft.safetensors")
    state["fc.weight"][0, 0] = float("nan")
    state["fc.bias"] = torch.zeros(16)
    save_file(state, saved / "draft.safetensors")
    with pytest.raises(UserError, match="extra fc.bias; fc.weight holds NaN or infinity"):
        files.load_draft(saved)


def test_a_changed_byte_and_a_torn_file_are_noticed(saved):
    path = saved / "draft.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="t2d|content hash"):
        files.load_draft(saved)
    path.write_bytes(data[:-20])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        files.load_draft(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": files.SCHEMA + 1}, "upgrade redraft"),
        ({"schema": None}, "no schema number"),
        ({"family": "eagle9"}, "unknown draft family"),
        ({"kind": "private"}, "where a draft is needed"),
        ({"content_hash": "0"}, "content hash differs"),
        ({"config": 3}, "no JSON object"),
        ({"config": {"taps": [1]}}, "draft config is incomplete"),
    ],
)
def test_a_wrong_metadata_file_gives_one_clear_line(saved, change, message):
    path = saved / files.META_FILE
    artifact.atomic_write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(UserError, match=message) as caught:
        files.load_draft(saved)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(tmp_path, saved):
    with pytest.raises(UserError, match="does not exist"):
        files.load_draft(tmp_path / "nowhere")
    (saved / files.META_FILE).write_text('{"schema": 1,\n"kind" }')
    with pytest.raises(UserError, match="not JSON: line 2"):
        files.load_draft(saved)
    (saved / files.META_FILE).unlink()
    with pytest.raises(UserError, match="redraft.json does not exist"):
        files.load_draft(saved)


def test_nothing_is_written_when_the_disk_is_too_small(tmp_path, draft, full_disk):
    full_disk()
    with pytest.raises(UserError, match="no room on the disk"):
        files.save_draft(tmp_path / "d", draft, META)
    with pytest.raises(UserError, match="no room on the disk"):
        artifact.atomic_write_text(tmp_path / "note", "hello")
    assert list(tmp_path.iterdir()) == []


def test_a_draft_with_nan_is_not_saved_and_the_old_one_stays(saved, draft):
    other = Eagle3Draft(replace(CONFIG, norm_before_fc=True))
    other.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="norm.weight holds NaN"):
        files.save_draft(saved, other, META)
    back, _ = files.load_draft(saved)
    assert same(back, draft)


def test_an_error_while_writing_leaves_the_old_folder(saved, draft, monkeypatch):
    def tear(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "let_others_read", tear)
    with pytest.raises(UserError, match="no room on the disk"):
        files.save_draft(saved, draft, META)
    assert same(files.load_draft(saved)[0], draft)
    assert [entry.name for entry in saved.parent.iterdir()] == ["d"]


def test_a_replacement_killed_between_its_renames_is_undone(saved, draft):
    saved.rename(saved.with_name(".d.redraft-old"))
    assert same(files.load_draft(saved)[0], draft)


def test_a_folder_with_other_work_is_not_replaced(tmp_path, draft):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files .thesis.tex."):
        files.save_draft(tmp_path, draft, META)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_hash_sees_names_shapes_dtypes_and_values():
    base = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False])}
    variants = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].view(3, 2), "b": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"] + 1, "b": base["b"]},
        {"a": base["a"], "b": ~base["b"]},
    ]
    hashes = [artifact.tensors_hash(state) for state in [base, *variants]]
    assert len(set(hashes)) == len(hashes)
    assert artifact.tensors_hash(dict(reversed(base.items()))) == hashes[0]


def test_an_engine_of_another_user_can_read_the_tensors(tmp_path):
    plain, path = tmp_path / "plain", tmp_path / "part.safetensors"
    plain.write_text("")
    artifact.write_tensors(path, {"a": torch.zeros(2)})
    assert path.stat().st_mode == plain.stat().st_mode


def test_tensors_are_written_one_by_one_as_the_library_writes_them_at_once(tmp_path):
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool]
    kinds += [torch.int16, torch.int8, torch.uint8]
    state = {f'{k} é"': torch.ones(3, k).to(kind) for k, kind in enumerate(kinds)}
    state |= {"scalar": torch.tensor(2.0), "turned": torch.arange(12.0).reshape(3, 4).T, "none": torch.zeros(0, 4)}
    artifact.write_tensors(tmp_path / "ours", state)
    whole = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(whole, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_table_that_repeats_its_numbers_is_no_weight_file(tmp_path):
    torch.save({"fc.weight": torch.zeros(1).expand(1 << 20)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="fc.weight in a form that is no plain table"):
        artifact.read_pickled(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_beyond_what_can_be_read_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="no JSON that can be read"):
        artifact.read_json(tmp_path / "config.json")
