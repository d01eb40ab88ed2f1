"""A sum over positions whose gradient is computed portion by portion, together with its value.

Logits are positions x vocabulary, and autograd would keep such matrices of the whole batch, for every draft step,
until the backward pass. The sum is a scalar, so its gradient is known up to one factor when its value is: each
portion's graph is built, differentiated and dropped before the next one is. What stays is the gradient of the
states [M, H] and one of every trained parameter that the portions use; nothing is computed twice.

Shape legend: M positions, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Value = Callable[[slice, list[Tensor]], Tensor]
"""(positions, the states at these positions) -> a scalar."""


def portions(count: int, size: int) -> list[slice]:
    """``count`` positions in slices of ``size``, the last one shorter; one empty slice when there are none."""
    return [slice(begin, min(begin + size, count)) for begin in range(0, max(count, 1), max(size, 1))]


def sum_over_portions(
    value: Value, slices: Sequence[slice], states: Sequence[Tensor], parameters: Sequence[Tensor]
) -> Tensor:
    """sum of ``value(part, [s[part] for s in states])`` over ``slices``, differentiable once.

    ``value`` may use any of ``parameters`` (leaves that require a gradient) and reads the states as they are given
    to it; whatever else it reads gets no gradient. Where gradients are off, it is a plain sum.
    """
    if not torch.is_grad_enabled():
        return _total([value(part, [s[part] for s in states]) for part in slices])
    return _Portions.apply(value, list(slices), len(states), *states, *parameters)


class _Portions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Value, slices: list[slice], count: int, *inputs: Tensor) -> Tensor:
        states, parameters = inputs[:count], [p for p in inputs[count:] if p.requires_grad]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3 : 3 + count]) if needed]
        gathered: list[Tensor | None] = [torch.zeros_like(states[i]) for i in wanted]
        gathered += [None] * len(parameters)
        values = []
        for part in slices:
            local = [s[part].detach() for s in states]
            with torch.enable_grad():
                for i in wanted:
                    local[i].requires_grad_()
                result = value(part, local)
            values.append(result.detach())
            if result.requires_grad:
                sources = [*(local[i] for i in wanted), *parameters]
                found = torch.autograd.grad(result, sources, allow_unused=True)
                _gather(gathered, found, part, len(wanted))
        places = {id(p): len(wanted) + i for i, p in enumerate(parameters)}
        ctx.places = [None] * 3
        ctx.places += [wanted.index(i) if i in wanted else None for i in range(count)]
        ctx.places += [places.get(id(p)) for p in inputs[count:]]
        ctx.gathered = gathered
        return _total(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        gathered, ctx.gathered = ctx.gathered, None
        scaled = [None if g is None else g.mul_(outer.to(g.dtype)) for g in gathered]
        return tuple(None if place is None else scaled[place] for place in ctx.places)


def _gather(gathered: list[Tensor | None], found: Sequence[Tensor | None], part: slice, states: int) -> None:
    """Add a portion's gradients: states at their positions, parameters as a running sum."""
    for i, gradient in enumerate(found):
        if gradient is None:
            continue
        held = gathered[i]
        if i < states:
            assert held is not None
            held[part] = gradient
        elif held is None:
            gathered[i] = gradient
        else:
            held.add_(gradient)


def _total(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum()
