"""EAGLE-3's objective: training-time test under a loss of the registry.

Shape legend: M supervised anchors, N those of a portion at a step, J draft steps, D draft vocabulary, H draft width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft.drafts.eagle.blocks import Plan, unrolled
from redraft.drafts.eagle.unroll import Batch, collate, supervised
from redraft.drafts.layers import cast_once
from redraft.drafts.proposing import Reduce, Weights, alone, shared
from redraft.features import FeatureSource
from redraft.losses.portions import portions, sum_over_portions
from redraft.registries import LOSSES
from redraft.rows import TokenRow
from redraft.settings.training import TrainConfig
from redraft.target import Head

# Draft and teacher logits that stand in memory at once, counted in numbers: 256 MiB in float32, which keeps any device
# busy. A CPU is a third faster with 64 MiB: larger matrices are given back to the system after every use, and fetching
# their pages again costs more than the arithmetic on them.
PORTION_NUMBERS = {"cpu": 2**24, "cuda": 2**26}
# Anchors of a portion at least, where a batch is long.
LEAST_PORTION = 128


class UnrollObjective:
    """Training-time test (EAGLE-3, arXiv 2503.01840).

    Head and loss run over portions of anchors, all draft steps of an anchor in the same portion: then the teacher's
    logits, which step j reads j anchors on, are computed once for all steps and dropped with the portion (the J - 1
    anchors behind its end are the only ones computed twice), and a loss over whole chains has its steps together.
    """

    # A row may come in spans.
    spans = True

    def __init__(
        self, draft: Any, target: Head, config: TrainConfig, portion_numbers: int | None = None, reduce: Reduce = alone
    ) -> None:
        """``portion_numbers``: by default what suits the device. ``reduce`` sums counts and statistics over workers.

        Raises ``UserError`` for an unknown loss.
        """
        self.draft, self.target, self.config, self.reduce = draft, target, config, reduce
        self.loss = LOSSES.get(config.loss)
        self.portion_numbers = portion_numbers or PORTION_NUMBERS.get(target.device.type, 2**26)
        vocabulary, bias = draft.vocabulary().to(target.device), target.head.bias
        # Of a whole vocabulary there is no need of a copy.
        whole = len(vocabulary) == len(target.head.weight)
        self.head_DF = target.head.weight if whole else target.head.weight[vocabulary]
        self.bias_D = None if bias is None else bias[vocabulary]

    def collate(self, rows: Sequence[TokenRow], features: FeatureSource, weights: Weights = None) -> Batch:
        """See :class:`redraft.drafts.proposing.Objective`."""
        return collate(rows, features, self.config.unroll, weights)

    def teacher_logits(self, batch: Batch, anchors: slice = slice(None)) -> Tensor:
        """The target's logits [M, D] at the draft vocabulary alone, of the token that each anchor predicts."""
        with torch.no_grad():
            return self.target.scale_logits(F.linear(batch.hidden_M[anchors], self.head_DF, self.bias_D))

    def weights(self, batch: Batch, inside_MJ: Tensor) -> Tensor:
        """What each anchor's loss at each step counts for, [M, J]; over all workers they sum to 1.

        The mean over anchors of a step, and over steps with weights that decay. A loss over chains weighs steps by
        itself: every reached step counts the same. Where the batch brings weights, one mean over all states.
        """
        if batch.weight_MJ is not None:
            weight_MJ = batch.weight_MJ * inside_MJ
            return weight_MJ / self.reduce(weight_MJ.sum()).clamp(min=1e-9)
        inside = inside_MJ.float()
        if hasattr(self.loss, "chain"):
            return inside / self.reduce(inside.sum()).clamp(min=1)
        counts_J = self.reduce(inside.sum(0))
        decays_J = self.config.step_decay ** torch.arange(inside.shape[1], device=inside.device) * (counts_J > 0)
        return inside * (decays_J / counts_J.clamp(min=1) / decays_J.sum().clamp(min=1e-9))

    def __call__(self, batch: Batch) -> Tensor:
        """The weighted mean of the loss over anchors and draft steps, plus the balance of routed experts."""
        inside_MJ = supervised(self.draft, batch)
        weight_MJ = self.weights(batch, inside_MJ) * inside_MJ
        steps = max(1, int((weight_MJ > 0).any(0).sum()))
        plan = Plan.of(self.draft, batch, steps, self.config.activation_memory * 2**30)
        states = unrolled(self.draft, self.target.embedding, batch, steps, plan)
        size = max(1, self.portion_numbers // ((steps + 1) * len(self.head_DF)) - steps + 1)
        if plan is not None:
            # Every portion reads the whole head, and where it is trained adds to a gradient of its size.
            size = max(size, LEAST_PORTION)
        slices = portions(len(inside_MJ), size)
        loss = self.loss
        if hasattr(loss, "statistics"):
            loss = partial(loss, statistics=self.statistics(batch, weight_MJ, slices, states))

        def value(part: slice, states: list[Tensor]) -> Tensor:
            with cast_once(self.draft.lm_head):
                draft, teacher, weight = self.rows(batch, weight_MJ, part, states, plan is not None)
            if hasattr(loss, "chain"):
                return loss.chain(draft, teacher, weight_MJ[part, :steps])
            sums = [loss(*step)[0] for step in zip(draft, teacher, weight, strict=True)]
            return torch.stack(sums).sum()

        trained = [p for p in self.draft.parameters() if p.requires_grad]
        return sum_over_portions(value, slices, states, trained) + shared(self.draft.extra_loss(), self.reduce)

    def rows(
        self, batch: Batch, weight_MJ: Tensor, part: slice, states: list[Tensor], together: bool = False
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Step by step the supervised anchors of a portion: draft logits, teacher logits [N, D] and weights [N].

        ``together`` the head runs once for all steps, so that a trained one has one gradient of its size and not one a
        step.
        """
        # The teacher of step j at an anchor is the teacher of step 0 at the j-th anchor after it.
        teacher_MD = self.teacher_logits(batch, slice(part.start, part.stop + len(states) - 1))
        chosen = [weight_MJ[part, step].nonzero().squeeze(-1) for step in range(len(states))]
        picked = [states_MH[index] for states_MH, index in zip(states, chosen, strict=True)]
        if together:
            draft = list(self.draft.logits(torch.cat(picked)).split([len(index) for index in chosen]))
        else:
            draft = [self.draft.logits(states_NH) for states_NH in picked]
        teacher = [teacher_MD[index + step] for step, index in enumerate(chosen)]
        return draft, teacher, [weight_MJ[part, step][index] for step, index in enumerate(chosen)]

    def statistics(self, batch: Batch, weight_MJ: Tensor, slices: list[slice], states: list[Tensor]) -> Tensor:
        """The loss's statistics over every supervised anchor and step of all workers: one pass of its own."""
        found = []
        with torch.no_grad():
            for part in slices:
                draft, teacher, _ = self.rows(batch, weight_MJ, part, [s[part] for s in states])
                found += [self.loss.statistics(*step) for step in zip(draft, teacher, strict=True)]
            return self.reduce(torch.stack(found).sum(0))
