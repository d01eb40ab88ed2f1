"""Budgets, the selection rule and its manifest."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from redraft.errors import UserError
from redraft.selection import ScoringContext, score_rows, scored_ids, scored_tokens
from redraft.selection.manifest import choose, file_hash, read_manifest, select
from redraft.selection.random_ import Random
from redraft.selection.rejection import Rejection
from redraft.settings.texts import parse_budget, parse_scorer, scorer_text


@dataclass(frozen=True)
class Sample:
    key: str
    prompt_ids: tuple[int, ...] = (1, 2)
    response_ids: tuple[int, ...] = (3, 4, 5)


ROWS = [Sample(f"r{i}", response_ids=tuple(range(10 * (i + 1)))) for i in range(5)]  # 10, 20, 30, 40, 50 tokens
SCORES = [0.3, 0.9, 0.1, 0.9, 0.5]  # best first: r1, r3 (equal, by key), r4, r0, r2


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("25%", "fraction", 0.25),
        ("12.5 %", "fraction", 0.125),
        ("100%", "fraction", 1),
        ("0.25", "fraction", 0.25),
        (".5", "fraction", 0.5),
        ("1.0", "fraction", 1),
        ("1", "rows", 1),
        ("400", "rows", 400),
        (" 4k ", "rows", 4000),
        ("400 rows", "rows", 400),
        ("60000 tokens", "tokens", 60_000),
        ("60,000 tokens", "tokens", 60_000),
        ("60k tokens", "tokens", 60_000),
        ("1.5M tokens", "tokens", 1_500_000),
        ("1 token", "tokens", 1),
    ],
)
def test_budget_forms(text: str, kind: str, amount: float) -> None:
    budget = parse_budget(text)
    assert (budget.kind, float(budget.amount)) == (kind, amount)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not understood"),
        ("many", "not understood"),
        ("-5", "not understood"),
        ("1e3", "not understood"),
        ("25 percent", "not understood"),
        ("nan", "not understood"),
        ("0", "selects nothing"),
        ("0%", "selects nothing"),
        ("0.0", "selects nothing"),
        ("0 tokens", "selects nothing"),
        ("101%", "more than everything"),
        ("1.5", "more than everything"),
        ("5k%", "more than everything"),
        ("2.5 tokens", "not a whole number"),
        ("0.5 rows", "not a whole number"),
    ],
)
def test_bad_budgets_are_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_budget(text)
    assert "\n" not in str(caught.value) and "60k tokens" in str(caught.value)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("2", ["r1", "r3"]),
        ("40%", ["r1", "r3"]),
        ("0.79", ["r1", "r3", "r4"]),  # 3.95 rows: rounded down, never over the budget
        ("99", ["r1", "r3", "r4", "r0", "r2"]),
        ("60 tokens", ["r1", "r3"]),
        ("109 tokens", ["r1", "r3"]),
        ("110 tokens", ["r1", "r3", "r4"]),
        ("9k tokens", ["r1", "r3", "r4", "r0", "r2"]),
    ],
)
def test_takes_from_the_top_until_the_budget_is_used(budget: str, expected: list[str]) -> None:
    assert select(ROWS, SCORES, budget).selected_keys == expected


def test_shares_are_exact() -> None:
    rows = [Sample(str(i)) for i in range(100)]
    assert len(select(rows, [0.0] * 100, "0.29").selected_keys) == 29  # 0.29 * 100 is below 29 in binary


def test_lowest_order_and_row_order() -> None:
    assert select(ROWS, SCORES, "2", "lowest").selected_keys == ["r2", "r0"]
    together = list(zip(ROWS, SCORES, strict=True))
    random.Random(1).shuffle(together)
    rows, scores = zip(*together, strict=True)
    assert select(rows, scores, "3").entries[0] == select(ROWS, SCORES, "3").entries[0]
    assert select(rows, scores, "3").to_dict() == select(ROWS, SCORES, "3").to_dict()
    with pytest.raises(UserError, match="choose highest or lowest"):
        select(ROWS, SCORES, "2", "best")  # type: ignore[arg-type]


def test_a_budget_that_selects_nothing_of_these_rows_is_refused() -> None:
    with pytest.raises(UserError, match="first row alone has 20 tokens"):
        select(ROWS, SCORES, "19 tokens")
    with pytest.raises(UserError, match="selects nothing of 5 rows"):
        select(ROWS, SCORES, "10%")
    with pytest.raises(UserError, match="no rows"):
        select([], [], "10%")


def test_scores_without_a_rank_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        select(ROWS, [0.1, 0.2, float("nan"), 0.3, 0.4], "2")
    with pytest.raises(ValueError):
        select(ROWS, SCORES[:-1], "2")


def test_prompts_alone_count_their_own_tokens() -> None:
    prompt = Sample("p", prompt_ids=(7, 8, 9, 10), response_ids=())
    assert scored_tokens(prompt) == 4 and scored_ids(prompt) == ([7, 8, 9, 10], 0)
    assert scored_ids(Sample("a")) == ([1, 2, 3, 4, 5], 2)


def test_manifest_says_every_score_and_why(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("data\n")
    made = select(ROWS, SCORES, "60 tokens", scorer="shift", settings={"metric": "l2"}, source=source)
    made.write(tmp_path / "deep" / "manifest.json")
    assert read_manifest(tmp_path / "deep" / "manifest.json") == made
    stored = json.loads((tmp_path / "deep" / "manifest.json").read_text())
    assert [(e["key"], e["score"], e["rank"], e["selected"]) for e in stored["entries"]] == [
        ("r1", 0.9, 1, True),
        ("r3", 0.9, 2, True),
        ("r4", 0.5, 3, False),
        ("r0", 0.3, 4, False),
        ("r2", 0.1, 5, False),
    ]
    reasons = [e["reason"] for e in stored["entries"]]
    assert reasons[0] == "rank 1 of 5, within the budget of 60 tokens (2 rows)"
    assert reasons[2] == "rank 3 of 5, would bring the selection to 110 tokens, over the budget of 60 tokens"
    assert reasons[3] == "rank 4 of 5, after the budget of 60 tokens was used up (2 rows)"
    assert stored["totals"] == {"rows": 5, "tokens": 150, "selected_rows": 2, "selected_tokens": 60}
    assert (stored["scorer"], stored["settings"], stored["order"]) == ("shift", {"metric": "l2"}, "highest")
    assert stored["budget"] == {"text": "60 tokens", "kind": "tokens", "amount": 60.0}
    assert stored["source_sha256"] == file_hash(source)


def test_manifest_applies_to_its_own_data_only(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("data\n")
    made = select(ROWS, SCORES, "2", source=source)
    assert [row.key for row in made.apply(ROWS)] == ["r1", "r3"]
    assert [row.key for row in made.apply(ROWS[::-1])] == ["r3", "r1"]
    with pytest.raises(UserError, match="1 selected rows are not in the data, first r1"):
        made.apply(ROWS[2:])
    made.check_source(source)
    source.write_text("other\n")
    with pytest.raises(UserError, match="not the file"):
        made.check_source(source)
    with pytest.raises(UserError, match="gone does not exist"):
        made.check_source(tmp_path / "gone")


def test_damaged_manifests_are_named(tmp_path: Path) -> None:
    path, good = tmp_path / "manifest.json", select(ROWS, SCORES, "2").to_dict()
    entries = good["entries"]
    damaged = [
        {"schema": "other"},
        {k: v for k, v in good.items() if k != "order"},
        good | {"entries": [{k: v for k, v in entries[0].items() if k != "score"}, *entries[1:]]},
        good | {"entries": [*entries[:2], *entries[3:]]},
        good | {"entries": [entries[0] | {"selected": "yes"}, *entries[1:]]},
        good | {"entries": [entries[0] | {"score": None}, *entries[1:]]},
        good | {"entries": 3},
    ]
    for content in damaged:
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match="manifest.json"):
            read_manifest(path)


def test_random_depends_on_seed_and_key_alone_and_is_even() -> None:
    rows = [Sample(f"row {i}") for i in range(2000)]
    scores = Random().score(rows, ScoringContext(seed=1))
    assert all(0 <= score < 1 for score in scores)
    assert Random().score(rows[7:8], ScoringContext(seed=1)) == scores[7:8]
    other = Random().score(rows, ScoringContext(seed=2))
    assert parse_scorer("random:seed=2").score(rows, ScoringContext(seed=1)) == other
    assert sum(a > b for a, b in zip(scores, other, strict=True)) in range(900, 1101)
    assert [sum(i / 4 <= s < (i + 1) / 4 for s in scores) for i in range(4)] == pytest.approx([500] * 4, abs=80)


def test_notes_follow_the_reason() -> None:
    made = select(ROWS, SCORES, "2", notes=["liked", None, "odd", None, None])
    reasons = {entry.key: entry.reason for entry in made.entries}
    assert reasons["r0"] == "rank 4 of 5, after the budget of 2 was used up (2 rows); liked"
    assert reasons["r1"] == "rank 1 of 5, within the budget of 2 (2 rows)"


def test_choose_refuses_before_it_scores() -> None:
    for budget, order, message in (("lots", "highest", "not understood"), ("2", "best", "highest or lowest")):
        with pytest.raises(UserError, match=message):
            choose(Broken(), ROWS, ScoringContext(), budget, order)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown scorer ''"),
        ("shiff", "did you mean shift"),
        ("shiff:metric=l2", "did you mean shift"),
        ("shift:metric", "not understood; write NAME"),
        ("shift:", "not understood; write NAME"),
        ("shift:metric=", "not understood"),
        ("shift:metric=l2,", "not understood"),
        ("shift:metrik=l2", "no setting 'metrik' (did you mean metric?); choose from: metric, layer, pooling"),
        ("shift:metric=l1", "unknown shift metric 'l1'"),
        ("shift:layer=top", "unknown layer 'top'"),
        ("shift:layer=1.5", "unknown layer '1.5'"),
        ("shift:metric=l2,metric=l2", "sets metric twice"),
        ("length:longest=3", "no setting 'longest'; it has no settings"),
        ("random:seed=x", "seed must be a whole number, not 'x'"),
        ("coverage:diversity=much", "coverage: diversity must be a number, not 'much'"),
        ("coverage:diversity=1.5", "between 0 and 1, not 1.5"),
        ("coverage:diversity=nan", "diversity must be a number, not 'nan'"),
        ("coverage:base=nothing", "unknown scorer 'nothing'"),
        ("coverage:base=coverage", "choose another scorer"),
        ("coverage:base.metric=l2", "scorer rejection has no setting 'metric'"),
        ("coverage:other.metric=l2", "scorer coverage has no setting 'other.metric'"),
        ("shift:memory_bytes=much", "memory_bytes must be a whole number"),
    ],
)
def test_bad_scorers_are_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        parse_scorer(text)
    assert "\n" not in str(caught.value)


def test_scorers_as_text() -> None:
    assert parse_scorer(" shift : metric = l2 , layer = 3 ").settings == {"metric": "l2", "layer": 3, "pooling": "mean"}
    assert scorer_text(parse_scorer("shift:metric=mahalanobis,layer=final")) == "shift"
    inner = parse_scorer("coverage:base.metric=l2,diversity=0.25,base=shift,base.layer=4")
    assert inner.settings == {"base": "shift:metric=l2,layer=4", "diversity": 0.25, "layer": "final"}
    assert scorer_text(inner) == "coverage:base=shift,base.metric=l2,base.layer=4,diversity=0.25"
    assert parse_scorer("coverage:diversity=1").settings["diversity"] == 1.0


def test_rejection_is_one_minus_alpha_and_checks_it() -> None:
    context = ScoringContext(alpha_of=lambda rows: [0.2, 1.0, 0.0, 0.75, 0.5])
    assert score_rows(Rejection(), ROWS, context) == pytest.approx([0.8, 0.0, 1.0, 0.25, 0.5])
    with pytest.raises(ValueError, match="between 0 and 1"):
        Rejection().score(ROWS, ScoringContext(alpha_of=lambda rows: [1.5] * 5))
    with pytest.raises(ValueError):
        Rejection().score(ROWS, ScoringContext(alpha_of=lambda rows: [0.5]))
    with pytest.raises(UserError, match="NaN"):
        score_rows(Broken(), ROWS, ScoringContext())


def test_rejection_of_prompts_reads_them_as_forced() -> None:
    prompts = [Sample("a", (7, 8, 9, 10), ()), Sample("b", (7, 8), ()), Sample("c", (7,), ()), Sample("d")]
    asked: list[tuple[str, list[int], list[int]]] = []

    def alpha_of(rows: Sequence[Sample]) -> list[float]:
        asked.extend((row.key, list(row.prompt_ids), list(row.response_ids)) for row in rows)
        return [0.25, 0.5]

    # What leaves the draft nothing to guess is not asked for and was not rejected.
    assert score_rows(Rejection(), prompts, ScoringContext(alpha_of=alpha_of)) == [0.75, 0.0, 0.0, 0.5]
    assert asked == [("a", [7], [8, 9, 10]), ("d", [1, 2], [3, 4, 5])]
    assert score_rows(Rejection(), prompts[1:3], ScoringContext(alpha_of=alpha_of)) == [0.0, 0.0]


class Broken(Random):
    def score(self, rows: object, context: ScoringContext) -> list[float]:
        return [float("nan")] * 5
