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

    ``value`` may use any of ``parameters`` (leaves, each named once) and reads the states as they are given to it;
    whatever else it reads gets no gradient. Where gradients are off, it is a plain sum.
    """
    if not torch.is_grad_enabled():
        return torch.stack([value(part, [s[part] for s in states]) for part in slices]).sum()
    return _Portions.apply(value, list(slices), len(states), *states, *parameters)


class _Portions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Value, slices: list[slice], count: int, *inputs: Tensor) -> Tensor:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        # States get theirs portion by portion, parameters a running sum.
        gathered: list[Any] = [torch.zeros_like(x) if i < count and i in wanted else None for i, x in enumerate(inputs)]
        values = []
        for part in slices:
            local = [*(s[part].detach() for s in inputs[:count]), *inputs[count:]]
            with torch.enable_grad():
                for i in wanted:
                    local[i].requires_grad_()
                result = value(part, local[:count])
            values.append(result.detach())
            if not result.requires_grad:
                continue
            found = torch.autograd.grad(result, [local[i] for i in wanted], allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                if gradient is not None and i < count:
                    gathered[i][part] = gradient
                elif gradient is not None:
                    gathered[i] = gradient if gathered[i] is None else gathered[i].add_(gradient)
        ctx.gathered = gathered
        return torch.stack(values).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        gathered, ctx.gathered = ctx.gathered, None
        return None, None, None, *(None if g is None else g.mul_(outer.to(g.dtype)) for g in gathered)
