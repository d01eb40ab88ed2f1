"""Rows mapped from the target's head to the draft's, and head rows moved by the target's own change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from redraft.attic.delta import delta
from redraft.drafts.eagle1 import fresh_eagle1
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft, fresh_draft
from redraft.drafts.groups import attach_low_rank
from redraft.drafts.layers import norm_weight
from redraft.errors import UserError
from redraft.starts.apply import StartContext
from redraft.starts.leastsquares import fit_row_map
from redraft.target import Target

IDS = list(range(2, 122))


def rotation(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0].double()


def weights(size: int) -> Tensor:
    return torch.linspace(0.5, 2.0, size).double()


def test_the_norms_ratio_is_found_exactly() -> None:
    target = torch.randn(60, 16, generator=torch.Generator().manual_seed(1)).double()
    found = fit_row_map(target, 3 * target / weights(16), weights(16))
    assert found.errors["norms"] < 1e-20 and found.step == pytest.approx(1)
    torch.testing.assert_close(found(target), 3 * target / weights(16))


@pytest.mark.parametrize("width", [16, 12])
def test_another_space_needs_the_regression(width: int) -> None:
    """Equal widths but turned, and other widths: the ridge map finds what the ratio of norms cannot."""
    target = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)).double()
    draft = target @ rotation(16)[:, :width]
    found = fit_row_map(target, draft)
    assert found.kind == "ridge" and found.errors["ridge"] < 1e-6
    assert found.errors.get("norms", 1) > 0.5
    torch.testing.assert_close(found(target), draft, atol=1e-3, rtol=1e-3)


def test_unrelated_rows_keep_the_plain_map() -> None:
    """With more channels than rows to learn from, the regression must stay by the scale and not fit the noise."""
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(24, 64, generator=generator).double()
    draft = target + 0.1 * torch.randn(24, 64, generator=generator).double()
    found = fit_row_map(target, draft)
    assert found.errors["ridge"] < 1.05 * found.errors["norms"] < 0.1
    assert (found.matrix_HF - torch.eye(64)).abs().max() < 0.1


def test_shut_channels_do_no_harm() -> None:
    norm = weights(8)
    norm[3] = 0
    target = torch.randn(40, 8, generator=torch.Generator().manual_seed(1)).double()
    assert torch.isfinite(fit_row_map(target, target, norm)(target)).all()
    with pytest.raises(ValueError, match="too few"):
        fit_row_map(target[:5], target[:5])


def test_the_weight_of_a_norm_is_what_it_multiplies_by() -> None:
    class OnePlus(torch.nn.Module):
        """Gemma's way: the parameter is the weight minus one."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([0.0, 0.5, -0.5]))

        def forward(self, x: Tensor) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)

    torch.testing.assert_close(norm_weight(OnePlus(), 3), torch.tensor([1, 1.5, 0.5]).double(), atol=1e-5, rtol=0)


# -- delta -------------------------------------------------------------------------------------------------------------
def finetuned(base: Target, scale: float = 0.05) -> Target:
    """The same target with another head and final norm."""
    model = copy.deepcopy(base.model)
    generator = torch.Generator().manual_seed(4)
    for layer in (model.get_output_embeddings(), model.base_model.norm):
        layer.weight.data += scale * torch.randn(layer.weight.shape, generator=generator)
    return Target(model, base.tokenizer, "fine-tuned", base.taps)


def test_an_unchanged_head_moves_nothing_and_says_so(tiny_target: Callable[..., Target]) -> None:
    base, tuned = tiny_target(taps=(1, 3, 5)), tiny_target(taps=(1, 3, 5))
    tuned.backbone.layers[2].mlp.up_proj.weight.data.mul_(2)
    old = fresh_draft(base, IDS)
    report = delta(old, StartContext(tuned, base))
    moved = report.draft
    assert moved is old and report.changed == () and "nothing to move" in report.notes[0]


@pytest.mark.parametrize("turned", [False, True])
def test_rows_follow_the_target(tiny_target: Callable[..., Target], turned: bool) -> None:
    """A head that is the target's, in its own space or a turned one, becomes that of the fine-tuned target."""
    base = tiny_target(taps=(1, 3, 5))
    tuned, old = finetuned(base), fresh_draft(base, IDS)
    space = rotation(32) if turned else torch.eye(32).double()
    old.norm.weight.data = weights(32).float()

    def rows(target: Target) -> Tensor:
        known = target.head.weight[torch.tensor(IDS)].double() * target.backbone.norm.weight.double()
        return (known @ space / weights(32)).float()

    old.lm_head.weight.data = rows(base)
    before = old.lm_head.weight.clone()
    report = delta(old, StartContext(tuned, base))
    moved = report.draft
    assert report.changed == ("lm_head.weight",) and torch.equal(old.lm_head.weight, before)
    gap = (moved.lm_head.weight - rows(tuned)).norm() / (before - rows(tuned)).norm()
    assert gap < 0.02 and repr(report.details["lm_head"]["kind"]) in report.notes[0]


def test_an_embedding_of_its_own_moves_too(tiny_target: Callable[..., Target]) -> None:
    base = tiny_target(taps=(1, 3, 5))
    tuned = tiny_target(taps=(1, 3, 5))
    tuned.embedding.weight.data += 0.1
    bare = fresh_draft(base, IDS)
    config = Eagle3Config.from_dict(bare.config.to_dict() | {"own_embedding": True})
    old = Eagle3Draft(config, bare.vocabulary())
    old.embed_tokens.weight.data = 2 * base.embedding.weight.data.clone()  # type: ignore[union-attr]
    report = delta(old, StartContext(tuned, base))
    moved = report.draft
    assert report.changed == ("embed_tokens.weight",)
    torch.testing.assert_close(moved.embed_tokens.weight, 2 * tuned.embedding.weight, atol=1e-3, rtol=0)
    assert delta(bare, StartContext(tuned, base)).draft is bare  # reads the target's embedding, which moved by itself


def test_a_draft_on_the_targets_head_needs_nothing(tiny_target: Callable[..., Target]) -> None:
    base = tiny_target(taps=(1, 3, 5))
    old = fresh_eagle1(base)
    report = delta(old, StartContext(finetuned(base), base))
    moved = report.draft
    assert moved is old and "by themselves" in report.notes[0]


def test_bad_input_is_one_line(tiny_target: Callable[..., Target]) -> None:
    base = tiny_target(taps=(1, 3, 5))
    old = fresh_draft(base, IDS)
    with pytest.raises(UserError, match="layers 6 and 7"):
        delta(old, StartContext(base, tiny_target(num_hidden_layers=7)))
    with pytest.raises(UserError, match="low-rank"):
        delta(attach_low_rank(old, 2, ("lm_head",)), StartContext(finetuned(base), base))
