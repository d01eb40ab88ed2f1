"""The walk of EAGLE drafts over stored responses: one teacher-forced unroll holds the rounds from every anchor.

Shape legend: M packed anchors, H draft width, J draft steps, D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from redraft.drafts import walks
from redraft.drafts.eagle.blocks import in_blocks
from redraft.drafts.eagle.unroll import Batch, collate
from redraft.drafts.proposing import Chances, Runs
from redraft.features import FeatureSource
from redraft.rows import AnyRow, anchor_batches, anchors
from redraft.settings.sampler import Sampler
from redraft.settings.training import ACTIVATION_GIB
from redraft.target import Head

Judge = Callable[[int, Tensor, Tensor], Tensor]
"""(step, places of the anchors that are left, their states) -> which of them go on."""


class EagleWalk:
    """See :class:`redraft.drafts.proposing.Walk`."""

    # Anchors that are walked at once, and where whole distributions are compared.
    batch_anchors, alpha_anchors = 1024, 256
    # Bytes of activations that stand at once.
    memory = ACTIVATION_GIB * 2**30

    def __init__(self, draft: Any, target: Head) -> None:
        self.draft, self.target = draft.bind(target), target

    def runs(self, rows: Sequence[AnyRow], features: FeatureSource | None, gamma: int) -> Runs:
        for group, batch in self.batches(rows, features, gamma, self.batch_anchors):
            for row, part in zip(group, self.matches(batch, gamma).split([*map(anchors, group)]), strict=True):
                yield row, part.tolist()

    def chances(self, rows: Sequence[AnyRow], features: FeatureSource | None, gamma: int, sampler: Sampler) -> Chances:
        for group, batch in self.batches(rows, features, gamma, self.batch_anchors):
            if sampler.greedy:
                runs_M = self.matches(batch, gamma)
                chances_MJ = (torch.arange(gamma, device=runs_M.device) < runs_M.unsqueeze(-1)).float()
            else:
                chances_MJ = self.accepted(batch, gamma, sampler)
            yield from zip(group, chances_MJ.cpu().split([*map(anchors, group)]), strict=True)

    def alphas(self, rows: Sequence[AnyRow], features: FeatureSource | None) -> Iterator[tuple[AnyRow, float]]:
        for group, batch in self.batches(rows, features, 1, self.alpha_anchors):
            for row, part in zip(group, self.overlaps(batch).split([*map(anchors, group)]), strict=True):
                yield row, float(part.mean())

    def overlaps(self, batch: Batch) -> Tensor:
        """sum_x min(target, draft) [M] at the first drafted position of every anchor."""
        draft, target, vocabulary = self.draft, self.target, self.draft.vocabulary()
        precision = walks.autocast(target.device, target.dtype)
        with torch.inference_mode(), precision:
            blocks = in_blocks(draft, target.embedding, batch, 1, self.memory)
            states_MH = torch.cat([next(drafting) for _, drafting in blocks])
        # Of each position stand at once the logits of both, their probabilities and what they have in common.
        size = max(1, int(self.memory // (4 * (2 * target.vocab_size + 3 * len(vocabulary)))))
        found = []
        for states, hidden in zip(states_MH.split(size), batch.hidden_M.split(size), strict=True):
            with torch.inference_mode(), precision:
                logits_MD = draft.logits(states)
            found.append(walks.overlap(logits_MD, target.logits(hidden), vocabulary))
        return torch.cat(found)

    def batches(
        self, rows: Sequence[AnyRow], features: FeatureSource | None, gamma: int, batch_anchors: int
    ) -> Iterator[tuple[list[AnyRow], Batch]]:
        """Rows of similar length with what an unroll reads of them."""
        assert features is not None
        for group in anchor_batches(sorted(rows, key=lambda r: r.key), batch_anchors):
            yield group, collate(group, features, gamma).to(self.target.device)

    @torch.inference_mode()
    def matches(self, batch: Batch, gamma: int) -> Tensor:
        """How many proposals in a row are right when a round starts at each anchor, [M], at most ``gamma``.

        An anchor whose proposal was wrong is not drafted from any further.
        """
        vocabulary = self.draft.vocabulary()
        runs_M = torch.zeros(len(batch.future_MJ), dtype=torch.long, device=batch.future_MJ.device)

        def right(step: int, places: Tensor, states: Tensor) -> Tensor:
            found = vocabulary[walks.likeliest(self.draft.logits, states)] == batch.future_MJ[places, step]
            runs_M[places[found]] += 1
            return found

        self.draft_on(batch, gamma, right)
        return runs_M

    @torch.inference_mode()
    def accepted(self, batch: Batch, gamma: int, sampler: Sampler) -> Tensor:
        """w [M, J]: the chance that the j-th token behind each anchor came by acceptance, given that it came."""
        future_MJ = batch.future_MJ
        place_V = walks.places(self.draft.vocabulary(), self.target.vocab_size)
        # The target's probability of a token does not depend on where the round began: one row of logits an anchor.
        target_M = walks.probability(self.target.logits, batch.hidden_M, future_MJ[:, 0], sampler)
        chances_MJ = torch.zeros(len(target_M), gamma, device=target_M.device)

        def reached(step: int, places: Tensor, states: Tensor) -> Tensor:
            # What no round reaches is not drafted at all.
            ids = future_MJ[places, step]
            index = torch.where(ids >= 0, place_V[ids.clamp(min=0)], -1)
            found = walks.sayable_probability(self.draft.logits, states, index, sampler)
            # Anchors of a row stand side by side, so the target's row of step j is that of the anchor j places on.
            towards = target_M[(places + step).clamp(max=len(target_M) - 1)]
            chances_MJ[places, step] = walks.accepted_given_text(found, towards)
            return chances_MJ[places, step] > 0

        self.draft_on(batch, gamma, reached)
        return chances_MJ

    def draft_on(self, batch: Batch, gamma: int, judge: Judge) -> None:
        """Unroll at most ``gamma`` steps, each from the anchors alone that the step before was worth it for."""
        every = torch.arange(len(batch.future_MJ), device=batch.future_MJ.device)
        with walks.autocast(self.target.device, self.target.dtype):
            for part, drafting in in_blocks(self.draft, self.target.embedding, batch, gamma, self.memory):
                places, states = every[part], next(drafting)
                for step in range(gamma):
                    keep = judge(step, places, states)
                    places = places[keep]
                    if step + 1 == gamma or not len(places):
                        break
                    states = drafting.send(keep)
