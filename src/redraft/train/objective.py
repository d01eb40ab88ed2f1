"""What a training step minimises: from a packed batch to one number to differentiate.

A draft family names its objective (``draft.objective``, by default "unroll"). The trainer knows none of them.

Shape legend: M supervised anchors, N those of a portion at a step, J draft steps, D draft vocabulary, H draft width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft.acceptance.unroll import Batch, supervised, unroll
from redraft.registries import LOSSES
from redraft.target import Target
from redraft.train.portions import portions, sum_over_portions

if TYPE_CHECKING:
    from redraft.train.trainer import TrainConfig


class Objective(Protocol):
    """A callable that gives the scalar loss of a batch, ready for ``backward``."""

    def __call__(self, batch: Batch) -> Tensor: ...


# Draft and teacher logits that stand in memory at once, counted in numbers: 256 MiB in float32, which keeps any device
# busy. A CPU is a third faster with 64 MiB: larger matrices are given back to the system after every use, and fetching
# their pages again costs more than the arithmetic on them.
PORTION_NUMBERS = {"cpu": 2**24, "cuda": 2**26}


def sum_over_workers(sums: Tensor) -> Tensor:
    """The sum over all workers of a distributed run; of a single process, its own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums


class UnrollObjective:
    """Training-time test (EAGLE-3, arXiv 2503.01840) under a loss of the registry.

    Head and loss run over portions of anchors, all draft steps of an anchor in the same portion: then the teacher's
    logits, which step j reads j anchors on, are computed once for all steps and dropped with the portion (the J - 1
    anchors behind its end are the only ones computed twice), and a loss over whole chains has its steps together.
    """

    def __init__(
        self,
        draft: Any,
        target: Target,
        config: TrainConfig,
        portion_numbers: int | None = None,
        reduce: Callable[[Tensor], Tensor] = sum_over_workers,
    ) -> None:
        """``portion_numbers``: by default what suits the device. ``reduce`` adds batch statistics over workers.

        Raises ``UserError`` for an unknown loss.
        """
        self.draft, self.target, self.config, self.reduce = draft, target, config, reduce
        self.loss = LOSSES.get(config.loss)
        self.portion_numbers = portion_numbers or PORTION_NUMBERS.get(target.device.type, 2**26)
        vocabulary, bias = draft.vocabulary().to(target.device), target.head.bias
        self.head_DF, self.bias_D = target.head.weight[vocabulary], None if bias is None else bias[vocabulary]

    def teacher_logits(self, batch: Batch, anchors: slice = slice(None)) -> Tensor:
        """The target's logits [M, D] at the draft vocabulary alone, of the token that each anchor predicts."""
        with torch.no_grad():
            return self.target.scale_logits(F.linear(batch.hidden_M[anchors], self.head_DF, self.bias_D))

    def weights(self, batch: Batch, inside_MJ: Tensor) -> Tensor:
        """What each anchor's loss at each step counts for, [M, J]; they sum to 1.

        The mean over anchors of a step, and over steps with weights that decay. A loss over chains weighs steps by
        itself: every reached step counts the same.
        """
        inside = inside_MJ.float()
        if hasattr(self.loss, "chain"):
            return inside / inside.sum().clamp(min=1)
        counts_J = inside.sum(0)
        decays_J = self.config.step_decay ** torch.arange(inside.shape[1], device=inside.device) * (counts_J > 0)
        return inside * (decays_J / counts_J.clamp(min=1) / decays_J.sum().clamp(min=1e-9))

    def __call__(self, batch: Batch) -> Tensor:
        """The weighted mean of the loss over anchors and draft steps."""
        inside_MJ = supervised(self.draft, batch)
        weight_MJ = self.weights(batch, inside_MJ) * inside_MJ
        steps = max(1, int((weight_MJ > 0).any(0).sum()))
        states = list(unroll(self.draft, self.target.embedding, batch, steps))
        size = max(1, self.portion_numbers // ((steps + 1) * len(self.head_DF)) - steps + 1)
        slices = portions(len(inside_MJ), size)
        loss = self.loss
        if hasattr(loss, "statistics"):
            loss = partial(loss, statistics=self.statistics(batch, weight_MJ, slices, states))

        def value(part: slice, states: list[Tensor]) -> Tensor:
            draft, teacher, weight = self.rows(batch, weight_MJ, part, states)
            if hasattr(loss, "chain"):
                return loss.chain(draft, teacher, weight_MJ[part, :steps])
            sums = [loss(*step)[0] for step in zip(draft, teacher, weight, strict=True)]
            return torch.stack(sums).sum()

        trained = [p for p in self.draft.parameters() if p.requires_grad]
        return sum_over_portions(value, slices, states, trained)

    def rows(
        self, batch: Batch, weight_MJ: Tensor, part: slice, states: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Step by step the supervised anchors of a portion: draft logits, teacher logits [N, D] and weights [N]."""
        draft, teacher, weight = [], [], []
        # The teacher of step j at an anchor is the teacher of step 0 at the j-th anchor after it.
        teacher_MD = self.teacher_logits(batch, slice(part.start, part.stop + len(states) - 1))
        for step, states_MH in enumerate(states):
            weight_M = weight_MJ[part, step]
            index = weight_M.nonzero().squeeze(-1)
            draft.append(self.draft.logits(states_MH[index]))
            teacher.append(teacher_MD[index + step])
            weight.append(weight_M[index])
        return draft, teacher, weight

    def statistics(self, batch: Batch, weight_MJ: Tensor, slices: list[slice], states: list[Tensor]) -> Tensor:
        """The loss's statistics over every supervised anchor and step of all workers: one pass of its own."""
        found = []
        with torch.no_grad():
            for part in slices:
                draft, teacher, _ = self.rows(batch, weight_MJ, part, [s[part] for s in states])
                found += [self.loss.statistics(*step) for step in zip(draft, teacher, strict=True)]
            return self.reduce(torch.stack(found).sum(0))


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
    return with_extra_loss(objective, draft)


def with_extra_loss(objective: Objective, draft: Any) -> Objective:
    """The objective, plus what the draft itself asks for if it asks for anything."""
    return WithExtraLoss(objective, draft) if hasattr(draft, "extra_loss") else objective
