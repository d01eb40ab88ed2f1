"""What imports of EAGLE-3 checkpoints have alone: their options, where they come from, older and other hands."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft import artifact
from redraft.drafts.eagle3.reading import read_maps
from redraft.drafts.opening import family_at, open_checkpoint
from redraft.errors import UserError
from redraft.registries import EXPORTERS

SHARED = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("export_families.py"))))
FAMILY, TARGET, rewrite = SHARED.EAGLE3, SHARED.TARGET, SHARED.rewrite
make, assert_same = FAMILY.make, FAMILY.assert_same


@pytest.fixture(params=FAMILY.formats)
def exported(request, tmp_path):
    return FAMILY.exported(request.param, tmp_path / "out")


# -- refused imports -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_before_fc": True, "fc_norm": True, "eagle_config": None}, "norm_before_fc and fc_norm at once"),
        ({"draft_vocab_size": "many"}, "wrong kind"),
        ({"eagle_aux_hidden_state_layer_ids": [1, "2"]}, "a list of integers"),
        ({"eagle_aux_hidden_state_layer_ids": [5, 4, 2]}, "do not ascend strictly"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"norm_before_residual": "false"}, "norm_before_residual 'false'; true or false is needed"),
        ({"eagle_aux_hidden_state_layer_ids": [-1, 2, 4]}, "below the first layer"),
        ({"architectures": "LlamaForCausalLMEagle3"}, "a list of names is needed"),
    ],
)
def test_options_that_we_do_not_compute_are_refused_by_name(exported, change, message):
    rewrite(exported, **change)
    with pytest.raises(UserError, match=message):
        open_checkpoint(exported, TARGET)


def test_other_kinds_of_checkpoint_are_refused(tmp_path):
    EXPORTERS.get("vllm")(make(), tmp_path / "v", TARGET)
    rewrite(tmp_path / "v", speculators_model_type="dflash")
    with pytest.raises(UserError, match="dflash speculator"):
        open_checkpoint(tmp_path / "v", TARGET)
    EXPORTERS.get("plain")(make(), tmp_path / "p", TARGET)
    rewrite(tmp_path / "p", architectures=["LlamaForCausalLM"])
    assert family_at(tmp_path / "p").name == "eagle3"  # SafeAILab's own trainer leaves the target's name
    rewrite(tmp_path / "p", architectures=["MixtralEagle3Draft"], num_local_experts=4)
    with pytest.raises(UserError, match="4, a mixture of experts; .*LlamaForCausalLMEagle, LlamaForCausalLMEagle3,"):
        open_checkpoint(tmp_path / "p", TARGET)


def test_sources_that_cannot_be_read(tmp_path, exported, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(tmp_path / "no" / "such" / "folder", TARGET)
    with pytest.raises(UserError, match="is a file"):
        open_checkpoint(exported / "config.json", TARGET)
    (exported / "model.safetensors").rename(exported / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin cannot be read as tensors alone"):
        open_checkpoint(exported, TARGET)
    (exported / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON: line 1"):
        open_checkpoint(exported, TARGET)


def test_a_hub_id_with_no_hub_in_reach_gives_one_line(monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("cannot reach the hub\nwith a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="could not be fetched as a model id .cannot reach the hub.") as caught:
        open_checkpoint("nobody/no-such-draft", TARGET)
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_downloaded_without_pickle(tmp_path, monkeypatch):
    import huggingface_hub

    EXPORTERS.get("plain")(make(), tmp_path / "snapshot", TARGET)
    asked = {}

    def download(name, allow_patterns, **kwargs):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    back = open_checkpoint("someone/some-draft", TARGET).draft
    assert_same(make(), back)
    assert asked["name"] == "someone/some-draft" and not any("bin" in p for p in asked["patterns"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_scaling": None}, "by kinds of layers"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"rope_type": "default"}},
            "of differ",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "rope_type 'mrope'"),
        ({"rope_theta": None}, "rope_theta None"),
    ],
)
def test_rotary_settings_that_tell_no_one_set_of_angles(tmp_path, change, message):
    EXPORTERS.get("plain")(make(), tmp_path / "out", TARGET)
    rewrite(tmp_path / "out", **change)
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path / "out", TARGET)


def test_two_bases_of_the_angles_are_told(tmp_path):
    EXPORTERS.get("plain")(make(), tmp_path / "out", TARGET)
    rewrite(tmp_path / "out", rope_theta=5.0, rope_scaling=None, rope_parameters={"rope_theta": 7.0})
    opened = open_checkpoint(tmp_path / "out", TARGET)
    draft, meta = opened.draft, opened.meta
    assert draft.config.rope_parameters["rope_theta"] == 7.0 and "7.0 was taken" in meta["notes"][0]


# -- older and other hands -------------------------------------------------------------------------------------------
def test_older_tensor_names_and_shards_are_read(tmp_path):
    draft = make(fc_norm=True)
    EXPORTERS.get("plain")(draft, tmp_path / "out", TARGET)
    state = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()
    for k, old in enumerate(("low", "mid", "high")):
        state[f"aux_norm_{old}.weight"] = state.pop(f"fc_norm.{k}.weight")
    state = {
        ("model." if i % 2 else "") + n.replace("midlayer.", "layers.0."): t for i, (n, t) in enumerate(state.items())
    }
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / "out" / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    artifact.atomic_write_json(tmp_path / "out" / "model.safetensors.index.json", index)
    back = open_checkpoint(tmp_path / "out", TARGET).draft
    assert_same(draft, back)
    save_file(
        {"fc.weight": draft.fc.weight.detach(), "model.fc.weight": draft.fc.weight.detach() + 1},
        tmp_path / "out" / "a.safetensors",
    )
    with pytest.raises(UserError, match="a second time"):
        open_checkpoint(tmp_path / "out", TARGET)


def test_identity_maps_of_a_full_vocabulary_are_left_out_and_told(tmp_path):
    draft = make(draft_vocab_size=40)
    EXPORTERS.get("plain")(draft, tmp_path / "out", TARGET)
    state = load_file(tmp_path / "out" / "model.safetensors")
    state |= {"d2t": torch.zeros(40, dtype=torch.int64), "t2d": torch.ones(40, dtype=torch.bool)}
    rewrite(tmp_path / "out", state)
    opened = open_checkpoint(tmp_path / "out", TARGET)
    back, meta = opened.draft, opened.meta
    assert_same(draft, back)
    assert len(meta["notes"]) == 2
    state["d2t"][3] = 1
    rewrite(tmp_path / "out", state)
    with pytest.raises(UserError, match="extra d2t"):
        open_checkpoint(tmp_path / "out", TARGET)


def test_feature_ids_in_every_place_they_are_written(tmp_path):
    EXPORTERS.get("plain")(make(taps=(2, 4, 5)), tmp_path / "out", TARGET)

    def taps(**config):
        path = tmp_path / "out" / "config.json"
        values = json.loads(path.read_text())
        for key in ("eagle_aux_hidden_state_layer_ids", "eagle_config"):
            values.pop(key, None)
        artifact.atomic_write_json(path, values | config)
        opened = open_checkpoint(tmp_path / "out", TARGET)
        draft, meta = opened.draft, opened.meta
        return draft.config.taps, meta["notes"]

    assert taps() == ((2, 4, 5), [])
    nested, notes = taps(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 2, 6]})
    assert nested == (1, 3, 7) and len(notes) == 1
    both, notes = taps(
        eagle_aux_hidden_state_layer_ids=[1, 3, 6], eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}
    )
    assert both == (1, 3, 6) and "disagree" in notes[0]
    draft = open_checkpoint(tmp_path / "out", TARGET, taps=(1, 2, 3)).draft
    assert draft.config.taps == (1, 2, 3)


def test_absent_switches_take_each_formats_own_default(tmp_path):
    for name, expected in (("vllm", True), ("plain", False)):
        EXPORTERS.get(name)(make(), tmp_path / name, TARGET)
        path = tmp_path / name / "config.json"
        values = json.loads(path.read_text())
        del values["norm_before_residual"]
        artifact.atomic_write_json(path, values)
        opened = open_checkpoint(tmp_path / name, TARGET)
        draft, meta = opened.draft, opened.meta
        assert draft.config.norm_before_residual is expected and len(meta["notes"]) == int(expected)


def test_no_feature_ids_in_a_list_are_the_default_ones(tmp_path):
    EXPORTERS.get("plain")(make(taps=(2, 4, 5)), tmp_path / "out", TARGET)
    for change in (
        {"eagle_aux_hidden_state_layer_ids": [], "eagle_config": None},
        {"eagle_aux_hidden_state_layer_ids": None, "eagle_config": {"eagle_aux_hidden_state_layer_ids": []}},
    ):
        rewrite(tmp_path / "out", **change)
        opened = open_checkpoint(tmp_path / "out", TARGET)
        draft, meta = opened.draft, opened.meta
        assert draft.config.taps == (2, 4, 5) and "list of feature ids is empty" in meta["notes"][0]
    nested = {"eagle_aux_hidden_state_layer_ids": [0, 2, 6]}
    rewrite(tmp_path / "out", eagle_aux_hidden_state_layer_ids=[], eagle_config=nested)
    assert open_checkpoint(tmp_path / "out", TARGET).draft.config.taps == (1, 3, 7)
    rewrite(tmp_path / "out", eagle_config={"layer_ids": [1, 2, 3]})
    with pytest.raises(UserError, match="eagle_config.layer_ids alone"):
        open_checkpoint(tmp_path / "out", TARGET)


@pytest.mark.parametrize("key", ["use_last_layernorm", "use_input_layernorm_in_first_layer", "use_aux_hidden_state"])
def test_switches_of_other_trainers_are_refused_where_engines_do_otherwise(tmp_path, key):
    EXPORTERS.get("plain")(make(), tmp_path / "out", TARGET)
    rewrite(tmp_path / "out", eagle_config={key: True})
    open_checkpoint(tmp_path / "out", TARGET)
    rewrite(tmp_path / "out", eagle_config={key: False})
    with pytest.raises(UserError, match=f"{key} False"):
        open_checkpoint(tmp_path / "out", TARGET)


def changed_maps(folder: Path, **changes):
    """Import a draft over the ids 0, 3, 6, ... of 40 with these maps in its file (none: left out)."""
    draft = make()
    EXPORTERS.get("plain")(draft, folder, TARGET)
    state = {**load_file(folder / "model.safetensors"), **changes}
    rewrite(folder, {name: tensor for name, tensor in state.items() if tensor is not None})
    opened = open_checkpoint(folder, TARGET)
    back, meta = opened.draft, opened.meta
    assert_same(draft, back)
    return meta["notes"]


def test_vocabulary_maps_as_other_hands_write_them(tmp_path):
    whole = {name: getattr(make(), name) for name in ("d2t", "t2d")}
    ids = make().vocabulary()
    told = [
        changed_maps(tmp_path / "a", t2d=None),
        changed_maps(tmp_path / "b", d2t=None),
        changed_maps(tmp_path / "c", d2t=whole["d2t"].int(), t2d=whole["t2d"].to(torch.uint8)),
        changed_maps(tmp_path / "d", d2t=ids.clone()),
    ]
    assert told == [
        ["t2d is not in the file; derived from d2t"],
        ["d2t is not in the file; derived from t2d"],
        ["d2t was int32; taken as int64", "t2d was uint8; taken as bool"],
        ["d2t held target ids; taken as such and turned into offsets"],
    ]
    with pytest.raises(UserError, match="t2d is uint8 with other values than 0 and 1"):
        changed_maps(tmp_path / "e", t2d=2 * whole["t2d"].to(torch.uint8))
    with pytest.raises(UserError, match="d2t points outside"):
        changed_maps(tmp_path / "f", t2d=None, d2t=whole["d2t"] + 40)


def test_a_long_map_that_may_hold_ids_is_refused_without_the_other():
    ids = torch.arange(0, 600, 2)
    config = replace(make().config, draft_vocab_size=300, target_vocab_size=1000)
    marks = torch.zeros(1000, dtype=torch.bool)
    marks[ids] = True
    with pytest.raises(UserError, match="grows at every step, as target ids do"):
        read_maps({"d2t": ids}, config, Path("draft"), [])
    notes: list[str] = []
    assert torch.equal(read_maps({"d2t": ids, "t2d": marks}, config, Path("draft"), notes)["d2t"], ids // 2)
    assert notes == ["d2t held target ids; taken as such and turned into offsets"]
    offsets = {"d2t": ids // 2, "t2d": marks}
    assert torch.equal(read_maps(offsets, config, Path("draft"), notes)["d2t"], ids // 2) and len(notes) == 1


class Runs:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_tensors_of_the_older_kind_are_read_and_nothing_in_them_is_run(tmp_path):
    draft, out = make(), tmp_path / "out"
    EXPORTERS.get("plain")(draft, out, TARGET)
    state = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names = sorted(state)
    torch.save({name: state[name] for name in names[::2]}, out / "pytorch_model-00001-of-00002.bin")
    torch.save({name: state[name] for name in names[1::2]}, out / "pytorch_model-00002-of-00002.bin")
    opened = open_checkpoint(out, TARGET)
    back, meta = opened.draft, opened.meta
    assert_same(draft, back)
    assert len(meta["notes"]) == 2 and "reader of tensors alone" in meta["notes"][0]
    torch.save({"fc.weight": Runs(tmp_path / "ran")}, out / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(UserError, match="cannot be read as tensors alone, and pickle is never run"):
        open_checkpoint(out, TARGET)
    torch.save({"state_dict": state}, out / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(UserError, match="holds more than named tensors"):
        open_checkpoint(out, TARGET)
    assert not (tmp_path / "ran").exists()


def test_a_hub_id_is_asked_for_the_older_kind_only_where_there_is_nothing_else(tmp_path, monkeypatch):
    import huggingface_hub

    EXPORTERS.get("plain")(make(), tmp_path / "out", TARGET)
    state, asked = load_file(tmp_path / "out" / "model.safetensors"), []
    (tmp_path / "out" / "model.safetensors").unlink()

    def download(name, allow_patterns, **kwargs):
        asked.append(any("bin" in pattern for pattern in allow_patterns))
        if asked[-1]:
            torch.save(state, tmp_path / "out" / "pytorch_model.bin")
        return str(tmp_path / "out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(make(), open_checkpoint("someone/some-draft", TARGET).draft)
    assert asked == [False, True]


def test_an_index_beside_a_whole_file_is_refused(tmp_path):
    EXPORTERS.get("plain")(make(), tmp_path / "out", TARGET)
    save_file(load_file(tmp_path / "out" / "model.safetensors"), tmp_path / "out" / "a.safetensors")
    index = {"weight_map": {"fc.weight": "a.safetensors"}}
    artifact.atomic_write_json(tmp_path / "out" / "model.safetensors.index.json", index)
    with pytest.raises(UserError, match="delete the older weights"):
        open_checkpoint(tmp_path / "out", TARGET)
