"""Figures of a study from made-up rounds: references, pooling over seeds, scratch, averages, markdown."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from redraft.adaptation.study.figures import derive, mean_of_taus, write_full
from redraft.errors import UserError
from redraft.evaluate.statistics import paired_ratio, paired_recovery, ratio_of_sums
from redraft.reports.study import (
    apart,
    kept_curves,
    label,
    markdown,
    pictures,
    ranged,
    shorter,
    table,
    training_curves,
    width_curves,
)

TOKENS = [30, 20, 40, 10]


def cell(target: str, method: str, rounds: list[float], seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A trained cell with these rounds on both sets."""
    found: dict[str, Any] = {
        "target": target,
        "method": method,
        "data": "own",
        "selection": "none",
        "loss": "kl",
        "start": "none",
        "seed": seed,
        "settings": {},
        "trained_parameters": 10,
        "full_parameters": 100,
        "private_bytes": 20,
        "private_width": 0,
        "kept_rows": 1.0,
        "kept_tokens": 1.0,
        "trained_tokens": 1000,
        "steps": 10,
        "heldout": [[0, 1.0], [5, 1.5], [10, 1.6]],
        "flops": {"generation": 1000, "train": 500},
        "seconds": {"generation": 4.0, "train": 2.0},
        "rounds": {"greedy": rounds, "general": [2 * r for r in rounds]},
    } | changes
    axes = ("target", "method", "data", "selection", "loss", "start", "seed")
    return {"key": " | ".join(str(found[axis]) for axis in axes), **found}


def stale(target: str, rounds: list[float], **changes: Any) -> dict[str, Any]:
    untrained = {"data": "-", "selection": "-", "loss": "-", "kept_rows": None, "kept_tokens": None, "heldout": None}
    empty = {"trained_parameters": 0, "private_bytes": 0, "flops": {}, "seconds": {}, "trained_tokens": 0}
    return cell(target, "none", rounds, **(untrained | empty | changes))


def study(*cells: dict[str, Any], targets: tuple[str, ...] = ("a",), **config: Any) -> dict[str, Any]:
    asked = {"answers_of": "a", "sampler": "greedy", "prompts": ["p", "q", "r", "s"], "tasks": ["x", "x", "y", "y"]}
    facts = {"target": "m", "draft": "d", "data": {}, "sets": {n: {**asked, "tokens": TOKENS} for n in SETS}}
    return {
        "schema": "redraft.study/1",
        "name": "made up",
        "about": "",
        "finished": True,
        "config": {"data": {"own": {}, "other": {}}, "starts": {}, "methods": {}, "selections": {}, "temperature": 1.0}
        | config,
        "setup": {"chain": "chain of 3", "walk": "walk", "budget": "b", "train": {"epochs": 1, "batch_anchors": 8}},
        "targets": {name: copy.deepcopy(facts) for name in targets},
        "cells": list(cells),
    }


SETS = ("greedy", "general")
STALE, FULL = [28.0, 19.0, 35.0, 9.0], [15.0, 10.0, 20.0, 5.0]
FIRST, SECOND = [20.0, 12.0, 25.0, 7.0], [18.0, 14.0, 27.0, 6.0]


def recovered(rounds: list[float], stale: list[float] = STALE, full: list[float] = FULL) -> dict[str, Any]:
    """What of the way from the stale draft's rounds to full training's these rounds have gone."""
    return paired_recovery((TOKENS, rounds), (TOKENS, stale), (TOKENS, full)).to_dict()


