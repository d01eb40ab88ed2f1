"""An EAGLE draft over stored responses: one teacher-forced unroll holds the rounds from every anchor.

Shape legend: M packed anchors, A anchors of one response, J draft steps, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from redraft.drafts import agreement
from redraft.drafts.eagle.unroll import Batch, collate, unroll
from redraft.features import FeatureSource
from redraft.rows import AnyRow, anchor_batches, anchors
from redraft.settings.sampler import Sampler
from redraft.target import Head

Judge = Callable[[int, Tensor, Tensor], Tensor]
"""(step, places of the anchors that are left, their states) -> which of them go on."""


class EagleWalk:
    """See :class:`redraft.drafts.proposing.Walk`."""

    # Anchors that are walked at once, and where whole distributions are compared.
    batch_anchors, alpha_anchors = 1024, 256

    def __init__(self, draft: Any, target: Head) -> None:
        self.draft, self.target = draft.bind(target), target

    def runs(
        self, rows: Sequence[AnyRow], features: FeatureSource | None, gamma: int
    ) -> Iterator[tuple[AnyRow, list[int]]]:
        for group, batch in self.batches(rows, features, gamma, self.batch_anchors):
            for row, part in zip(group, self.matches(batch, gamma).split([*map(anchors, group)]), strict=True):
                yield row, part.tolist()

    def chances(
        self, rows: Sequence[AnyRow], features: FeatureSource | None, gamma: int, sampler: Sampler
    ) -> Iterator[tuple[AnyRow, Tensor]]:
        for group, batch in self.batches(rows, features, gamma, self.batch_anchors):
            if sampler.greedy:
                runs_M = self.matches(batch, gamma)
                chances_MJ = (torch.arange(gamma, device=runs_M.device) < runs_M.unsqueeze(-1)).float()
            else:
                chances_MJ = self.accepted(batch, gamma, sampler)
            yield from zip(group, chances_MJ.cpu().split([*map(anchors, group)]), strict=True)

    def alphas(self, rows: Sequence[AnyRow], features: FeatureSource | None) -> Iterator[tuple[AnyRow, float]]:
        vocabulary = self.draft.vocabulary()
        for group, batch in self.batches(rows, features, 1, self.alpha_anchors):
            with torch.inference_mode(), agreement.autocast(self.target.device, self.target.dtype):
                logits_MD = self.draft.logits(next(unroll(self.draft, self.target.embedding, batch, 1)))
            overlap_M = agreement.overlap(logits_MD, self.target.logits(batch.hidden_M), vocabulary)
            for row, part in zip(group, overlap_M.split([*map(anchors, group)]), strict=True):
                yield row, float(part.mean())

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
            found = vocabulary[agreement.likeliest(self.draft.logits, states)] == batch.future_MJ[places, step]
            runs_M[places[found]] += 1
            return found

        self.draft_on(batch, gamma, right)
        return runs_M

    @torch.inference_mode()
    def accepted(self, batch: Batch, gamma: int, sampler: Sampler) -> Tensor:
        """w [M, J]: the chance that the j-th token behind each anchor came by acceptance, given that it came."""
        future_MJ = batch.future_MJ
        place_V = agreement.places(self.draft.vocabulary(), self.target.vocab_size)
        # The target's probability of a token does not depend on where the round began: one row of logits an anchor.
        target_M = agreement.probability(self.target.logits, batch.hidden_M, future_MJ[:, 0], sampler)
        chances_MJ = torch.zeros(len(target_M), gamma, device=target_M.device)

        def reached(step: int, places: Tensor, states: Tensor) -> Tensor:
            # What no round reaches is not drafted at all.
            ids = future_MJ[places, step]
            index = torch.where(ids >= 0, place_V[ids.clamp(min=0)], -1)
            found = agreement.sayable_probability(self.draft.logits, states, index, sampler)
            # Anchors of a row stand side by side, so the target's row of step j is that of the anchor j places on.
            towards = target_M[(places + step).clamp(max=len(target_M) - 1)]
            chances_MJ[places, step] = agreement.accepted_given_text(found, towards)
            return chances_MJ[places, step] > 0

        self.draft_on(batch, gamma, reached)
        return chances_MJ

    def draft_on(self, batch: Batch, gamma: int, judge: Judge) -> None:
        """Unroll at most ``gamma`` steps, each from the anchors alone that the step before was worth it for."""
        places = torch.arange(len(batch.future_MJ), device=batch.future_MJ.device)
        with agreement.autocast(self.target.device, self.target.dtype):
            drafting = unroll(self.draft, self.target.embedding, batch, gamma)
            states = next(drafting)
            for step in range(gamma):
                keep = judge(step, places, states)
                places = places[keep]
                if step + 1 == gamma or not len(places):
                    break
                states = drafting.send(keep)
