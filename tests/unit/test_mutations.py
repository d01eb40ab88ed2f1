"""Checkpoints with one thing changed are read as what they now say, or refused in one line; and what once was not."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import warnings

import pytest
import torch
from mutating import judging
from mutating.base import DEEP, GONE, RAN, REFUSE, SAME, Mutation, becomes, dumped, rewritten
from mutating.judging import checked, judged
from mutating.sources import ARTIFACTS, TRAINERS, sources
from mutations import EVERY, Tally, run
from safetensors.torch import load_file, save_file

from redraft.artifact import read_json, read_pickled
from redraft.drafts.files import load_draft, load_private
from redraft.drafts.formats.layers import LayerReader
from redraft.drafts.opening import family_at, open_checkpoint
from redraft.errors import UserError
from redraft.loading import read_facts

CASES = (
    "modelopt-0.47.0-all",
    "safeailab-1.2.1-eagle1",
    "specforge-0.2.0-rope-yarn",
    "speculators-0.9.0-layers-3-windows",
)
COUNT = 60
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        yield sources(tmp_path_factory.mktemp("sources"), CASES)
        logging.disable(logging.NOTSET)


@pytest.fixture
def case(good, tmp_path):
    """A trainer's checkpoint, copied, with its source."""
    source = next(source for source in good if source.name == "speculators-0.9.0-layers-3-windows")
    shutil.copytree(source.folder, tmp_path / "draft")
    return source, tmp_path / "draft"


def test_the_judge_and_the_package_agree_on_good_checkpoints(good):
    assert {source.family for source in good} == {"eagle1", "eagle3", "standalone"}
    assert {name for source in good for name in source.name.split() if name in ("vllm", "plain", "redraft")}
    for source in good:
        checked(source)


def test_mutations_are_read_rightly_or_refused_in_one_line(good, tmp_path, monkeypatch):
    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path / "cache"))
    tally = Tally()
    run(good, 1, COUNT, tmp_path, tally, every=EVERY)
    found = tally.summary()
    assert not found["faults"] and found["tried"] == COUNT and found["commands"]["tried"]
    assert found["refused"] and found["same"] and found["other"]


@pytest.mark.parametrize(
    ("change", "expect", "verdict"),
    [
        ({"rope_theta": 777.0}, becomes(rope_parameters={"rope_type": "default", "rope_theta": 777.0}), "other"),
        ({"rope_theta": 777.0}, SAME, "wrong"),
        ({"rope_theta": 777.0}, REFUSE, "wrong"),
        ({"rope_theta": "777"}, REFUSE, "refused"),
        ({"rope_theta": "777"}, SAME, "needless"),
    ],
)
def test_the_judge_tells_right_from_wrong(case, change, expect, verdict):
    source, folder = case
    path = ("transformer_layer_config", "rope_parameters", "rope_theta")
    mutation = Mutation("test", "", rewritten("config.json", path, change["rope_theta"]), ("rope_theta",), expect)
    mutation.apply(folder)
    assert judged(source, mutation, folder)[0] == verdict


