"""What every registered scorer must keep; a new scorer inherits these tests by being registered."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from redraft.errors import UserError
from redraft.registries import SCORERS
from redraft.selection import Scorer, ScoringContext, score_rows
from redraft.selection.manifest import choose, select
from redraft.settings.texts import parse_scorer, scorer_text
from redraft.target import Target


@dataclass(frozen=True)
class Sample:
    key: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def samples(count: int = 14, responses: bool = True) -> list[Sample]:
    source = random.Random(3)

    def text(longest: int) -> tuple[int, ...]:
        return tuple(source.randrange(4, 128) for _ in range(source.randint(2, longest)))

    return [Sample(f"row-{i:02d}", text(9), text(20) if responses else ()) for i in range(count)]


def alpha_by_tokens(rows: Sequence[Sample]) -> list[float]:
    return [1 / (1 + sum(row.prompt_ids) + sum(row.response_ids)) for row in rows]


@pytest.fixture
def context(tiny_target: Callable[..., Target]) -> ScoringContext:
    base, target = tiny_target(seed=0), tiny_target(seed=0)
    generator = torch.Generator().manual_seed(1)
    for weight in target.model.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return ScoringContext(target=target, base_target=base, alpha_of=alpha_by_tokens, batch_tokens=64, seed=5)


# Every scorer as it comes, and settings that take another way through the code.
VARIANTS = [
    "shift:metric=l2,layer=0,pooling=max",
    "shift:metric=cosine,layer=6,pooling=state",
    "shift:layer=3,pooling=last",
    "coverage:base=length,diversity=0.9,layer=2",
    "coverage:base=shift,base.metric=l2,base.layer=1,diversity=0",
]


@pytest.fixture(params=[*SCORERS.names(), *VARIANTS])
def scorer(request: pytest.FixtureRequest) -> Scorer:
    return parse_scorer(request.param)


def test_is_filed_under_its_name_and_says_what_it_needs(scorer: Scorer) -> None:
    assert type(scorer) is SCORERS.get(scorer.name)
    assert scorer.needs <= {field.name for field in fields(ScoringContext)}
    assert json.loads(json.dumps(scorer.settings)) == scorer.settings


def test_settings_and_text_make_the_same_scorer(scorer: Scorer) -> None:
    for again in (SCORERS.get(scorer.name)(**scorer.settings), parse_scorer(scorer_text(scorer))):
        assert (again.name, again.settings, again.needs) == (scorer.name, scorer.settings, scorer.needs)


def test_unknown_settings_are_refused(scorer: Scorer) -> None:
    with pytest.raises(UserError, match=f"scorer {scorer.name} has no setting 'colour'"):
        parse_scorer(f"{scorer.name}:colour=red")


@pytest.mark.parametrize("responses", [True, False], ids=["answered", "prompts alone"])
def test_costs_the_passes_it_states_and_leaves_the_taps(
    scorer: Scorer, context: ScoringContext, responses: bool
) -> None:
    seen: list[str] = []

    def alpha_of(rows: Sequence[Sample]) -> list[float]:
        seen.extend(row.key for row in rows)
        return alpha_by_tokens(rows)

    for target in (context.target, context.base_target):
        assert target is not None
        plain = target.forward

        def counted(ids: Tensor, plain: Callable[..., object] = plain, **keywords: object) -> object:
            seen.extend(["row"] * len(ids))
            return plain(ids, **keywords)

        target.forward = counted  # type: ignore[method-assign, assignment]
    assert context.target is not None
    taps = context.target.taps
    rows = [row for row in samples(responses=responses) if len(row.response_ids or row.prompt_ids) > 2]
    score_rows(scorer, rows, replace(context, alpha_of=alpha_of))
    assert len(seen) == scorer.passes * len(rows)
    assert context.target.taps == taps


@pytest.mark.parametrize("responses", [True, False], ids=["answered", "prompts alone"])
def test_one_number_a_row_the_same_every_time(scorer: Scorer, context: ScoringContext, responses: bool) -> None:
    rows = samples(responses=responses)
    scores = score_rows(scorer, rows, context)
    assert len(scores) == len(rows) and len(set(scores)) > len(rows) // 4
    assert score_rows(scorer, rows, context) == scores


def test_order_and_batching_of_rows_change_nothing(scorer: Scorer, context: ScoringContext) -> None:
    rows = samples()
    scores = dict(zip((row.key for row in rows), score_rows(scorer, rows, context), strict=True))
    shuffled = random.Random(9).sample(rows, len(rows))
    for batch_tokens in (1, 37, 10_000):
        again = score_rows(scorer, shuffled, replace(context, batch_tokens=batch_tokens))
        assert again == pytest.approx([scores[row.key] for row in shuffled], rel=1e-3)
        chosen = select(shuffled, again, "5").selected_keys
        assert chosen == select(rows, list(scores.values()), "5").selected_keys


def test_choosing_is_scoring_and_selecting(scorer: Scorer, context: ScoringContext) -> None:
    rows = samples()
    made = choose(scorer, rows, context, "5")
    assert made.selected_keys == select(rows, score_rows(scorer, rows, context), "5").selected_keys
    assert (made.scorer, made.settings) == (scorer.name, scorer.settings)
    assert [
        entry.reason for entry in made.entries if entry.selected and "within the budget of 5" not in entry.reason
    ] == []


def test_a_missing_need_is_named(scorer: Scorer, context: ScoringContext) -> None:
    for need in scorer.needs:
        with pytest.raises(UserError, match=f"scorer {scorer.name} needs .*(target|draft)"):
            score_rows(scorer, samples(), replace(context, **{need: None}))


def test_rows_that_cannot_be_scored_are_refused(scorer: Scorer, context: ScoringContext) -> None:
    rows = samples(3)
    for bad, message in (
        ([], "no rows"),
        ([*rows, rows[1]], "row-01"),
        ([*rows, Sample("empty", (), ())], "empty has no tokens"),
    ):
        with pytest.raises(UserError, match=message):
            score_rows(scorer, bad, context)


def test_one_row_alone_gets_a_finite_score(scorer: Scorer, context: ScoringContext) -> None:
    assert len(score_rows(scorer, samples(1), context)) == 1


def test_progress_ends_at_all_rows_if_it_is_reported(scorer: Scorer, context: ScoringContext) -> None:
    seen: list[tuple[int, int]] = []
    score_rows(scorer, samples(), replace(context, progress=lambda done, total: seen.append((done, total))))
    assert seen == sorted(seen) and (not seen or seen[-1] == (14, 14))
