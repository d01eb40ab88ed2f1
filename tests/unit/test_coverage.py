"""Coverage: the greedy order against its definition, and what it does with copies.

Shape legend: N vectors, D their width.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from redraft.attic.coverage import SAME, WIDTH, Chosen, Coverage, directions, greedy_order, projection, shares
from redraft.selection import ScoringContext, score_rows
from redraft.selection.manifest import choose
from redraft.target import Target

MakeTarget = Callable[..., Target]


@dataclass(frozen=True)
class Sample:
    key: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def unit_vectors(count: int, width: int, seed: int) -> np.ndarray:
    vectors_ND = np.random.default_rng(seed).normal(size=(count, width))
    return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def check_greedy(quality_N: np.ndarray, vectors_ND: np.ndarray, diversity: float, order: list[Chosen]) -> None:
    """Every step is the best there is, by the definition and all distances to all rows chosen before."""
    left, distance_N = set(range(len(quality_N))), np.ones(len(quality_N))
    for step in order:
        value_N = quality_N ** (1 - diversity) * np.maximum(distance_N, SAME) ** diversity
        assert step.value == pytest.approx(value_N[step.index], abs=1e-6)
        assert step.value >= max(value_N[i] for i in left) - 1e-6
        assert step.distance == pytest.approx(distance_N[step.index], abs=1e-6)
        apart_N = np.linalg.norm(vectors_ND - vectors_ND[step.index], axis=1) / 2
        if step.nearest is not None:
            assert step.nearest not in left and apart_N[step.nearest] == pytest.approx(step.distance, abs=1e-6)
        distance_N = np.minimum(distance_N, apart_N)
        left.remove(step.index)
    assert not left


@pytest.mark.parametrize("diversity", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 40, 150])
def test_every_step_is_the_best(count: int, diversity: float) -> None:
    vectors_ND = unit_vectors(count, 5, seed=count)
    vectors_ND[count // 2 :: 3] = vectors_ND[0]  # copies
    quality_N = np.random.default_rng(1).integers(1, 5, count) / 4  # and ties
    order = greedy_order(quality_N, vectors_ND, diversity)
    check_greedy(quality_N, vectors_ND, diversity, order)
    values = [step.value for step in order]
    assert values == sorted(values, reverse=True)


def test_farthest_first_covers_within_twice_the_best_radius() -> None:
    """Gonzalez's guarantee, against planted centres whose radius is known."""
    source = np.random.default_rng(3)
    centres_KD = unit_vectors(6, 20, seed=5)
    vectors_ND = np.repeat(centres_KD, 30, axis=0) + 0.02 * source.normal(size=(180, 20))
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    order = greedy_order(source.random(180) + 0.1, vectors_ND, 1.0)
    assert {step.index // 30 for step in order[:6]} == set(range(6))


def test_shares_rank_ties_alike_and_ignore_rounding() -> None:
    assert shares([3.0, 1.0, 2.0, 2.0]).tolist() == [1.0, 0.25, 0.625, 0.625]
    assert shares([1.0, 1.0 + 1e-7]).tolist() == [0.75, 0.75]
    assert shares([0.0]).tolist() == [1.0]


def test_directions_of_equal_vectors_are_equal_and_others_have_length_one() -> None:
    assert torch.equal(directions(torch.full((3, 4), 0.7)), torch.tensor([[0, 0, 0, 0, 1.0]] * 3))
    assert torch.isfinite(directions(torch.zeros(2, 4))).all()
    spread = directions(torch.randn(50, 4) + 100)
    assert torch.allclose(spread.norm(dim=1), torch.ones(50))
    assert not torch.allclose(spread[0], spread[1], atol=0.01)


def test_projection_keeps_distances() -> None:
    x, y = torch.randn(2, 200, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(projection(WIDTH), torch.eye(WIDTH))
    ratio = ((x - y) @ projection(1000)).norm(dim=1) / (x - y).norm(dim=1)
    assert projection(1000).shape == (1000, WIDTH) and 0.75 < float(ratio.min()) < float(ratio.max()) < 1.25


def copies_and_others(count: int = 16) -> list[Sample]:
    """``count`` long answers that differ in one token, two not even in that, and as many short, different ones."""
    source = random.Random(4)

    def text(length: int) -> tuple[int, ...]:
        return tuple(source.randrange(4, 128) for _ in range(length))

    prompt, answer = text(6), text(40)
    same = [Sample(f"copy-{i:02d}", prompt, (*answer[:20], 4 + max(i, 1), *answer[21:])) for i in range(count)]
    return same + [Sample(f"other-{i:02d}", text(6), text(10 + i)) for i in range(count)]


@pytest.mark.parametrize("responses", [True, False], ids=["answered", "prompts alone"])
def test_near_copies_do_not_fill_the_budget(tiny_target: MakeTarget, responses: bool) -> None:
    rows = copies_and_others()
    if not responses:
        rows = [Sample(row.key, row.prompt_ids + row.response_ids, ()) for row in rows]
    context = ScoringContext(target=tiny_target())
    by_length = choose(Coverage("length", diversity=0), rows, context, "12").selected_keys
    assert all(key.startswith("copy") for key in by_length)
    chosen = choose(Coverage("length"), rows, context, "12").selected_keys
    assert sum(key.startswith("copy") for key in chosen) <= 2
    # Among rows that are not copies the base scorer still has its say.
    others = [key for key in chosen if key.startswith("other")]
    assert sum(key >= "other-08" for key in others) >= 7


def test_a_budget_takes_a_prefix_of_every_larger_one(tiny_target: MakeTarget) -> None:
    rows, context = copies_and_others(), ScoringContext(target=tiny_target())
    large = choose(Coverage("length"), rows, context, "20").selected_keys
    assert choose(Coverage("length"), rows, context, "25%").selected_keys == large[:8]


def test_exact_copies_come_last_in_the_order_of_the_base_scorer(tiny_target: MakeTarget) -> None:
    rows = copies_and_others(6)
    rows += [Sample(f"again-{i}", rows[i + 6].prompt_ids, rows[i + 6].response_ids) for i in (1, 5, 3)]
    entries = choose(Coverage("length"), rows, ScoringContext(target=tiny_target()), "3").entries
    tail = [entry.key for entry in entries[-4:]]
    assert set(tail) == {"copy-01", "other-05", "other-03", "other-01"}
    assert [key for key in tail if key.startswith("other")] == ["other-05", "other-03", "other-01"]
    same = [Sample(f"s{i}", (5, 6), (7, 8, 9)) for i in range(4)]
    scores = score_rows(Coverage("length"), same, ScoringContext(target=tiny_target()))
    assert scores[0] > 10 * scores[1] and scores[1] == scores[2] == scores[3]


def test_the_manifest_names_base_score_neighbour_and_novelty(tiny_target: MakeTarget) -> None:
    rows = copies_and_others(4)
    made = choose(Coverage("length"), rows, ScoringContext(target=tiny_target()), "3")
    reasons = {entry.key: entry.reason for entry in made.entries}
    assert made.entries[0].reason.endswith("; length 40 (quantile 81%), novelty 1.000, the first")
    copy = re.search(r"novelty (0\.\d+), beside copy-0\d$", reasons["copy-03"])
    assert copy and float(copy[1]) < 0.2
    assert made.settings == {"base": "length", "diversity": 0.5, "layer": "final"}


def test_copies_run_once_and_needs_follow_the_base(tiny_target: MakeTarget) -> None:
    target = tiny_target()
    plain, seen = target.forward, []

    def counted(ids: torch.Tensor, **keywords: object) -> object:
        seen.extend(ids.tolist())
        return plain(ids, **keywords)  # type: ignore[arg-type]

    target.forward = counted  # type: ignore[method-assign, assignment]
    score_rows(
        Coverage("random"), [Sample(f"s{i}", (5, 6), (7, 8 + i // 3)) for i in range(6)], ScoringContext(target=target)
    )
    assert len(seen) == 2
    assert Coverage("shift").needs == {"target", "base_target"} and Coverage("shift").passes == 3
    assert Coverage("random").needs == {"target"} and Coverage("random").passes == 1