def test_seeds_are_pooled_prompt_by_prompt() -> None:
    results = study(stale("a", STALE), cell("a", "full", FULL), cell("a", "fc", FIRST), cell("a", "fc", SECOND, 1))
    found = derive(results)
    row = found["pooled"][-1]
    pooled = ([2 * t for t in TOKENS], [x + y for x, y in zip(FIRST, SECOND, strict=True)])
    assert row["seeds"] == [0, 1]
    assert row["tau"]["greedy"] == ratio_of_sums(*pooled).to_dict()
    assert row["tau_by_seed"] == [100 / sum(FIRST), 100 / sum(SECOND)]
    assert row["recovery"] == paired_recovery(pooled, (TOKENS, STALE), (TOKENS, FULL)).to_dict()
    general = (pooled[0], [2 * r for r in pooled[1]])
    assert row["outside"]["general"] == paired_ratio(general, (TOKENS, [2 * r for r in STALE])).to_dict()
    assert row["tasks"]["y"]["greedy"]["value"] == 100 / sum(FIRST[2:] + SECOND[2:])
    assert row["trained_share"] == 0.1 and row["flops"]["total"] == 1500
    assert set(found["cells"]) == {c["key"] for c in results["cells"]}
    json.dumps(found, allow_nan=False)


def test_recovery_is_held_against_full_on_all_of_the_first_data_and_on_the_same() -> None:
    better = [14.0, 9.0, 18.0, 5.0]
    results = study(
        stale("a", STALE),
        cell("a", "full", FULL),
        cell("a", "full", better, data="other"),
        cell("a", "full", SECOND, loss="tv"),
        cell("a", "fc", FIRST, data="other"),
        cell("a", "fc", FIRST, selection="length@50%"),
    )
    rows = derive(results)["pooled"]
    first, selected = rows[-2], rows[-1]
    assert first["recovery"] == recovered(FIRST)
    assert first["recovery_same_data"] == recovered(FIRST, full=better)
    assert selected["recovery"] == first["recovery"] and selected["recovery_same_data"] is None
    assert rows[3]["recovery_same_data"]["value"] == 1
    # full that gains nothing: there is nothing to recover, and no number says otherwise
    level = derive(study(stale("a", STALE), cell("a", "full", STALE), cell("a", "fc", FIRST)))["pooled"][-1]
    assert level["recovery"] == {"value": None, "low": None, "high": None}


def test_another_draft_has_its_own_stale_and_full() -> None:
    started = {"start": "one"}
    results = study(
        stale("a", STALE),
        cell("a", "full", FULL),
        stale("a", FIRST, **started),
        cell("a", "full", [10.0, 6.0, 14.0, 4.0], **started),
        cell("a", "fc", SECOND, **started),
        cell("a", "fc", SECOND, start="ridge"),
        starts={"one": {"draft": "other-draft", "start": "none"}},
    )
    rows = derive(results)["pooled"]
    assert rows[-2]["recovery"] == recovered(SECOND, stale=FIRST, full=[10.0, 6.0, 14.0, 4.0])
    assert rows[-1]["recovery"] == recovered(SECOND)


def test_scratch_is_read_off_its_own_curve() -> None:
    reached = cell("a", "scratch", SECOND, heldout=[[0, 0.5], [10, 1.7], [20, 1.9]], steps=20, flops={"train": 4000})
    never = {**reached, "heldout": [[0, 0.5], [20, 1.2]]}
    rows = derive(study(stale("a", STALE), reached, cell("a", "fc", FIRST)))["pooled"]
    assert rows[-1]["scratch"] == {"heldout_tau": 1.6, "flops": 2000, "reached": True, "share": 0.75}
    assert "scratch" not in rows[1]
    row = derive(study(stale("a", STALE), never, cell("a", "fc", FIRST)))["pooled"][-1]
    assert not row["scratch"]["reached"] and row["scratch"]["flops"] == 4000


