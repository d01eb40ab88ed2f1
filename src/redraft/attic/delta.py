"""``delta``: the draft's head rows moved by the target's own change, with no data and no gradient.

What fine-tuning did to the target's head rows (final norm included, since its weight multiplies every row) is done
to the draft's: ``lm_head += step * map(new rows - old rows)``. The map is that of :mod:`redraft.starts.leastsquares`,
fitted between the *base* target's head and the draft's: by the ratio of norm weights, or by a ridge regression,
whichever predicts held-out draft rows better; the report says which. ``step`` is the slope of held-out draft rows on
their images; it corrects the scale of the map and knows nothing of acceptance.

A draft that reads the target's embeddings (nearly all do) needs nothing for them: the fine-tuned target's own are
what it reads anyway. Only a draft with an embedding of its own has those rows moved alike. Where fine-tuning left
head, final norm and embeddings as they were (LoRA on the layers alone), there is nothing to move and the draft stays
as it is; the report says so.

Shape legend: D draft vocabulary, V target vocabulary, F width of the target, H width of the draft.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from redraft.drafts.layers import norm_weight
from redraft.errors import UserError
from redraft.registries import STARTS
from redraft.selection.states import check_same_shape
from redraft.starts.apply import Start, StartContext, StartResult
from redraft.starts.leastsquares import fit_row_map


def delta(draft: Any, context: StartContext) -> StartResult:
    """A copy of ``draft`` moved by the change from the base target to the target.

    Raises ``UserError`` when their sizes differ, or the draft's head carries a low-rank update.
    """
    target, base_target = context.target, context.base_target
    assert base_target is not None  # in ``needs``
    check_same_shape(target, base_target)
    if not any(getattr(draft, name, None) is not None for name in ROWS):
        note = "delta: the draft has neither a head nor embeddings of its own; those of the target moved by themselves"
        return StartResult(draft, notes=(note,))
    moved = copy.deepcopy(draft)
    changed, notes, maps = [], [], {}
    for name, part in ROWS.items():
        layer = getattr(moved, name, None)
        if layer is None:
            continue
        if getattr(layer, "low_rank", None) is not None:
            raise UserError(f"delta moves the rows of {name}, which carries a low-rank update; merge the draft first")
        old, new = part(base_target, draft), part(target, draft)
        if torch.equal(old, new):
            continue
        norm_H = norm_weight(draft.before_head, draft.config.hidden_size) if name == "lm_head" else None
        found = fit_row_map(old, layer.weight, norm_H, context.seed)
        with torch.no_grad():
            shift = found.step * found(new - old)
            layer.weight.copy_((layer.weight.double() + shift.to(layer.weight.device)).to(layer.weight.dtype))
        maps[name] = {"kind": found.kind, "errors": found.errors, "step": found.step}
        changed.append(f"{name}.weight")
        share = float(shift.norm() / draft.get_submodule(name).weight.detach().double().norm().clamp(min=1e-30))
        left = ", ".join(f"{kind} {error:.3f}" for kind, error in found.errors.items())
        notes.append(
            f"delta: {name} moved by {share:.2%} of its size through the map {found.kind!r} "
            f"(held-out error {left}; step {found.step:.2f})"
        )
    if not changed:
        notes.append(
            "delta: fine-tuning changed neither the head nor the final norm of the target, so there is nothing to move"
        )
    return StartResult(moved if changed else draft, tuple(changed), tuple(notes), details=maps)


def _head(target: Any, draft: Any) -> Tensor:
    """Head rows of the draft's vocabulary times the final norm's weight, [D, F] in float64."""
    rows = target.head.weight[draft.vocabulary().to(target.head.weight.device)].double()
    return rows * norm_weight(target.norm, target.hidden_size)


def _embedding(target: Any, draft: Any) -> Tensor:
    return target.embedding.weight.double()


ROWS = {"lm_head": _head, "embed_tokens": _embedding}


STARTS.register("delta")(Start(frozenset({"base_target"}), "head rows moved by the target's own change", delta))