def test_the_judge_sees_a_reader_that_loses_a_value(case, monkeypatch):
    source, folder = case
    expect = becomes(rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    path = ("transformer_layer_config", "rope_parameters", "rope_theta")
    mutation = Mutation("test", "", rewritten("config.json", path, 777.0), ("rope_theta",), expect)
    mutation.apply(folder)
    usual = {"rope_type": "default", "rope_theta": 10000.0}
    monkeypatch.setattr(LayerReader, "rope", lambda *args, **kwargs: usual)
    assert judged(source, mutation, folder)[0] == "wrong"


def test_the_judge_hears_code_that_is_run(case, monkeypatch):
    source, folder = case
    mutation = Mutation("test", "", lambda folder: None, ("rope",), REFUSE)
    monkeypatch.setattr(LayerReader, "rope", lambda self, *args, **kwargs: print(RAN) or self.refuse(["rope"]))
    assert judged(source, mutation, folder) == ("wrong", "code of the file was run")


def test_the_judge_tells_defects_and_endless_readers(case, monkeypatch):
    source, folder = case
    mutation = Mutation("test", "", lambda folder: None, ("rope",), SAME)

    def stops(*args, **kwargs):
        raise OSError("what nobody foresaw")

    monkeypatch.setattr(LayerReader, "rope", stops)
    assert judged(source, mutation, folder)[0] == "traceback"
    monkeypatch.setattr(LayerReader, "rope", lambda *args, **kwargs: time.sleep(60))
    monkeypatch.setattr(judging, "SECONDS", 0.2)
    assert judged(source, mutation, folder)[0] == "late"


# -- what mutations found ----------------------------------------------------------------------------------------------
def refused(case, *words):
    """Opening the folder fails with one line that holds these words."""
    source, folder = case
    with pytest.raises(UserError) as caught:
        source.opened(folder)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_an_error_is_one_line_whatever_names_it_tells_of():
    assert str(UserError("draft two\nlines\x1b[31m é")) == "draft two\\nlines\\x1b[31m é"


def test_a_key_that_stands_twice_with_two_values(case, tmp_path):
    text = (case[1] / "config.json").read_text()
    (case[1] / "config.json").write_text(text.replace("{", '{"norm_before_fc": false, ', 1))
    refused(case, "norm_before_fc", "twice")
    (tmp_path / "same.json").write_text('{"a": [1], "a": [1]}')
    assert read_json(tmp_path / "same.json") == {"a": [1]}
    (tmp_path / "other.json").write_text('{"a": 1, "a": true}')
    with pytest.raises(UserError, match="'a' twice"):
        read_json(tmp_path / "other.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_a_files_place_is_not_waited_for(case, name):
    (case[1] / name).unlink()
    os.mkfifo(case[1] / name)
    refused(case, name)


def test_a_pipe_in_the_place_of_torchs_older_file(tmp_path):
    os.mkfifo(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no ordinary file"):
        read_pickled(tmp_path / "pytorch_model.bin")


def test_a_tensor_without_numbers_in_torchs_older_file(tmp_path):
    torch.save({"a": torch.empty(3, device="meta")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no plain table"):
        read_pickled(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a\0b", "x" * 5000, "\udcff", "", 7, None])
def test_names_that_no_system_takes(name):
    for look in (open_checkpoint, family_at):
        with pytest.raises(UserError):
            look(name)


def test_a_folder_whose_name_leaves_no_room_for_another(case, tmp_path):
    source, folder = case
    long = folder.rename(tmp_path / ("x" * 255))
    assert source.opened(long).draft.config == source.opened().draft.config


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "b/a.safetensors", "", ".."])
def test_an_index_that_lists_files_elsewhere(case, name):
    (case[1] / "model.safetensors").rename(case[1] / "a.safetensors")
    (case[1] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": name}}))
    refused(case, "index.json", repr(name))


def test_rotary_settings_that_disagree_are_told(good, tmp_path):
    source = next(source for source in good if source.name == "specforge-0.2.0-rope-yarn")
    shutil.copytree(source.folder, tmp_path / "draft")
    rewritten("config.json", ("rope_scaling", "factor"), 2.0)(tmp_path / "draft")
    opened = source.opened(tmp_path / "draft")
    assert opened.draft.config.rope_parameters["factor"] == 2.0
    assert any("disagree; factor 2.0 was taken" in note for note in opened.meta["notes"])


@pytest.mark.parametrize("value", [0, "", [], False, "yarn", [1]])
def test_rotary_settings_that_are_no_object(case, value):
    rewritten("config.json", ("transformer_layer_config", "rope_scaling"), value)(case[1])
    refused(case, "rope_scaling", "an object")


def test_a_layer_behind_a_gap_is_extra_whoever_wrote_it(case):
    state = load_file(case[1] / "model.safetensors")
    save_file(state | {"layers.7.mlp.up_proj.weight": torch.ones(2, 2)}, case[1] / "model.safetensors")
    refused(case, "extra layers.7.mlp.up_proj.weight")


def test_a_short_map_of_the_full_vocabulary(tmp_path):
    shutil.copytree(TRAINERS / "speculators-0.9.0-default" / "checkpoint", tmp_path / "draft")
    facts = read_facts(str(TRAINERS / "target"), tokenizer=False)
    state = load_file(tmp_path / "draft" / "model.safetensors")
    save_file(state | {"d2t": torch.zeros(40, dtype=torch.int64)}, tmp_path / "draft" / "model.safetensors")
    with pytest.raises(UserError, match="d2t"):
        open_checkpoint(tmp_path / "draft", facts)


# -- the own format ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 1 << 40),
        ("hidden_size", 1 << 62),
        ("low_rank", 1 << 62),
        ("max_position_embeddings", 1 << 62),
        ("balance", float("nan")),
        ("balance", "0.1"),
        ("balance", -1.0),
        ("low_rank_alpha", -1.0),
        ("low_rank_alpha", []),
        ("rope_parameters", {"rope_type": "default", "rope_theta": [10000.0]}),
        ("rope_parameters", {**YARN, "original_max_position_embeddings": None}),
        ("rope_parameters", {**YARN, "original_max_position_embeddings": [64]}),
        ("rope_parameters", {**YARN, "original_max_position_embeddings": True}),
    ],
)
def test_sizes_and_numbers_beyond_all_drafts_are_refused_before_anything_is_built(tmp_path, field, value):
    shutil.copytree(ARTIFACTS / "schema1" / "draft", tmp_path / "draft")
    rewritten("redraft.json", ("config", field), value)(tmp_path / "draft")
    with pytest.raises(UserError, match=field):
        load_draft(tmp_path / "draft")


@pytest.mark.parametrize("field", ["rope_parameters", "rms_norm_eps", "max_position_embeddings", "norm_output"])
def test_a_record_without_what_every_file_has_is_damaged(tmp_path, field):
    shutil.copytree(ARTIFACTS / "schema1" / "draft", tmp_path / "draft")
    rewritten("redraft.json", ("config", field), GONE)(tmp_path / "draft")
    with pytest.raises(UserError, match=f"lacks {field}"):
        load_draft(tmp_path / "draft")


def test_a_private_part_that_describes_another_draft_than_its_base(tmp_path):
    base, meta = load_draft(ARTIFACTS / "schema1" / "draft")
    for path, value, words in (
        (("config", "norm_before_fc"), False, "no input_norm.weight"),
        (("tensors",), ["fc.weight", "no.such"], "no no.such"),
    ):
        place = tmp_path / path[-1]
        shutil.copytree(ARTIFACTS / "schema1" / "private", place)
        rewritten("redraft.json", path, value)(place)
        with pytest.raises(UserError, match=words):
            load_private(place, base, meta["content_hash"])


def test_an_empty_record_and_one_too_deep(tmp_path):
    (tmp_path / "redraft.json").write_text("{}")
    with pytest.raises(UserError, match="redraft.json is an empty object"):
        open_checkpoint(tmp_path)
    (tmp_path / "redraft.json").write_text(dumped({"schema": 1, "kind": DEEP}))
    with pytest.raises(UserError, match="redraft.json"):
        open_checkpoint(tmp_path)


# -- language models ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("head_dim",), 0),
        (("num_key_value_heads",), 1 << 62),
        (("rms_norm_eps",), float("nan")),
        (("rope_parameters", "rope_theta"), -1),
        (("rope_parameters", "rope_theta"), {"a": 1}),
        (("rope_parameters", "rope_type"), "banana"),
        (("rope_parameters",), "yarn"),
    ],
)
def test_a_language_models_values_are_refused_by_name(tmp_path, path, value):
    shutil.copytree(ARTIFACTS / "run" / "target", tmp_path / "draft")
    rewritten("config.json", path, value)(tmp_path / "draft")
    with pytest.raises(UserError, match=path[-1]):
        open_checkpoint(tmp_path / "draft")
