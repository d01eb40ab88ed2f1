"""The objective of a standalone draft: its words against a teacher's, at every response token, under any loss.

One teacher-forced pass gives the draft's distribution at every response token (prompts are read and not supervised).
Memory does not grow with vocabulary times sequence: head and loss run over portions of positions. A loss over chains
sees, at every position, the ``gamma`` next ones as the steps of a chain, for that is what a round drafts.

Shape legend: M supervised positions of a batch, N those of a portion, J steps of a chain, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from redraft.drafts.proposing import Reduce, alone
from redraft.drafts.standalone.causal import CausalModel
from redraft.features import FeatureSource
from redraft.registries import LOSSES
from redraft.rows import TokenRow, anchors
from redraft.settings.training import TrainConfig
from redraft.target import Head

TeacherLogits = Callable[[Tensor], Tensor]
"""Indices [N] into the supervised positions of some rows -> the teacher's logits [N, V] there."""


class Teacher(Protocol):
    """``of(rows, device)`` gives the teacher's logits at the supervised positions of rows, in their order."""

    @property
    def vocab_size(self) -> int: ...

    def of(self, rows: Sequence[Any], device: torch.device) -> TeacherLogits: ...


class StateTeacher:
    """The target's distribution, from its states through its head."""

    def __init__(self, target: Head, source: FeatureSource) -> None:
        self.target, self.source, self.vocab_size = target, source, target.vocab_size

    def of(self, rows: Sequence[TokenRow], device: torch.device) -> TeacherLogits:
        """See :class:`Teacher`."""
        hidden_MH = torch.cat([self.source.get(row)[1] for row in rows]).to(self.target.device)

        def logits(index_N: Tensor) -> Tensor:
            with torch.no_grad():
                return self.target.scale_logits(self.target.head(hidden_MH[index_N.to(hidden_MH.device)])).to(device)

        return logits


def size(row: TokenRow) -> int:
    return len(row.prompt_ids) + len(row.response_ids)


