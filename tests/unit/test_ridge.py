"""The streamed least squares against dense algebra, and fc re-solved on features that drifted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from redraft.attic.ridge import ridge, spread
from redraft.data.store import Row
from redraft.drafts.eagle1 import fresh_eagle1
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft, fresh_draft
from redraft.drafts.groups import attach_low_rank
from redraft.errors import UserError
from redraft.starts.apply import StartContext
from redraft.starts.leastsquares import Moments, fit
from redraft.target import Target, TargetStep

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm before fc": {"norm_before_fc": True},
    "norm of every tap": {"fc_norm": True},
}


def dense(x: Tensor, r: Tensor, weight: Tensor, strength: float) -> Tensor:
    """The same correction by least squares on the samples themselves, the penalty as extra samples."""
    rows = torch.cat([x * weight.sqrt()[:, None], strength**0.5 * torch.eye(x.shape[1]).double()])
    wanted = torch.cat([r * weight.sqrt()[:, None], torch.zeros(x.shape[1], r.shape[1]).double()])
    return torch.linalg.lstsq(rows, wanted).solution.T


def samples(count: int = 60, inputs: int = 7, outputs: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, r = (torch.randn(count, width, generator=generator).double() for width in (inputs, outputs))
    return x, r, torch.rand(count, generator=generator).double() + 0.1


@pytest.mark.parametrize("ratio", [1e-6, 1e-2, 10.0])
def test_streamed_sums_solve_the_dense_problem(ratio: float) -> None:
    x, r, weight = samples()
    moments = Moments(7, 3)
    for part in torch.arange(60).split(13):
        moments.add(x[part], r[part], weight[part])
    solved = moments.solve(ratio)
    torch.testing.assert_close(solved, dense(x, r, weight, moments.strength(ratio)))
    left = (((x @ solved.T - r) ** 2).sum(-1) * weight).sum() / ((r**2).sum(-1) * weight).sum()
    assert moments.error(solved) == pytest.approx(float(left)) and moments.samples == 60


def test_an_infinite_strength_leaves_the_old_matrix() -> None:
    x, r, _ = samples()
    moments = Moments(7, 3)
    moments.add(x, r)
    assert moments.solve(1e12).abs().max() < 1e-9 * moments.solve(1e-6).abs().max()


def test_a_singular_gram_matrix_is_solved() -> None:
    moments = Moments(7, 3)
    x, r, _ = samples(count=2)
    moments.add(x, r)
    assert moments.error(moments.solve(1e-12)) < 1e-6


def test_the_strength_is_chosen_on_held_out_samples() -> None:
    x, noise, _ = samples(count=400)
    true = torch.randn(3, 7, generator=torch.Generator().manual_seed(4)).double()
    parts = []
    for rows in torch.arange(400).split([20, 380]):
        parts.append(Moments(7, 3))
        parts[-1].add(x[rows], x[rows] @ true.T + 2 * noise[rows])
    found = fit(*parts)
    assert found.ratio == min(found.errors, key=lambda ratio: found.errors[ratio]) and found.error < 1
    torch.testing.assert_close(found.correction_HF, (parts[0] + parts[1]).solve(found.ratio or 0))


def test_nothing_to_learn_is_left_alone() -> None:
    x, r, _ = samples(count=40)
    train, heldout = Moments(7, 3), Moments(7, 3)
    train.add(x[:10], r[:10])
    heldout.add(x[10:], -(x[10:] @ train.solve(1e-3).T))  # whatever the training part says, the opposite holds
    found = fit(train, heldout)
    assert found.ratio is None and not found.correction_HF.any() and found.error == 1


# -- on targets --------------------------------------------------------------------------------------------------------
class Drifted:
    """A target whose taps are turned and stretched by one matrix: a drift that a linear map undoes."""

    def __init__(self, target: Target, matrix: Tensor, noise: float = 0.0) -> None:
        self.target, self.matrix, self.noise = target, matrix, noise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def forward(self, ids: Tensor, cache: Any = None) -> TargetStep:
        step = self.target.forward(ids, cache)
        assert step.taps_BTKH is not None
        taps = step.taps_BTKH @ self.matrix
        return TargetStep(step.hidden_BTH, taps + self.noise * torch.randn(taps.shape))


def drift(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.eye(size) + 0.3 * torch.randn(size, size, generator=generator) / size**0.5


def make_rows(count: int = 40) -> list[Row]:
    generator = torch.Generator().manual_seed(6)
    ids = [torch.randint(4, 128, (9 + i % 5,), generator=generator).tolist() for i in range(count)]
    return [Row(f"r{i}", x[:4], x[4:], 0.0, 0, 1.0, 0, "length", "hash") for i, x in enumerate(ids)]


def with_options(draft: Eagle3Draft, **options: Any) -> Eagle3Draft:
    """The same draft with norms before its fc, whose weights are not 1."""
    made = Eagle3Draft(Eagle3Config.from_dict(draft.config.to_dict() | options), draft.vocabulary())
    made.load_state_dict(draft.state_dict(), strict=False)
    for name, parameter in made.named_parameters():
        if name.startswith(("input_norm", "fc_norm")):
            parameter.data = torch.linspace(0.5, 1.5, len(parameter))
    return made


@torch.no_grad()
def distance(draft: Eagle3Draft, old: Eagle3Draft, target: Any, base: Target) -> float:
    """Mean relative square of the gap between fused features, on text that was not used."""
    ids = torch.randint(4, 128, (6, 20), generator=torch.Generator().manual_seed(9))
    taps, wanted = target.forward(ids).taps_BTKH, old.fuse(base.forward(ids).taps_BTKH)
    return float(((draft.fuse(taps) - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_linear_drift_is_undone(tiny_target: Callable[..., Target], options: dict[str, Any]) -> None:
    base = tiny_target(taps=(1, 3, 5))
    old = with_options(fresh_draft(base, list(range(100))), **options)
    target: Any = Drifted(base, drift(96))
    before = copy.deepcopy(old.state_dict())
    report = ridge(old, StartContext(target, base, make_rows()), batch_tokens=64)
    solved = report.draft
    # A norm before fc takes one number a position away, which no matrix gives back.
    assert distance(solved, old, target, base) < (0.001 if not options else 0.2) * distance(old, old, target, base)
    assert report.changed == ("fc.weight",) and report.details["ratio"] is not None and report.notes
    assert report.tokens == 2 * sum(len(r.prompt_ids) + len(r.response_ids) - 2 for r in make_rows())
    for name, tensor in old.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(tensor, solved.state_dict()[name]) == (name != "fc.weight")


def test_bias_and_low_rank_update_of_fc_are_accounted_for(tiny_target: Callable[..., Target]) -> None:
    base = tiny_target(taps=(1, 3, 5))
    old = attach_low_rank(fresh_draft(base, list(range(100))), 4, ("fc",))
    old.fc.bias = torch.nn.Parameter(torch.linspace(-1, 1, 32))
    with torch.no_grad():
        old.fc.low_rank.outer.normal_(0, 0.1)  # type: ignore[union-attr]
    target: Any = Drifted(base, drift(96))
    solved = ridge(old, StartContext(target, base, make_rows())).draft
    assert distance(solved, old, target, base) < 0.001 * distance(old, old, target, base)


def test_noise_is_not_learnt(tiny_target: Callable[..., Target]) -> None:
    """Few samples, and features that are drowned in noise: the solution must not be worse than the old fc."""
    base = tiny_target(taps=(1, 3, 5))
    old = fresh_draft(base, list(range(100)))
    torch.manual_seed(0)
    target: Any = Drifted(base, torch.eye(96), noise=3.0)
    report = ridge(old, StartContext(target, base, make_rows(12)))
    solved, errors = report.draft, report.details["errors"]
    assert distance(solved, old, target, base) <= distance(old, old, target, base)
    assert min(errors.values()) < errors["1e-07"]


def test_equal_targets_leave_the_draft(tiny_target: Callable[..., Target]) -> None:
    base = tiny_target(taps=(1, 3, 5))
    old = fresh_draft(base, list(range(100)))
    report = ridge(old, StartContext(tiny_target(taps=(1, 3, 5)), base, make_rows(6)))
    assert report.draft is old and report.changed == () and "the same features" in report.notes[0]


def test_both_targets_are_tapped_where_the_draft_reads(tiny_target: Callable[..., Target]) -> None:
    base = tiny_target(taps=(1, 3, 5))
    old = fresh_draft(base, list(range(100)))
    target, other = tiny_target(seed=1), tiny_target()
    progress: list[int] = []
    report = ridge(old, StartContext(target, other, make_rows(6), progress=progress.append))
    assert target.taps == other.taps == (1, 3, 5) and 2 * progress[-1] == report.tokens


def test_bad_input_is_one_line(tiny_target: Callable[..., Target]) -> None:
    base = tiny_target(taps=(1, 3, 5))
    old = fresh_draft(base, list(range(100)))
    with pytest.raises(UserError, match="width 32 and 64"):
        ridge(old, StartContext(base, tiny_target(hidden_size=64), make_rows()))
    with pytest.raises(UserError, match="two responses"):
        ridge(old, StartContext(base, base, [replace(row, response_ids=row.response_ids[:1]) for row in make_rows()]))
    with pytest.raises(UserError, match="alone"):
        ridge(fresh_eagle1(base), StartContext(base, base, make_rows()))


def test_many_rows_are_thinned_evenly() -> None:
    rows = [Row(f"r{i}", [1], [2, 3], 0.0, 0, 1.0, 0, "length", "hash") for i in range(24)]
    assert spread(rows, 24) is rows
    places = [sorted(rows, key=lambda row: row.key).index(row) for row in spread(rows, 7)]
    assert places == [0, 3, 6, 10, 13, 17, 20]
