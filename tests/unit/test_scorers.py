"""Entropy, length and the acceptance that ``rejection`` asks for, against their definitions."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from redraft.acceptance.simulate import row_alphas
from redraft.features import FeatureStore
from redraft.selection import ScoringContext, score_rows
from redraft.selection import entropy as entropy_module
from redraft.selection import states as states_module
from redraft.selection.entropy import Entropy, entropies
from redraft.selection.length import Length
from redraft.selection.rejection import Rejection
from redraft.selection.states import measured_alphas
from redraft.target import Target

MakeTarget = Callable[..., Target]
make_draft = runpy.run_path(str(Path(__file__).with_name("toys.py")))["make_draft"]


@dataclass(frozen=True)
class Sample:
    key: str
    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(2)

    def text(longest: int) -> list[int]:
        length = int(torch.randint(3, longest, (), generator=generator))
        return torch.randint(4, 128, (length,), generator=generator).tolist()

    answered = [Sample(f"r{i}", text(9), text(20)) for i in range(5)]
    return answered + [Sample(f"p{i}", text(20)) for i in range(4)] + [Sample("one", [9])]


def entropy_by_hand(target: Target, row: Sample) -> float:
    """From transformers' own logits, without a chunk or a batch."""
    ids = [*row.prompt_ids, *row.response_ids]
    probs_TV = target.model(torch.tensor([ids])).logits[0].double().softmax(-1)
    entropy_T = -(probs_TV * probs_TV.log()).sum(-1)
    counted_T = entropy_T[len(row.prompt_ids) - 1 : -1] if row.response_ids else entropy_T
    return float(counted_T.mean())


def test_entropy_is_that_of_the_distributions_the_tokens_came_from(tiny_target: MakeTarget) -> None:
    target, rows = tiny_target(), samples()
    expected = [entropy_by_hand(target, row) for row in rows]
    found = score_rows(Entropy(), rows, ScoringContext(target=target, batch_tokens=50))
    assert found == pytest.approx(expected, rel=1e-4)


def test_entropy_holds_few_logits_at_once(tiny_target: MakeTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target()
    states_TH = torch.randn(50, 32)
    whole, seen, plain = entropies(target, states_TH), list[int](), target.logits

    def counted(states: torch.Tensor) -> torch.Tensor:
        seen.append(len(states))
        return plain(states)

    monkeypatch.setattr(target, "logits", counted)
    for chunk_logits, most in ((7 * 128 + 5, 7), (1, 1)):
        seen.clear()
        monkeypatch.setattr(entropy_module, "CHUNK_LOGITS", chunk_logits)
        assert torch.allclose(entropies(target, states_TH), whole)
        assert max(seen) == most and sum(seen) == 50


def test_entropy_of_the_certain_is_zero_and_of_the_clueless_the_logarithm(tiny_target: MakeTarget) -> None:
    target, states_TH = tiny_target(), torch.randn(3, 32)
    target.head.weight.data.zero_()
    assert entropies(target, states_TH).tolist() == pytest.approx([float(torch.tensor(128.0).log())] * 3)
    target.head.weight.data[7] = 1e4
    assert entropies(target, states_TH.abs()).tolist() == pytest.approx([0.0] * 3)


def test_length_counts_what_a_budget_counts() -> None:
    assert Length().score([Sample("a", [1, 2], [3, 4, 5]), Sample("b", [1, 2])], ScoringContext()) == [3.0, 2.0]


def test_acceptance_in_portions_is_acceptance_at_once(
    tiny_target: MakeTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for prompts alone: then it is that of a text whose first token alone is given."""
    target = tiny_target(taps=(1, 3, 5))
    draft = make_draft("random", target)
    rows = [row for row in samples() if row.key != "one"]
    seen: list[tuple[int, int]] = []

    def alpha_of(rows: Sequence[Sample]) -> list[float]:
        return measured_alphas(draft, target, rows, scratch, lambda done, total: seen.append((done, total)))

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    whole = Rejection().score(rows, ScoringContext(alpha_of=alpha_of))

    forced = [row if row.response_ids else Sample(row.key, row.prompt_ids[:1], row.prompt_ids[1:]) for row in rows]
    store = FeatureStore(tmp_path / "store", {})
    store.build(target, forced)  # type: ignore[arg-type]
    assert whole == pytest.approx([1 - a for a in row_alphas(draft, target, forced, store)], abs=1e-5)  # type: ignore[arg-type]
    assert 0 < min(whole) < max(whole) < 1

    seen.clear()
    monkeypatch.setattr(states_module, "PORTION_TOKENS", 30)
    target.tap((2,))  # whatever was tapped before
    assert Rejection().score(rows[::-1], ScoringContext(alpha_of=alpha_of)) == pytest.approx(whole[::-1], abs=1e-5)
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == (9, 9)
    assert not any(scratch.iterdir())
