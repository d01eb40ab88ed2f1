"""Losses that pull a draft's distribution towards its target's: one file a loss, found by the registry.

The contract of every entry: ``loss(draft_logits_ND, teacher_logits_ND, weight_N) -> (sum, count)``.

- Both logits are over the draft vocabulary. The teacher's are those rows of the target's head, so their softmax is
  the target's distribution restricted to the draft vocabulary and renormalised there.
- ``sum`` is the weighted sum over positions of a loss that is never negative, but for rounding, and is least where the
  two distributions are equal; ``count`` is the sum of the weights (N without weights). The trainer divides by the
  global count, so results depend neither on the batch split nor on the number of workers.
- Computed in float32 (float64 for float64 input) whatever the input. The teacher's logits carry no gradient.
- The gradient is the derivative of ``sum``: autograd's will do. In closed form it costs less memory (``rows.py``).

What a few losses need beside that they say by having one of these, and are held to the contract otherwise:

``least(teacher_logits_ND, weight_N)``
    The sum at equal distributions, where it is not 0 (cross-entropy: the teacher's entropy).
``hold(draft_logits_ND, teacher_logits_ND, weight_N)``
    The loss with what it treats as constant fixed at these logits, where the gradient is the derivative of that and
    not of ``sum`` itself (a mixing weight or a normaliser that is not differentiated).
``statistics(draft_logits_ND, teacher_logits_ND, weight_N)``
    Sums over positions of which the loss needs the whole batch's. They add over parts of a batch, its chunks, draft
    steps and workers; the total is given back as ``loss(..., statistics=total)``. Without it the positions at hand
    are the batch.
``sampled``
    True where the gradient is an estimate from torch's global random numbers; its expectation is then what the
    contract speaks of.
``chain(draft_logits, teacher_logits, weight_NJ)``
    The weighted sum over chains, given the logits of every step, for a loss of which the steps of a chain are not
    independent terms. The plain call is a chain of one.

Shape legend, of all files here: N positions, D draft vocabulary, J draft steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Loss: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
