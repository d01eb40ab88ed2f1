"""Drafts over stored responses: how far draft and target agree, and the walk of a draft that reads text alone.

What such a draft proposes at a position does not depend on where the round began, as long as every earlier proposal of
the round was accepted. One row of logits a position therefore holds all rounds, and the walks over them are exact:
greedy chains as decoded, sampled chains in expectation given the text (w is the same for every start).

Shape legend: N rows, M positions, A anchors of one response, J draft steps, B texts, T tokens, H width, D draft
vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from redraft.drafts.proposing import Chances, Runs
from redraft.features import FeatureSource
from redraft.rows import AnyRow, anchors, length_batches
from redraft.sampling import token_probability
from redraft.settings.sampler import Sampler

Rowwise = Callable[[Tensor], Tensor]
States = Iterator[tuple[AnyRow, Tensor]]

# Rows of logits that probabilities are taken from at once: enough for the head's product, few enough for the cache.
CHUNK = 128
# Rows of logits whose best token is looked for at once: a family that speaks the whole vocabulary has wide ones.
ROWS = 256
# Tokens of a batch of whole texts.
BATCH_TOKENS = 2048


def likeliest(logits_of: Rowwise, states_NH: Tensor) -> Tensor:
    """The index [N] of the likeliest token of each row, in portions of ``ROWS``."""
    return torch.cat([logits_of(part).argmax(-1) for part in states_NH.split(ROWS)])


def probability(logits_of: Rowwise, states_NH: Tensor, index_N: Tensor, sampler: Sampler) -> Tensor:
    """The warped probability of one token a row, [N], in portions of ``CHUNK`` rows."""
    parts = zip(states_NH.split(CHUNK), index_N.split(CHUNK), strict=True)
    return torch.cat([token_probability(logits_of(states), index, sampler) for states, index in parts])


def sayable_probability(logits_of: Rowwise, states_NH: Tensor, index_N: Tensor, sampler: Sampler) -> Tensor:
    """As :func:`probability`, but 0 where the index is -1: what a draft cannot say needs no softmax."""
    wanted_N = index_N >= 0
    found_N = states_NH.new_zeros(len(index_N), dtype=torch.float32)
    if bool(wanted_N.any()):
        found_N[wanted_N] = probability(logits_of, states_NH[wanted_N], index_N[wanted_N], sampler)
    return found_N


def accepted_given_text(draft_N: Tensor, target_N: Tensor) -> Tensor:
    """min(1, draft / target) of tokens of the text.

    Where the target's probability is 0 by rounding (the token was drawn, so it was not), the limit is taken: 1 if the
    draft gives it any.
    """
    return torch.where(target_N > 0, (draft_N / target_N).clamp(max=1.0), (draft_N > 0).to(draft_N.dtype))


def places(vocabulary_D: Tensor, size: int) -> Tensor:
    """For every target id [V] its index in the draft vocabulary, -1 where the draft cannot say it."""
    place_V = torch.full((size,), -1, device=vocabulary_D.device)
    place_V[vocabulary_D] = torch.arange(len(vocabulary_D), device=vocabulary_D.device)
    return place_V


def overlap(draft_logits_MD: Tensor, target_logits_MV: Tensor, vocabulary_D: Tensor) -> Tensor:
    """sum_x min(target, draft) [M]; what the draft cannot say counts against it."""
    logits_MV = target_logits_MV.float()
    target_MD = (logits_MV[:, vocabulary_D] - logits_MV.logsumexp(-1, keepdim=True)).exp()
    return torch.minimum(target_MD, draft_logits_MD.float().softmax(-1)).sum(-1)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The precision that a walk computes in: bfloat16 beside a model of that type."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def run_lengths(right: list[bool], gamma: int) -> list[int]:
    """How many in a row are right from each place on, at most ``gamma``."""
    lengths, run = [], 0
    for hit in reversed(right):
        run = run + 1 if hit else 0
        lengths.append(min(run, gamma))
    return lengths[::-1]


class TextWalk:
    """See :class:`redraft.drafts.proposing.Walk`. Without features the target computes its final states anew."""

    def __init__(self, draft: Any, target: Any, states: Rowwise) -> None:
        """``states(ids [B, T])`` gives the draft's states [B, T, H] behind every token of texts that are padded on the
        right; its ``logits`` and ``vocabulary`` say what follows."""
        self.draft, self.target, self.states = draft.bind(target), target, states

    @torch.inference_mode()
    def runs(self, rows: Sequence[AnyRow], features: FeatureSource | None, gamma: int) -> Runs:
        vocabulary = self.draft.vocabulary()
        for row, states_AH in self.own(rows):
            best = vocabulary[likeliest(self.draft.logits, states_AH)].tolist()
            right = [a == b for a, b in zip(best, row.response_ids[1:], strict=True)]
            yield row, run_lengths(right, gamma)

    @torch.inference_mode()
    def chances(self, rows: Sequence[AnyRow], features: FeatureSource | None, gamma: int, sampler: Sampler) -> Chances:
        if sampler.greedy:
            for row, runs in self.runs(rows, features, gamma):
                yield row, (torch.arange(gamma) < torch.tensor(runs)[:, None]).float()
            return
        place_V = places(self.draft.vocabulary(), self.target.vocab_size)
        known = {row.key: self.target_chances(row, hidden, sampler) for row, hidden in self.hidden(rows, features)}
        for row, states_AH in self.own(rows):
            index_A = place_V[torch.tensor(row.response_ids[1:], device=place_V.device)]
            mine_A = sayable_probability(self.draft.logits, states_AH, index_A, sampler).double().cpu()
            accepted_A = accepted_given_text(mine_A, known[row.key])
            yield row, F.pad(accepted_A, (0, gamma)).unfold(0, gamma, 1)[:-1]

    @torch.inference_mode()
    def alphas(self, rows: Sequence[AnyRow], features: FeatureSource | None) -> Iterator[tuple[AnyRow, float]]:
        vocabulary = self.draft.vocabulary()
        pairs = zip(self.own(rows), self.hidden(rows, features), strict=True)
        for (row, states_AH), (_, hidden_AH) in pairs:
            parts = zip(states_AH.split(CHUNK), hidden_AH.split(CHUNK), strict=True)
            logits = ((self.draft.logits(mine), self.target.logits(other)) for mine, other in parts)
            found = [overlap(mine, other, vocabulary) for mine, other in logits]
            yield row, float(torch.cat(found).mean())

    # -- states in front of every response token after the first -------------------------------------------------
    def own(self, rows: Sequence[AnyRow]) -> States:
        """Row by row the draft's states [A, H]. The draft is in evaluation mode meanwhile."""
        training = self.draft.training
        self.draft.eval()
        try:
            yield from self.in_front(rows, self.states, next(self.draft.parameters()).dtype)
        finally:
            self.draft.train(training)

    def hidden(self, rows: Sequence[AnyRow], features: FeatureSource | None) -> States:
        """Row by row the target's final-norm states [A, H], in the order of :meth:`own`."""
        if features is None:
            states = lambda ids_BT: self.target.forward(ids_BT, taps=False).hidden_BTH  # noqa: E731
            yield from self.in_front(rows, states, self.target.dtype)
            return
        for group in length_batches([row for row in rows if anchors(row)], BATCH_TOKENS):
            for row in group:
                yield row, features.get(row)[1].to(self.target.device)

    def target_chances(self, row: AnyRow, hidden_AH: Tensor, sampler: Sampler) -> Tensor:
        """The warped probability [A] that the target gives each response token after the first, on the CPU."""
        ids_A = torch.tensor(row.response_ids[1:], device=hidden_AH.device)
        return probability(self.target.logits, hidden_AH, ids_A, sampler).double().cpu()

    def in_front(self, rows: Sequence[AnyRow], states: Rowwise, dtype: torch.dtype) -> States:
        """Row by row the states [A, H] in front of every response token after the first; rows without any are left
        out."""
        for group in length_batches([row for row in rows if anchors(row)], BATCH_TOKENS):
            texts = [[*row.prompt_ids, *row.response_ids[:-1]] for row in group]
            # Padding stands on the right, where no token looks.
            ids_BT = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
            with autocast(self.target.device, dtype):
                states_BTH = states(ids_BT.to(self.target.device))
            for row, text, states_TH in zip(group, texts, states_BTH, strict=True):
                yield row, states_TH[len(row.prompt_ids) : len(text)]
