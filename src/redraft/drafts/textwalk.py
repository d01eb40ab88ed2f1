"""Walks of a draft that reads text alone: one teacher-forced pass over stored responses.

What such a draft proposes at a position does not depend on where the round began, as long as every earlier proposal of
the round was accepted. One row of logits a position therefore holds all rounds, and the walks over them are exact:
greedy chains as decoded, sampled chains in expectation given the text (w is the same for every start).

Shape legend: A anchors of one response, J draft steps, T tokens, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft.drafts import agreement
from redraft.features import FeatureSource
from redraft.rows import AnyRow, anchors, length_batches
from redraft.settings.sampler import Sampler

BATCH_TOKENS = 2048


class TextWalk:
    """See :class:`redraft.drafts.proposing.Walk`. Without features the target computes its final states anew."""

    def __init__(
        self, draft: Any, target: Any, states: Callable[[Tensor], Tensor], batch_tokens: int = BATCH_TOKENS
    ) -> None:
        """``states(ids [B, T])`` gives the draft's states [B, T, H] behind every token of texts that are padded on the
        right; its ``logits`` and ``vocabulary`` say what follows."""
        self.draft, self.target, self.states, self.batch_tokens = draft.bind(target), target, states, batch_tokens

    @torch.inference_mode()
    def runs(
        self, rows: Sequence[AnyRow], features: FeatureSource | None, gamma: int
    ) -> Iterator[tuple[AnyRow, list[int]]]:
        vocabulary = self.draft.vocabulary()
        for row, states_AH in self.own(rows):
            best = vocabulary[agreement.likeliest(self.draft.logits, states_AH)].tolist()
            right = [a == b for a, b in zip(best, row.response_ids[1:], strict=True)]
            yield row, agreement.run_lengths(right, gamma)

    @torch.inference_mode()
    def chances(
        self, rows: Sequence[AnyRow], features: FeatureSource | None, gamma: int, sampler: Sampler
    ) -> Iterator[tuple[AnyRow, Tensor]]:
        if sampler.greedy:
            for row, runs in self.runs(rows, features, gamma):
                yield row, (torch.arange(gamma) < torch.tensor(runs)[:, None]).float()
            return
        place_V = agreement.places(self.draft.vocabulary(), self.target.vocab_size)
        known = {row.key: self.target_chances(row, hidden, sampler) for row, hidden in self.hidden(rows, features)}
        for row, states_AH in self.own(rows):
            index_A = place_V[torch.tensor(row.response_ids[1:], device=place_V.device)]
            mine_A = agreement.sayable_probability(self.draft.logits, states_AH, index_A, sampler).double().cpu()
            accepted_A = agreement.accepted_given_text(mine_A, known[row.key])
            yield row, F.pad(accepted_A, (0, gamma)).unfold(0, gamma, 1)[:-1]

    @torch.inference_mode()
    def alphas(self, rows: Sequence[AnyRow], features: FeatureSource | None) -> Iterator[tuple[AnyRow, float]]:
        vocabulary = self.draft.vocabulary()
        pairs = zip(self.own(rows), self.hidden(rows, features), strict=True)
        for (row, states_AH), (_, hidden_AH) in pairs:
            parts = zip(states_AH.split(agreement.CHUNK), hidden_AH.split(agreement.CHUNK), strict=True)
            logits = ((self.draft.logits(mine), self.target.logits(other)) for mine, other in parts)
            found = [agreement.overlap(mine, other, vocabulary) for mine, other in logits]
            yield row, float(torch.cat(found).mean())

    # -- states in front of every response token after the first -------------------------------------------------
    def own(self, rows: Sequence[AnyRow]) -> Iterator[tuple[AnyRow, Tensor]]:
        """Row by row the draft's states [A, H]. The draft is in evaluation mode meanwhile."""
        training = self.draft.training
        self.draft.eval()
        try:
            yield from self.in_front(rows, self.states, next(self.draft.parameters()).dtype)
        finally:
            self.draft.train(training)

    def hidden(self, rows: Sequence[AnyRow], features: FeatureSource | None) -> Iterator[tuple[AnyRow, Tensor]]:
        """Row by row the target's final-norm states [A, H], in the order of :meth:`own`."""
        if features is None:
            states = lambda ids_BT: self.target.forward(ids_BT, taps=False).hidden_BTH  # noqa: E731
            yield from self.in_front(rows, states, self.target.dtype)
            return
        for group in length_batches([row for row in rows if anchors(row)], self.batch_tokens):
            for row in group:
                yield row, features.get(row)[1].to(self.target.device)

    def target_chances(self, row: AnyRow, hidden_AH: Tensor, sampler: Sampler) -> Tensor:
        """The warped probability [A] that the target gives each response token after the first, on the CPU."""
        ids_A = torch.tensor(row.response_ids[1:], device=hidden_AH.device)
        return agreement.probability(self.target.logits, hidden_AH, ids_A, sampler).double().cpu()

    def in_front(
        self, rows: Sequence[AnyRow], states: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[AnyRow, Tensor]]:
        """Row by row the states [A, H] in front of every response token after the first; rows without any are left
        out."""
        for group in length_batches([row for row in rows if anchors(row)], self.batch_tokens):
            texts = [[*row.prompt_ids, *row.response_ids[:-1]] for row in group]
            ids_BT = torch.zeros(len(group), max(map(len, texts)), dtype=torch.long)
            for i, text in enumerate(texts):
                ids_BT[i, : len(text)] = torch.tensor(text)
            # Padding stands on the right, where no token looks.
            with agreement.autocast(self.target.device, dtype):
                states_BTH = states(ids_BT.to(self.target.device))
            for row, text, states_TH in zip(group, texts, states_BTH, strict=True):
                yield row, states_TH[len(row.prompt_ids) : len(text)]
