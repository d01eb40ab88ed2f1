"""Losses that pull a draft's distribution towards its target's: one file a loss, found by the registry.

The contract of every entry: ``loss(draft_logits_ND, teacher_logits_ND, weight_N) -> (sum, count)``.

- Both logits are over the draft vocabulary. The teacher's are those rows of the target's head, so their softmax is
  the target's distribution restricted to the draft vocabulary and renormalised there.
- ``sum`` is the weighted sum over positions of a loss that is never negative and is least where the two
  distributions are equal; ``count`` is the sum of the weights (N without weights). The trainer divides by the
  global count, so results depend neither on the batch split nor on the number of workers.
- Computed in float32 (float64 for float64 input) whatever the input; gradients reach the draft's logits alone.

Shape legend: N positions, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from redraft.registry import Registry

Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]

LOSSES: Registry[Loss] = Registry("loss", package="redraft.losses")