class Distillation:
    """The loss of some rows against their teacher, for any loss of the registry."""

    def __init__(
        self,
        causal: CausalModel,
        teacher: Teacher,
        loss: str,
        gamma: int,
        reduce: Reduce = alone,
    ) -> None:
        """``reduce`` adds batch statistics over workers. Raises ``UserError`` for an unknown loss."""
        self.causal, self.teacher, self.reduce = causal, teacher, reduce
        self.loss = LOSSES.get(loss)
        self.chained = hasattr(self.loss, "chain")
        self.steps = gamma if self.chained else 1
        # Tables of embeddings are padded to round sizes: nobody ever says the ids behind the smaller one.
        self.vocabulary = min(causal.vocab_size, teacher.vocab_size)

    def states(self, rows: Sequence[TokenRow]) -> list[Tensor]:
        """States [M, H] of the positions that predict a response token after the first; for a chain of J steps J
        tensors, of which number j holds the states j positions on (and anything behind the end of a row)."""
        states_TH = self.causal.states([[*row.prompt_ids, *row.response_ids[:-1]] for row in rows])
        where, start = [], 0
        for row in rows:
            begin, end = start + len(row.prompt_ids), start + size(row) - 1
            where.append(torch.arange(begin, end, device=states_TH.device))
            start = end
        index_M = torch.cat(where)
        return [states_TH[(index_M + j).clamp(max=len(states_TH) - 1)] for j in range(self.steps)]

    def inside(self, rows: Sequence[TokenRow]) -> Tensor:
        """Whether step j of the chain that begins at a position is in its row, [M, J], bool."""
        left_M = torch.cat([torch.arange(anchors(row), 0, -1) for row in rows])
        return (left_M[:, None] > torch.arange(self.steps)).to(self.causal.device)

    def pairs(self, rows: Sequence[TokenRow]) -> int:
        """How many pairs of a position and a step count."""
        return int(self.inside(rows).sum())

    def __call__(self, rows: Sequence[TokenRow], count: int, statistics: Tensor | None = None) -> Tensor:
        """The rows' sum of the loss over ``count``, the pairs of the whole step. ``statistics`` are the step's, where
        these rows are not all of it."""
        states, loss = self.states(rows), self.loss
        teacher, inside_MJ = self.teacher.of(rows, states[0].device), self.inside(rows)
        if hasattr(loss, "statistics"):
            if statistics is None:  # these rows are the whole step
                statistics = self.reduce(self.sums(states, teacher, inside_MJ))
            loss = partial(loss, statistics=statistics)

        def value(part: slice, states: list[Tensor]) -> Tensor:
            draft, theirs = self.logits(part, states, teacher, inside_MJ[part])
            if self.chained:
                return self.loss.chain(draft, theirs, inside_MJ[part].float() / count)
            return loss(draft[0], theirs[0])[0] / count

        return self.causal.portioned(value, states)

    def logits(
        self, part: slice, states: Sequence[Tensor], teacher: TeacherLogits, inside_NJ: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Step by step the draft's and the teacher's logits [N, V] of the positions of a portion that reach it."""
        draft, theirs = [], []
        for step, states_NH in enumerate(states):
            index = inside_NJ[:, step].nonzero().squeeze(-1)
            draft.append(self.causal.logits(states_NH[index])[..., : self.vocabulary])
            theirs.append(teacher(index + part.start + step)[..., : self.vocabulary])
        return draft, theirs

    def sums(self, states: Sequence[Tensor], teacher: TeacherLogits, inside_MJ: Tensor) -> Tensor:
        """The loss's own statistics over these positions."""
        found = []
        with torch.no_grad():
            for part in self.causal.slices(len(inside_MJ)):
                draft, theirs = self.logits(part, [s[part] for s in states], teacher, inside_MJ[part])
                found.append(self.loss.statistics(draft[0], theirs[0]))
            return torch.stack(found).sum(0)

    def statistics(self, micro: Sequence[Sequence[TokenRow]]) -> Tensor | None:
        """Statistics over the micro-batches of a step and all workers, in a pass of its own; None where the loss
        needs none, and where there is one micro-batch, which then sees to it itself."""
        if not hasattr(self.loss, "statistics") or len(micro) < 2:
            return None
        found = []
        with torch.no_grad():
            for rows in micro:
                states = self.states(rows)
                found.append(self.sums(states, self.teacher.of(rows, states[0].device), self.inside(rows)))
            return self.reduce(torch.stack(found).sum(0))


@dataclass
class TextBatch:
    """Rows, and where the target's states of them are."""

    rows: Sequence[TokenRow]
    features: FeatureSource

    def to(self, device: torch.device) -> TextBatch:
        """The same: what goes to a device is made of it there."""
        return self


class StandaloneObjective:
    """See :class:`redraft.drafts.proposing.Objective`: every position counts the same."""

    def __init__(self, draft: Any, target: Head, config: TrainConfig, reduce: Reduce = alone) -> None:
        """Raises ``UserError`` for an unknown loss."""
        self.causal, self.target, self.config, self.reduce = CausalModel(draft.model), target, config, reduce
        LOSSES.get(config.loss)

    def collate(
        self, rows: Sequence[TokenRow], features: FeatureSource, weights: Mapping[str, Tensor] | None = None
    ) -> TextBatch:
        assert weights is None
        return TextBatch(rows, features)

    def __call__(self, batch: TextBatch) -> Tensor:
        """The mean loss over the supervised positions of ``batch``, or over the steps of the chains there."""
        teacher = StateTeacher(self.target, batch.features)
        distillation = Distillation(self.causal, teacher, self.config.loss, self.config.gamma, self.reduce)
        count = self.reduce(torch.tensor(float(distillation.pairs(batch.rows)), device=self.causal.device))
        return distillation(batch.rows, int(count))
