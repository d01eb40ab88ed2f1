"""What every registered scorer must keep; a new scorer inherits these tests by being registered."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import pytest
import torch

from redraft.errors import UserError
from redraft.select import SCORERS, Scorer, ScoringContext, score_rows
from redraft.select.rules import select
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


@pytest.fixture(params=SCORERS.names())
def scorer(request: pytest.FixtureRequest) -> Scorer:
    return SCORERS.get(request.param)()


def test_is_filed_under_its_name_and_says_what_it_needs(scorer: Scorer) -> None:
    assert type(scorer) is SCORERS.get(scorer.name)
    assert scorer.needs <= {field.name for field in fields(ScoringContext)}
    assert json.loads(json.dumps(scorer.settings)) == scorer.settings


@pytest.mark.parametrize("responses", [True, False], ids=["answered", "prompts alone"])
def test_one_number_a_row_the_same_every_time(scorer: Scorer, context: ScoringContext, responses: bool) -> None:
    rows = samples(responses=responses)
    scores = score_rows(scorer, rows, context)
    assert len(scores) == len(rows) and len(set(scores)) > len(rows) // 2
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
