"""What the check says beside the likeliest cause, and what is told of a draft or refused before it is measured."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import redraft as api
from redraft.adaptation.check import static
from redraft.adaptation.check.rounds import Round, Rounds
from redraft.adaptation.check.verdict import Reference, poorer
from redraft.adaptation.models import open_draft
from redraft.drafts.formats.base import exported_as
from redraft.drafts.opening import open_checkpoint
from redraft.errors import UserError
from redraft.registries import EXPORTERS
from redraft.reports.card import CardFacts, model_card, write_card
from redraft.reports.tables import Imported
from redraft.shown import value_words
from redraft.starts.vocabulary import Coverage

RIG = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("check_rig.py"))))
TARGET = str(RIG.PAIR / "target")


@pytest.fixture(scope="module")
def target() -> Any:
    return RIG.model("target")


def exported(format: str, folder: Path, target: Any, name: str = "stale") -> Path:
    EXPORTERS.get(format)(RIG.draft_of(name, target), folder, target.facts)
    return folder


# -- causes beside each other ----------------------------------------------------------------------------------------
def rounds(accepted: int) -> Rounds:
    return Rounds(4, {str(key): [Round(at, accepted) for at in range(20)] for key in range(12)})


def covered(cap: float) -> Coverage:
    return Coverage(32, 1000, 0.8, (0.8,), 4, cap, 5.0, ())


@pytest.mark.parametrize(
    ("cap", "causes"),
    [(2.0, ["vocabulary", "stale"]), (4.5, ["stale", "vocabulary"])],
    ids=["the cap explains the gap", "it does not"],
)
def test_a_stale_draft_with_a_small_vocabulary_is_both(cap: float, causes: list[str]) -> None:
    reference = Reference(4.0, "on the base model's own answers", base=rounds(3))
    found = poorer(rounds(1), reference, False, covered(cap))
    assert [one.cause for one in found] == causes


def test_a_vocabulary_is_the_only_cause_where_all_that_was_lost_is_its_cap() -> None:
    record = Reference(4.0, "by its own record", same_target=True)
    # Of the 3 tokens accepted elsewhere a cap of a third leaves no more than the one that is accepted here.
    assert [one.cause for one in poorer(rounds(1), record, True, covered(2.3))] == ["vocabulary"]
    assert [one.cause for one in poorer(rounds(1), record, True, covered(4.5))] == ["other_text", "vocabulary"]
    # A vocabulary that was as small where the draft did well explains nothing.
    same = Reference(4.0, "on the base model's own answers", base=rounds(3), covered=covered(2.0))
    assert [one.cause for one in poorer(rounds(1), same, False, covered(2.0))] == ["stale", "vocabulary"]


def test_an_export_names_whom_it_is_served_with_and_not_who_taught_it(tmp_path: Path, target: Any) -> None:
    folder = exported("vllm", tmp_path / "served", target)
    opened = open_checkpoint(folder, target.facts)
    assert opened.meta["verifier"] is None and not static.claims(opened, target)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == target.name
    path.write_text(json.dumps(config | {"speculators_version": "0.9.0"}))  # as the trainer itself writes it
    trained = open_checkpoint(folder, target.facts)
    assert trained.meta["verifier"] == target.name and static.claims(trained, target)
    ours = open_checkpoint(RIG.PAIR / "aligned", target)
    assert static.claims(ours, target)
    ours.meta["guard"] = {"kept": "old"}
    assert not static.claims(ours, target)


def test_the_mend_names_the_format_of_the_engine(tmp_path: Path, target: Any) -> None:
    folder = exported("plain", tmp_path / "plain", target)
    opened = open_checkpoint(folder, target.facts)
    engines = ("vllm-0.33", "vllm-0.99", "sglang", "speculators", "specforge", "modelopt", "tensorrt-llm", "llama.cpp")
    formats = ("vllm", "vllm", "sglang", "vllm", "specforge", "tensorrt-llm", "tensorrt-llm", "gguf")
    assert tuple(static.format_for(opened, engine) for engine in engines) == formats
    found = api.check(folder, target, engine="modelopt")
    assert found.cause == "refused" and "--format tensorrt-llm" in found.findings[0].mend
    assert "ModelOpt 0.47 does not load this file" in str(found) and "things otherwise" not in str(found)


def test_a_draft_is_measured_on_a_bfloat16_target() -> None:
    other = api.open_target(TARGET, dtype="bfloat16")
    asked = {"prompts": RIG.ASKS, "limit": 4, "max_new_tokens": 16, "gamma": RIG.GAMMA}
    found = api.check(RIG.PAIR / "aligned", other, **asked)
    assert found.here is not None and found.here["tau"]["value"] > 3 and found.trials


# -- what is no draft for this target --------------------------------------------------------------------------------
def adapter_of(base: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"}))
    return folder


def test_an_adapter_of_the_target_is_no_draft(tmp_path: Path, target: Any) -> None:
    own = adapter_of(RIG.PAIR / "target", tmp_path / "own")
    with pytest.raises(UserError, match="is an adapter of the target itself.*--adapter"):
        open_checkpoint(own, target)
    with pytest.raises(UserError, match="own is an adapter of .*target, where a draft that reads.*--adapter"):
        open_draft(own, target)
    other = adapter_of(RIG.PAIR / "base", tmp_path / "other")
    with pytest.raises(UserError, match="a model of the target's own size"):
        open_checkpoint(other, target)


def test_the_target_as_its_own_draft_is_told(tmp_path: Path, target: Any) -> None:
    assert "is the target itself" in open_checkpoint(TARGET, target).meta["notes"][-1]
    assert not open_checkpoint(RIG.PAIR / "base", target).meta["notes"]
    found = api.import_draft(TARGET, tmp_path / "draft", target=TARGET)  # whose weights are not read: told by place
    assert "is the target itself" in found.notes[-1]
    assert "is the target itself" in str(api.check(tmp_path / "draft", target))


@pytest.mark.parametrize(("guard", "why"), [({"kept": "old"}, "kept the old draft"), (None, "as a whole")])
def test_a_private_part_that_a_run_did_not_write_is_explained(
    guard: Any, why: str, tmp_path: Path, target: Any
) -> None:
    RIG.changed(record=lambda meta: None)(tmp_path / "merged")
    path = tmp_path / "merged" / "redraft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"guard": guard}))
    with pytest.raises(UserError, match=f"private was not written: the run .*{why}.*merged"):
        api.merge(str(tmp_path / "private"), str(RIG.PAIR / "aligned"), tmp_path / "out")


# -- what is written over what ---------------------------------------------------------------------------------------
def test_an_export_replaces_only_one_of_its_own_format(tmp_path: Path, target: Any) -> None:
    folder = exported("plain", tmp_path / "out", target)
    before = (folder / "model.safetensors").read_bytes()
    for other in ("vllm", "sglang", "specforge"):
        with pytest.raises(UserError, match="was exported as plain; name a new or empty folder"):
            exported(other, folder, target)
    assert (folder / "model.safetensors").read_bytes() == before
    assert exported_as(exported("plain", folder, target, "aligned")) == "plain"
    assert (folder / "model.safetensors").read_bytes() != before


def test_exports_of_older_versions_are_told_by_card_or_config(tmp_path: Path, target: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = exported("plain", tmp_path / "out", target)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert exported_as(folder) is None
    with pytest.raises(UserError, match="no vllm export"):
        exported("vllm", folder, target)
    write_card(folder, CardFacts(family="eagle3", format="sglang"))
    assert exported_as(folder) == "sglang"
    with pytest.raises(UserError, match="exported as sglang"):
        exported("plain", folder, target)
    (folder / "README.md").unlink()
    exported("plain", folder, target)


def test_a_draft_does_not_replace_a_private_part(tmp_path: Path) -> None:
    folder = RIG.changed()(tmp_path / "out")
    RIG.changed()(folder)  # one of the same kind may
    path = folder / "redraft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": "private"}))
    with pytest.raises(UserError, match="holds a private part"):
        RIG.changed()(folder)


# -- words -----------------------------------------------------------------------------------------------------------
def test_values_are_shown_in_words() -> None:
    values = [False, None, (), (2, 3), 500.0, {"rope_theta": 1e4, "rope_type": "default"}]
    assert [*map(value_words, values)] == [
        "false",
        "none",
        "none",
        "2, 3",
        "500",
        "rope_theta 10000, rope_type default",
    ]
    entries = [{"what": "fc_norm", "value": False, "how": "read", "word": "config.json"}]
    shown = str(Imported(Path("out"), "source", "eagle3", "plain", 1, 2, tuple(entries)))
    assert "false" in shown and "False" not in shown


def test_a_card_says_what_its_command_does_and_for_which_model_the_draft_was_made() -> None:
    known = {"family": "eagle3", "target": "new", "serve": ["go"]}
    card = model_card(CardFacts(format="specforge", trains=True, made_for="old", made_for_hash="0123", **known))
    assert "## How to go on training it" in card and "How to serve it" not in card
    assert "Made for another model: `old` (content hash `0123`)" in card
    card = model_card(CardFacts(format="vllm", **known))
    assert "## How to serve it" in card and "Made for" not in card
