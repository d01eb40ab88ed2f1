"""First differences and near-ties, on a target whose two best logits are known."""

from __future__ import annotations

import copy

import pytest
import torch

from redraft.decode.engine import PlainDecoder
from redraft.evaluate.divergence import Divergence, explain, first_difference, summary, top_two
from redraft.target import Target

PROMPT = [5, 9, 17, 30]
TEXT = [40, 41, 60, 33, 90, 12, 77, 25, 8]


def plain_text(target: Target, at: int) -> list[int]:
    """A text whose token at this position is the target's own choice, as in plain decoding."""
    return [*TEXT[:at], int(logits_at(target, at).argmax()), *TEXT[at:]]


def logits_at(target: Target, at: int) -> torch.Tensor:
    return target.logits(target.forward(torch.tensor([[*PROMPT, *TEXT[:at]]])).hidden_BTH[0, -1])


@pytest.mark.parametrize(
    ("one", "other", "position"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([4], [1], 0), ([1, 2], [1], 1), ([], [1], 0)],
)
def test_first_difference(one, other, position):
    assert first_difference(one, other) == position
    assert first_difference(other, one) == position


def test_top_two():
    ids, gaps = top_two(torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, -1.0]]))
    assert ids[0].tolist() == [1, 2] and sorted(ids[1].tolist()) == [0, 1]
    assert gaps.tolist() == [2.0, 0.0]


@pytest.fixture
def pair(tiny_target) -> tuple[Target, Target]:
    """The same weights in float32 and in bfloat16."""
    low = tiny_target("llama")
    low.model.to(torch.bfloat16)
    return Target(copy.deepcopy(low.model).float(), low.tokenizer), low


def test_equal_texts_have_no_difference(pair):
    assert explain(PROMPT, [7, 8], [7, 8], *pair) is None


def test_the_gap_is_that_of_the_position(pair):
    exact, low = pair
    plain, best = plain_text(exact, 6), logits_at(exact, 6).topk(2)
    other = [*plain[:6], int(best.indices[1]), 11]
    found = explain(PROMPT, plain, other, exact, low)
    assert found is not None
    assert (found.position, found.plain, found.other) == (6, plain[6], int(best.indices[1]))
    assert found.gap == pytest.approx(float(best.values[0] - best.values[1]), rel=1e-4)
    assert found.behind == pytest.approx(found.gap, rel=1e-4)
    assert found.noise > 0
    rounded = low.logits(low.forward(torch.tensor([[*PROMPT, *plain[:-1]]])).hidden_BTH[0, len(PROMPT) + 5])
    assert found.gap_low == pytest.approx(float(top_two(rounded[None])[1]), abs=1e-6)


def test_a_token_far_behind_is_no_near_tie(pair):
    exact, low = pair
    plain, logits = plain_text(exact, 3), logits_at(exact, 3)
    found = explain(PROMPT, plain, [*plain[:3], int(logits.argmin())], exact, low)
    assert found is not None and not found.near_tie
    assert found.behind == pytest.approx(float(logits.max() - logits.min()), rel=1e-4)
    assert found.behind > found.gap


def test_two_equal_rows_of_the_head_are_a_near_tie(pair):
    """The token that is chosen first gets a twin: no arithmetic can tell the two apart."""
    exact, low = pair
    first = PlainDecoder(exact).generate(PROMPT, 1).ids[0]
    twin = 100 if first != 100 else 101
    with torch.no_grad():
        for target in pair:
            target.head.weight[twin] = target.head.weight[first]
    found = explain(PROMPT, [first, 20], [twin, 20], exact, low)
    assert found is not None and found.near_tie
    assert found.position == 0 and found.gap == 0 and found.behind == 0


def test_a_text_that_ends_early_is_a_difference_and_no_near_tie(pair):
    exact, low = pair
    plain = TEXT
    shorter = explain(PROMPT, plain, plain[:2], exact, low)
    longer = explain(PROMPT, plain, [*plain, 50], exact, low)
    assert shorter is not None and (shorter.position, shorter.other, shorter.near_tie) == (2, None, False)
    assert longer is not None and (longer.position, longer.plain, longer.near_tie) == (len(plain), None, False)


def test_summary_counts():
    tie = Divergence(3, 1, 2, gap=0.01, gap_low=0.0, behind=0.01, noise=0.05)
    wrong = Divergence(0, 1, 2, gap=0.01, gap_low=0.0, behind=4.0, noise=0.05)
    assert summary([None, tie, wrong, None]) == {
        "prompts": 4,
        "identical": 2,
        "near_ties": 1,
        "first_divergence_gap": [0.01, 0.01],
    }
    assert tie.near_tie and not wrong.near_tie