def test_averages_are_over_what_all_targets_have() -> None:
    cells = [
        stale("a", STALE),
        stale("b", FIRST),
        cell("a", "fc", FIRST),
        cell("b", "fc", SECOND),
        cell("a", "x", FULL),
    ]
    rows = derive(study(*cells, targets=("a", "b")))["average"]
    assert [row["method"] for row in rows] == ["none", "fc"]
    assert rows[1]["tau"]["greedy"]["value"] == pytest.approx((100 / sum(FIRST) + 100 / sum(SECOND)) / 2)
    alone = mean_of_taus([(TOKENS, FIRST)])
    assert alone == pytest.approx(ratio_of_sums(TOKENS, FIRST).to_dict())
    assert rows[1]["tau"]["greedy"]["high"] - rows[1]["tau"]["greedy"]["low"] > 0


def test_damaged_results_are_named() -> None:
    with pytest.raises(UserError, match="no results of a study"):
        derive({"schema": "redraft.bench/1"})
    results = study(stale("a", STALE), cell("a", "fc", FIRST[:2]))
    with pytest.raises(UserError, match="lack the rounds of cell a | fc"):
        derive(results)


def test_markdown_and_pictures() -> None:
    wide = [cell("a", f"eda-{w}", FIRST, private_width=w) for w in (64, 128)]
    half = cell("a", "fc", SECOND, selection="length@50%", kept_tokens=0.5, kept_rows=0.5)
    results = study(stale("a", STALE), cell("a", "full", FULL), cell("a", "fc", FIRST), half, *wide)
    found = derive(results)
    text = markdown(results, found)
    assert "| none | 1.10 [" in text and "| fc; own, length@50% |" in text
    assert "Not finished" not in text and "Not finished" in markdown(results | {"finished": False}, found)
    rows = found["pooled"]
    assert kept_curves(results, rows)["fc; own; length"][0][:2] == (0.5, 100 / sum(SECOND))
    assert [p[0] for p in kept_curves(results, rows)["fc; own; length"]] == [0.5, 1.0]
    assert [p[0] for p in width_curves(rows)["eda; own"]] == [64, 128]
    assert training_curves(results, results["cells"])["fc"][0] == (250.0, 1.5, None, None)
    assert set(pictures(results, found)) == {"flops-a.png", "kept-a.png", "width-a.png", "size-a.png"}
    assert label({**rows[2], "loss": "tv", "start": "ridge"}) == "fc; own; loss tv; start ridge"
    assert ranged({"value": None, "low": None, "high": None}) == ranged(None)
    assert table(["a|b"], [["c"]]).startswith("| a\\|b |") and table(["a"], []) == ""


def test_legends_leave_out_what_all_lines_share() -> None:
    names = ["fc; own; start vocabulary", "lora; own; start vocabulary", "scratch; own"]
    assert shorter(names) == (["fc", "lora", "scratch"], "own; start vocabulary")
    mixed = ["fc; own", "fc; reference", "lora; own; start vocabulary"]
    assert shorter(mixed) == (mixed, "") and shorter(["fc; own"]) == (["fc; own"], "")
    # Not where two lines would have one name.
    twice = ["scratch", "scratch; own", "fc; own", "lora; own"]
    assert shorter(twice) == (twice, "")


@pytest.mark.parametrize("logarithmic", [False, True])
def test_intervals_in_one_place_are_drawn_beside_each_other(logarithmic: bool) -> None:
    curves = {
        "a": [(10.0, 2.0, 1.0, 3.0), (40.0, 2.0, 1.0, 3.0)],
        "b": [(40.0, 2.5, 2.0, 3.0)],
        "c": [(20.0, 2.0, None, None)],
    }
    found = apart(curves, logarithmic)
    assert found["a"][0] == curves["a"][0] and found["c"] == curves["c"]
    (left, *rest), (right, *_) = found["a"][1], found["b"][0]
    assert 39 < left < 40 < right < 41 and rest == [2.0, 1.0, 3.0]


