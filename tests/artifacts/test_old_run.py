"""A run directory and its results that an earlier version wrote: they are gone on with, and say the same."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from redraft.adaptation.core import Adaptation, Verdict

HERE = Path(__file__).parent


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the artifact, and its folder as the working directory: settings name files from there."""
    folder = tmp_path / "old"
    shutil.copytree(HERE / "run", folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def unjudged(monkeypatch):
    """The new draft is taken as it is, as it was when the artifact was written, for what training made is looked at."""
    taken = Verdict(old=1.0, new=2.0, gamma=3, prompts=1, kept="new")
    monkeypatch.setattr(Adaptation, "judge", lambda self, heldout, tie="old": taken)


def again(redraft) -> tuple[int, str, str]:
    words = runpy.run_path(str(HERE / "make_run.py"))["command"]()
    return redraft(" ".join(words[3:]))


def test_a_finished_run_is_read_and_its_page_written_anew(old, redraft):
    before = (old / "run" / "bench.json").read_bytes()
    code, said, error = again(redraft)
    assert code == 0, error
    assert (old / "run" / "bench.json").read_bytes() == before
    assert (old / "run" / "report.html").stat().st_size > 10_000


def test_a_run_whose_drafts_are_gone_gives_the_same_ones_from_its_checkpoint(old, redraft, unjudged):
    kept = {name: load_file(old / "run" / name) for name in ("merged/draft.safetensors", "private/private.safetensors")}
    bench, curve = (json.loads((old / "run" / name).read_text()) for name in ("bench.json", "train.json"))
    for name in ("merged", "private", "export-vllm"):
        shutil.rmtree(old / "run" / name)
    for name in ("bench.json", "train.json"):
        (old / "run" / name).unlink()
    code, said, error = again(redraft)
    assert code == 0, error
    for name, tensors in kept.items():
        found = load_file(old / "run" / name)
        assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert json.loads((old / "run" / "train.json").read_text())["history"] == curve["history"]
    now = json.loads((old / "run" / "bench.json").read_text())
    for name, draft in bench["drafts"].items():
        assert now["drafts"][name]["tau_pooled"] == draft["tau_pooled"]


def test_an_older_runs_draft_is_judged_too(old, redraft):
    """It is no better than the old draft on its held-out answers, so that the old draft is what comes out now.

    The run was stopped between its private part and its merged draft: the part, which is not kept, does not stay.
    """
    for name in ("merged", "export-vllm"):
        shutil.rmtree(old / "run" / name)
    for name in ("bench.json", "train.json"):
        (old / "run" / name).unlink()
    code, said, error = again(redraft)
    assert code == 0 and "the old draft is kept" in said, error
    guard = json.loads((old / "run" / "merged" / "redraft.json").read_text())["guard"]
    assert guard["new"] <= guard["old"] and guard["kept"] == "old" and not (old / "run" / "private").exists()


def test_other_settings_are_refused_by_name(old, redraft):
    words = runpy.run_path(str(HERE / "make_run.py"))["command"]()
    code, _, error = redraft(" ".join(words[3:]) + " --max-new-tokens 17")
    assert code == 2 and "max_new_tokens" in error


def test_a_training_that_was_cut_off_goes_on_to_the_same_curve(old, redraft, unjudged):
    """With the checkpoint of no step at all: everything but the training is found, and training ends as it did."""
    curve = json.loads((old / "run" / "train.json").read_text())
    merged = load_file(old / "run" / "merged" / "draft.safetensors")
    for name in ("merged", "private", "export-vllm", "train"):
        shutil.rmtree(old / "run" / name)
    for name in ("bench.json", "train.json"):
        (old / "run" / name).unlink()
    code, said, error = again(redraft)
    assert code == 0, error
    now = json.loads((old / "run" / "train.json").read_text())
    for (step, tau), (before, was) in zip(now["history"], curve["history"], strict=True):
        assert step == before and tau == pytest.approx(was, abs=0.06)
    for name, tensor in load_file(old / "run" / "merged" / "draft.safetensors").items():
        torch.testing.assert_close(tensor.float(), merged[name].float(), atol=2e-2, rtol=2e-2)


def test_a_run_directory_is_no_draft_but_says_where_one_is(old, redraft):
    code, _, error = redraft("bench --target target --draft run --prompts prompts.jsonl --out b.json")
    assert code == 2 and "run is a run directory; its draft is run/merged" in error
