"""``ridge``: the draft's ``fc`` re-solved so that the fine-tuned target's features fuse to what the base's did.

No gradient. Both targets read the same responses of the fine-tuned target; with f the input of ``fc`` at a position,

    W = argmin sum w ||W f_finetuned - W_old f_base||^2 + lambda ||W - W_old||^2.

Only sums are kept (:mod:`redraft.starts.leastsquares`). lambda is the one that leaves the smallest error on rows held
out; when none beats W_old, the draft stays as it is. A position weighs w = 1 / ||W_old f_base||^2: the layer norms
what ``fc`` gives, so that the relative error counts, and the first tokens of a text, whose features can be a hundred
times as long as others', would otherwise drown the rest.

What it can and cannot do: it undoes a *linear* drift of the feature space. It knows nothing of what the fine-tuned
target now says differently; by taking its features back to the base target's it may take some of that away.

Norms before ``fc`` (norm_before_fc, fc_norm) are applied before the regression; a bias and a low-rank update of
``fc`` stay and are accounted for.

Shape legend: N positions, B rows, T tokens, K taps, F target width, H draft width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from redraft import provenance
from redraft.data.store import Row
from redraft.errors import UserError
from redraft.features import ComputedFeatures
from redraft.registries import STARTS
from redraft.rows import anchors
from redraft.selection.states import check_same_shape
from redraft.starts.apply import Start, StartContext, StartResult
from redraft.starts.leastsquares import Moments, fit
from redraft.target import Target

HELDOUT_EVERY = 4
# Each row goes through two targets, and fc has far fewer weights than so many rows have features.
MOST_ROWS = 300


def ridge(draft: Any, context: StartContext, batch_tokens: int = 2048) -> StartResult:
    """A copy of ``draft`` with its ``fc`` re-solved on the context's rows, responses of its target.

    The draft must be in a floating type with room for the solution (float32). Sets the taps of both targets to the
    draft's. Raises ``UserError`` when the targets differ in shape, fewer than two rows can be used, or the draft's
    ``fc`` reads anything besides the target's features.
    """
    target, base_target = context.target, context.base_target
    assert base_target is not None  # in ``needs``
    rows = spread(context.rows, MOST_ROWS)
    train, heldout = moments(draft, target, base_target, rows, batch_tokens, context.progress)
    tokens, found = train.samples + heldout.samples, fit(train, heldout)
    changed: tuple[str, ...] = ()
    if found.ratio is not None:
        draft, changed = resolved(draft, found.correction_HF), ("fc.weight",)
        note = (
            f"fc solved on {tokens:,} positions; the distance of fused features to the base target's falls to "
            f"{found.error:.0%} of its square on held-out rows (strength {found.ratio:g})"
        )
    elif float((train + heldout).square) > 0:
        note = "no strength beats the old fc on held-out rows; the draft stays as it is"
    else:
        note = "both targets give the same features; the draft stays as it is"
    # Each target read them all. Errors by strength are shares of that of the old fc.
    flops = 2 * provenance.forward_flops(target.parameters_per_token, tokens)
    details = {"errors": {f"{ratio:g}": error for ratio, error in found.errors.items()}, "ratio": found.ratio}
    return StartResult(draft, changed, (f"ridge: {note}",), 2 * tokens, flops, details)


def resolved(draft: Any, correction_HF: Tensor) -> Any:
    """A copy of ``draft`` with the correction [H, K*F] added to its ``fc``."""
    solved = copy.deepcopy(draft)
    with torch.no_grad():
        weight = solved.fc.weight
        weight.copy_((weight.double() + correction_HF.to(weight.device)).to(weight.dtype))
    return solved


def moments(
    draft: Any,
    target: Target,
    base_target: Target,
    rows: Sequence[Row],
    batch_tokens: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> tuple[Moments, Moments]:
    """The sums of the regression over the rows to fit on and over those held out; arguments as of :func:`ridge`."""
    check_same_shape(target, base_target)
    used = sorted((row for row in rows if anchors(row)), key=lambda row: row.key)
    if len(used) < 2:
        raise UserError(f"ridge needs two responses or more, one of them to hold out; {len(used)} can be used")
    kept_back = {row.key for row in used[:: min(HELDOUT_EVERY, len(used))]}
    for model in (target, base_target):
        model.tap(draft.config.taps)
    outputs, inputs = draft.fc.weight.shape
    train, heldout = (Moments(inputs, outputs, draft.fc.weight.device) for _ in range(2))
    both = (ComputedFeatures(model).batches(used, batch_tokens=batch_tokens) for model in (target, base_target))
    for batches in zip(*both, strict=True):
        for finetuned, base in zip(*batches, strict=True):
            x, now_NH = fc_input_and_output(draft, finetuned.taps)
            _, wanted_NH = fc_input_and_output(draft, base.taps)
            weight_N = 1 / wanted_NH.double().square().sum(-1).clamp(min=1e-12)
            (heldout if base.row.key in kept_back else train).add(x, wanted_NH - now_NH, weight_N)
        if progress:
            progress(train.samples + heldout.samples)
    return train, heldout


def fc_input_and_output(draft: Any, taps_NKF: Tensor) -> tuple[Tensor, Tensor]:
    """What ``fc`` reads at each position, norms before it applied, and the fused states [N, H] it gives.

    Raises ``UserError`` when the fused states are not ``fc`` of the taps alone.
    """
    caught: list[Tensor] = []
    hook = draft.fc.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        with torch.no_grad():
            states_NH = draft.fuse(taps_NKF.to(draft.fc.weight))
    finally:
        hook.remove()
    if len(caught) != 1:
        raise UserError(
            "ridge re-solves an fc that fuses the target's features alone, and this draft has none; "
            "use it on an EAGLE-3 draft"
        )
    return caught[0], states_NH


def spread(rows: Sequence[Row], most: int) -> Sequence[Row]:
    """At most ``most`` rows, evenly spread over all in the order of their keys."""
    if len(rows) <= most:
        return rows
    ordered = sorted(rows, key=lambda row: row.key)
    return [ordered[place * len(rows) // most] for place in range(most)]


STARTS.register("ridge")(
    Start(frozenset({"base_target", "rows"}), "fc re-solved so that features land where the base's did", ridge)
)