def test_recovery_on_the_same_data_is_held_against_full_from_the_same_start_where_that_was_run() -> None:
    strong = [12.0, 8.0, 16.0, 4.0]
    results = study(
        stale("a", STALE),
        cell("a", "full", FULL),
        cell("a", "full", strong, start="vocabulary"),
        cell("a", "fc", FIRST, start="vocabulary"),
        cell("a", "fc", SECOND, start="delta"),
    )
    rows = derive(results)["pooled"]
    started, other = rows[-2], rows[-1]
    assert started["recovery"] == recovered(FIRST)
    assert started["recovery_same_data"] == recovered(FIRST, full=strong)
    assert other["recovery_same_data"] == other["recovery"], "no full from that start: the old draft as it is"


def test_recovery_is_held_against_the_strongest_full_of_several() -> None:
    """``full`` at a learning rate of its own is ``full``; a rate that suits it badly makes no small part look good."""
    better = [14.0, 9.0, 18.0, 5.0]
    results = study(
        stale("a", STALE),
        cell("a", "full", FULL),
        cell("a", "full-slow", better),
        cell("a", "fc", FIRST),
        methods={"full-slow": {"method": "full", "learning_rate": 1e-3}},
    )
    rows = {row["method"]: row for row in derive(results)["pooled"]}
    for name in ("recovery", "recovery_same_data"):
        assert rows["fc"][name] == recovered(FIRST, full=better)
        assert rows["full-slow"][name]["value"] == 1 > rows["full"][name]["value"]


def test_full_training_in_few_bits_is_no_reference() -> None:
    better = [14.0, 9.0, 18.0, 5.0]
    results = study(
        stale("a", STALE),
        cell("a", "full", FULL),
        cell("a", "full-2bit", better, settings={"bits": 2}),
        methods={"full-2bit": {"method": "full", "bits": 2}},
    )
    rows = {row["method"]: row for row in derive(results)["pooled"]}
    assert rows["full"]["recovery"]["value"] == 1 < rows["full-2bit"]["recovery"]["value"]


def test_recovery_of_sampled_text_is_held_against_the_full_that_is_strongest_in_greedy_decoding() -> None:
    def both(found: dict[str, Any], sampled: list[float]) -> dict[str, Any]:
        return found | {"rounds": found["rounds"] | {"sampled": sampled}}

    cells = [
        both(stale("a", STALE), STALE),
        both(cell("a", "full", FULL), SECOND),
        both(cell("a", "full-slow", SECOND), FULL),
        both(cell("a", "fc", SECOND), FIRST),
    ]
    results = study(*cells, methods={"full-slow": {"method": "full"}})
    for facts in results["targets"].values():
        facts["sets"]["sampled"] = facts["sets"]["greedy"]
    rows = {row["method"]: row for row in derive(results)["pooled"]}
    assert rows["fc"]["recovery"] == recovered(SECOND)
    assert rows["fc"]["recovery_sampled"] == recovered(FIRST, full=SECOND)
    assert "recovery_sampled" not in derive(study(stale("a", STALE), cell("a", "fc", FIRST)))["pooled"][1]


def test_the_strongest_full_is_what_a_summary_names(tmp_path: Path) -> None:
    weak, strong = cell("a", "full", FULL), cell("a", "full", [12.0, 8.0, 16.0, 4.0], start="vocabulary")
    results = study(stale("a", STALE), weak | {"rows": 7}, strong | {"rows": 9}, cell("a", "fc", [9.0, 5.0, 9.0, 2.0]))
    results["figures"] = derive(results)
    write_full(results, tmp_path / "full.json", "study made up")
    found = json.loads((tmp_path / "full.json").read_text())
    assert found["tau"] == sum(TOKENS) / 40.0
    assert "9 answers" in found["from"] and "from start vocabulary, measured on 4 others" in found["from"]
    results["figures"]["pooled"] = [row for row in results["figures"]["pooled"] if row["method"] != "full"]
    with pytest.raises(UserError, match="a cell of the method full"):
        write_full(results, tmp_path / "none.json", "study made up")
    assert not (tmp_path / "none.json").exists()
