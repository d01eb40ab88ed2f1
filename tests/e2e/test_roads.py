"""``redraft adapt`` by its other roads: served traffic, self-written questions, starts, general text, replay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.adaptation import sources
from redraft.adaptation.adapt import AdaptRun
from redraft.adaptation.claim import claim_run
from redraft.artifact import tensors_hash
from redraft.data.prompts import read_conversations
from redraft.data.selfprompts import SelfPromptReport
from redraft.data.store import read_rows
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.drafts.files import load_draft, load_private, save_draft
from redraft.errors import UserError
from redraft.selection.manifest import read_manifest
from redraft.settings.runs import AdaptConfig


def settings(world: Path, out: Path, **changes: Any) -> AdaptConfig:
    values: dict[str, Any] = {
        "target": str(world / "target"),
        "draft": str(world / "draft"),
        "prompts": str(world / "prompts.jsonl"),
        "out": out,
        "dtype": "float32",
        "max_new_tokens": 16,
        "bench_tokens": 8,
        "bench_prompts": 2,
        "heldout_prompts": 6,
        "batch_size": 8,
        "rank": 4,
        "gamma": 3,
        "train": {"epochs": 1, "batch_anchors": 128},
        "exports": (),
    }
    return AdaptConfig(**values | changes)


def quiet(text: str) -> None:
    """Say nothing."""


def stages(run: AdaptRun) -> dict[str, Any]:
    return {entry["stage"]: entry for entry in run.ledger.to_dict()["stages"]}


def test_served_traffic_stands_in_for_generation(world, tmp_path):
    log = tmp_path / "served.jsonl"
    asked = read_conversations(str(world / "prompts.jsonl"))
    answer = {"role": "assistant", "content": "three pears cost ten and there are two boxes"}
    log.write_text("".join(json.dumps({"messages": [*c.messages, answer]}) + "\n" for c in asked))
    run = AdaptRun(settings(world, tmp_path / "run", prompts=None, responses=str(log)), quiet)
    result = run.run()
    found = stages(run)
    assert found["served traffic"]["tokens"] == 0 and not {"regenerate", "regenerate held-out"} & found.keys()
    trained, heldout = (list(read_rows(path)) for path in (run.source.responses, run.source.heldout))
    assert {row.source for row in [*trained, *heldout]} == {"traffic"}
    assert len(trained) + len(heldout) + 2 == len(asked)
    assert result["setup"]["prompts"] == 2
    # On resuming, the evaluation prompts come from the log again.
    (run.folder / "bench.json").unlink()
    again = AdaptRun(run.config, quiet).bench()
    assert [p["id"] for p in again["per_prompt"]] == [p["id"] for p in result["per_prompt"]]


def test_questions_of_the_target_itself_starts_general_text_and_replay(world, tmp_path, monkeypatch):
    general = tmp_path / "general.jsonl"
    first = AdaptRun(settings(world, tmp_path / "first"), quiet)
    first.source.write()
    text = first.source.responses.read_text()
    asked = []

    def made_up(target: Any, count: int, seed: int, path: Path, **rest: Any) -> Any:
        asked.append((count, path))
        return read_conversations(str(world / "prompts.jsonl")), SelfPromptReport(draws=50, new=50, tokens=700)

    monkeypatch.setattr(sources, "self_prompts", made_up)
    general.write_text(text)
    run = AdaptRun(
        settings(
            world,
            tmp_path / "run",
            prompts="self:40",
            seed=1,
            replay=1,
            private={"alpha": 8.0},
            train={"epochs": 1, "batch_anchors": 128, "learning_rate": 1e-4},
        ),
        quiet,
    )
    run.run()
    assert asked == [(40, run.folder / "self-prompts.jsonl")]
    found = stages(run)
    assert found["self-prompts"]["tokens"] == 700 and "start vocabulary" in found
    assert (run.folder / "replay").is_dir()
    mixed = AdaptRun(settings(world, tmp_path / "mixed", general=str(general), general_share=0.3), quiet)
    mixed.source.write()
    with pytest.raises(UserError, match="both"):
        mixed.training_rows()


@pytest.mark.parametrize("scorer", ["rejection", "length"])
def test_prompts_are_chosen_before_any_is_answered(world, tmp_path, scorer):
    run = AdaptRun(settings(world, tmp_path / "run", select_on="prompts", scorer=scorer, budget="50%"), quiet)
    run.run()
    kept = {entry.key for entry in read_manifest(run.folder / "selection.json").entries if entry.selected}
    whole, found = len(run.source.prompts[0]), stages(run)
    assert len(kept) == whole // 2
    rows = list(read_rows(run.source.responses))
    assert {row.id for row in rows} == kept and len(run.training_rows()) == len(run.responses())
    tokens = sum(len(row.prompt_ids) for row in rows)
    # What is scored are prompts, twice as many as are answered; a pass of the target where acceptance is asked for.
    assert found["select"]["tokens"] > tokens and (found["select"]["flops"] > 0) == (scorer == "rejection")
    # A run that is stopped in generation goes on with the same prompts.
    run.source.responses.write_bytes(run.source.responses.read_bytes().split(b"\n")[0] + b"\n")
    again = AdaptRun(run.config, quiet)
    again.run()
    assert sorted(row.id for row in read_rows(again.source.responses)) == sorted(kept)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": None}, "one of the two"),
        ({"prompts": None, "responses": "log.jsonl", "select_on": "prompts"}, "leave it out"),
        ({"select_on": "prompts"}, "nothing to choose"),
        ({"scorer": "entropy"}, "give --budget"),
        ({"select_on": "answers"}, "select-on must be 'responses' or 'prompts'"),
        ({"responses": "log.jsonl"}, "one of the two"),
        ({"prompts": None, "responses": "log.jsonl", "server": "http://127.0.0.1:1"}, "go with --prompts"),
        ({"prompts": "self:none"}, "write self:400"),
        ({"general": "text.jsonl"}, "go together"),
        ({"start": "ridges"}, "ridges"),
        ({"scorer": "coverage:base=nobody"}, "nobody"),
        ({"private": {"ranks": 3}}, "unknown setting ranks .did you mean rank.. in private"),
        ({"method": "eda-moe", "exports": ("vllm",)}, "cannot be merged"),
        ({"private": {"bits": 2}}, "not for lora"),
        ({"method": "full", "private": {"bits": 0}}, "private bits must be 1 or more, not 0"),
        ({"exports": ("vlm",)}, "did you mean vllm"),
        ({"exports": ("hf",)}, "no language model, which hf is for"),
        ({"train": {"optimizer": "sgd"}}, "unknown optimizer"),
        ({"train": {"clip": -1}}, "clip must be above 0"),
        ({"private": {"alpha": -1}}, "private alpha must be above 0, not -1"),
        ({"method": "eda-moe", "private": {"active": 9}}, "9 active of 4 private experts"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, words, world, tmp_path):
    with pytest.raises(UserError, match=words):
        AdaptRun(settings(world, tmp_path / "run", **changes), quiet).run()


@pytest.mark.parametrize(
    ("name", "option"),
    [("sglang", {"norm_before_residual": True}), ("vllm", {"norm_before_fc": True, "fc_norm": True})],
)
def test_a_draft_that_an_engine_cannot_take_is_refused_before_anything_is_spent(world, tmp_path, name, option):
    draft, meta = load_draft(world / "draft")
    other = Eagle3Draft(replace(draft.config, **option), draft.vocabulary())
    save_draft(tmp_path / "other", other, {key: meta[key] for key in ("target", "tokenizer_hash")})
    run = AdaptRun(settings(world, tmp_path / "run", draft=str(tmp_path / "other"), exports=(name,)), quiet)
    with pytest.raises(UserError, match="SGLang cannot run this draft|exclude each other in every engine"):
        run.run()
    assert [path.name for path in run.folder.iterdir()] == ["config.json"] and stages(run) == {}


def test_a_run_directory_from_before_a_setting_existed_goes_on(world, tmp_path):
    config = settings(world, tmp_path / "run")
    claim_run(config)
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    del stored["seal"]  # nor was there one then
    before = {k: v for k, v in stored.items() if k not in ("start", "replay", "private")}
    before["train"] = {k: v for k, v in stored["train"].items() if k != "warmup"} | {"setting_of_old": 3}
    path.write_text(json.dumps(before))
    claim_run(config)
    again = {"exports": ("vllm",), "train": {**config.train, "save_seconds": 60}}
    claim_run(settings(world, tmp_path / "run", **again))  # neither changes what is trained
    (tmp_path / "run" / "responses.jsonl").touch()
    with pytest.raises(UserError, match="another train clip; give"):
        claim_run(settings(world, tmp_path / "run", train={**config.train, "clip": 2}))
    with pytest.raises(UserError, match="another start"):
        claim_run(settings(world, tmp_path / "run", start="none"))


def test_a_run_goes_on_with_other_servers_of_its_target(world, tmp_path):
    one = settings(world, tmp_path / "run", server="http://127.0.0.1:1")
    claim_run(one)
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    del stored["seal"]
    path.write_text(json.dumps(stored | {"server": "http://127.0.0.1:1"}))  # one text, when there was one server
    (tmp_path / "run" / "responses.jsonl").touch()
    kept = path.read_text()
    for given in ("http://127.0.0.1:1", "http://127.0.0.1:1,http://127.0.0.1:2", ("http://127.0.0.1:3",)):
        claim_run(settings(world, tmp_path / "run", server=given))
    claim_run(settings(world, tmp_path / "run", server="http://127.0.0.1:3", server_model="tiny"))
    assert path.read_text() == kept
    with pytest.raises(UserError, match="another server; give"):
        claim_run(settings(world, tmp_path / "run"))


def test_routed_experts_are_adapted_where_no_engine_is_to_load_them(world, tmp_path):
    run = AdaptRun(settings(world, tmp_path / "run", method="eda-moe", private_width=16), quiet)
    run.run()
    assert run.aligned.config.private_experts == 4


def test_full_training_in_two_bits_a_weight_has_a_private_part_that_is_the_merged_draft(world, tmp_path):
    run = AdaptRun(settings(world, tmp_path / "run", method="full", private={"bits": 2}), quiet)
    run.run()
    merged, _ = load_draft(run.folder / "merged")
    base, meta = load_draft(world / "draft")
    joined, part = load_private(run.folder / "private", base, meta["content_hash"])
    assert part["coarse"]["fc.weight"]["bits"] == 2
    assert tensors_hash(joined.to(torch.bfloat16).state_dict()) == tensors_hash(merged.state_dict())
    assert not torch.equal(merged.fc.weight.float(), base.fc.weight.float())
    size = (run.folder / "private" / "private.safetensors").stat().st_size
    assert size < (run.folder / "merged" / "draft.safetensors").stat().st_size / 2


def test_the_old_draft_stays_as_it_is_where_a_start_finds_nothing_to_change(world, tiny_target, tmp_path):
    """A draft of the whole vocabulary has nothing to refresh, and the start gives it back as it is."""
    draft, meta = load_draft(world / "draft")
    target = tiny_target("llama", taps=draft.config.taps)
    whole = fresh_draft(target, range(target.vocab_size), seed=1)
    save_draft(tmp_path / "whole", whole, {key: meta[key] for key in ("target", "tokenizer_hash")})
    changes = {"method": "fc", "train": {"epochs": 2, "batch_anchors": 64, "learning_rate": 0.05, "evaluate_every": 1}}
    run = AdaptRun(settings(world, tmp_path / "run", draft=str(tmp_path / "whole"), **changes), quiet)
    run.source.write()
    result = run.train()
    assert torch.equal(run.stale.draft.fc.weight, whole.fc.weight)
    assert result.best_tau > result.start_tau and not torch.equal(run.job.draft.fc.weight, whole.fc.weight)
