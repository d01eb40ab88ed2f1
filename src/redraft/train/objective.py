"""What a training step minimises: from a packed batch to one number to differentiate.

A draft family names its objective (``draft.objective``, by default "unroll"). The trainer knows none of them.

Shape legend: M supervised anchors, J draft steps, D draft vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft.losses import LOSSES
from redraft.target import Target
from redraft.teacher.unroll import Batch, supervised, unroll

if TYPE_CHECKING:
    from redraft.train.loop import TrainConfig


class Objective(Protocol):
    """A callable that gives the scalar loss of a batch, ready for ``backward``."""

    def __call__(self, batch: Batch) -> Tensor: ...


class UnrollObjective:
    """Training-time test (EAGLE-3, arXiv 2503.01840) under a loss of the registry."""

    def __init__(self, draft: Any, target: Target, config: TrainConfig) -> None:
        """Raises ``UserError`` for an unknown loss."""
        self.draft, self.target, self.config = draft, target, config
        self.loss = LOSSES.get(config.loss)
        self.head_DF = target.head.weight[draft.vocabulary().to(target.device)]

    def teacher_logits(self, batch: Batch) -> Tensor:
        """The target's logits [M, D] at the draft vocabulary alone, of the token that each anchor predicts."""
        with torch.no_grad():
            return self.target.scale_logits(F.linear(batch.hidden_M, self.head_DF))

    def __call__(self, batch: Batch) -> Tensor:
        """The weighted mean over draft steps of the mean loss over supervised anchors."""
        config = self.config
        teacher_MD = self.teacher_logits(batch)
        inside_MJ = supervised(self.draft, batch)
        total, weights = torch.zeros((), device=teacher_MD.device), 0.0
        for step, states in enumerate(unroll(self.draft, self.target.embedding, batch, config.unroll)):
            index = inside_MJ[:, step].nonzero().squeeze(-1)
            if not len(index):
                break
            # The teacher of step j at an anchor is the teacher of step 0 at the j-th anchor after it.
            summed, count = self.loss(self.draft.logits(states[index]), teacher_MD[index + step], None)
            total = total + config.step_decay**step * summed / count
            weights += config.step_decay**step
        return total / max(weights, 1e-9)


class WithExtraLoss:
    """An objective plus what the draft itself asks for, such as the load balance of routed experts."""

    def __init__(self, objective: Objective, draft: Any) -> None:
        self.objective, self.draft = objective, draft

    def __call__(self, batch: Batch) -> Tensor:
        """The objective's loss plus ``draft.extra_loss()``, which the forward pass has filled and reading clears."""
        return self.objective(batch) + self.draft.extra_loss()


def make_objective(draft: Any, target: Target, config: TrainConfig) -> Objective:
    """The objective that the draft's family trains with. Raises ``UserError`` for an unknown loss."""
    kind = getattr(draft, "objective", "unroll")
    if kind == "regression":
        from redraft.train.regression import RegressionObjective

        objective: Objective = RegressionObjective(draft, target, config)
    elif kind == "unroll":
        objective = UnrollObjective(draft, target, config)
    else:
        raise ValueError(f"{type(draft).__name__} names the objective {kind!r}; there are unroll and regression")
    return WithExtraLoss(objective, draft) if hasattr(draft, "extra_loss") else objective
