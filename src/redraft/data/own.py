"""Answers by transformers' own generation, for targets whose text is not the same in passes of ours.

Prompts of the same length share a pass, so that nothing is padded: what padding does to a window or to a recurrent
state is nobody's business here. Draws are those of every engine of ours: a request's own uniforms, warped in one place.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from redraft.data.requests import Completion, Request, request_uniforms
from redraft.sampling import draw, warp
from redraft.target import Target


def own_generation(
    target: Target, requests: Sequence[Request], max_new_tokens: int, batch_size: int, ends: frozenset[int]
) -> Iterator[Completion]:
    """Answer every request through ``model.generate``; ``ends`` are the ids that end a response."""
    ordered = sorted(requests, key=lambda request: len(request.prompt_ids))
    for _, found in groupby(ordered, key=lambda request: len(request.prompt_ids)):
        group = list(found)
        for first in range(0, len(group), batch_size):
            yield from _answer(target, group[first : first + batch_size], max_new_tokens, ends)


@torch.inference_mode()
def _answer(target: Target, group: Sequence[Request], max_new_tokens: int, ends: frozenset[int]) -> list[Completion]:
    ids_BT = torch.tensor([list(request.prompt_ids) for request in group], device=target.device)
    length, last = ids_BT.shape[1], sorted(ends)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=last or None, pad_token_id=last[0] if last else 0
    )
    chooser = LogitsProcessorList([_Draws(group, length, max_new_tokens)])
    with _neutral(target.model):
        out_BT = target.model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            generation_config=settings,
            logits_processor=chooser,
        )
    return [_completion(request, row, ends) for request, row in zip(group, out_BT[:, length:].tolist(), strict=True)]


def _completion(request: Request, ids: list[int], ends: frozenset[int]) -> Completion:
    """The answer up to its end token; what stands behind pads the batch."""
    for place, token in enumerate(ids):
        if token in ends:
            return Completion(request, ids[: place + 1], "stop")
    return Completion(request, ids, "length")


@contextmanager
def _neutral(model: Any) -> Iterator[None]:
    """The model without the penalties and filters of its generation config: a request names its whole sampler."""
    kept = model.generation_config
    model.generation_config = GenerationConfig(bos_token_id=kept.bos_token_id)
    try:
        yield
    finally:
        model.generation_config = kept


class _Draws:
    """A logits processor that leaves one token possible: the one that the request's sampler draws."""

    def __init__(self, group: Sequence[Request], length: int, max_new_tokens: int) -> None:
        self.group, self.length = group, length
        self.rows = [row for row, request in enumerate(group) if not request.sampler.greedy]
        self.uniforms = {row: request_uniforms(group[row], max_new_tokens) for row in self.rows}

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        step = ids_BT.shape[1] - self.length
        for row in self.rows:
            chance = self.uniforms[row][step : step + 1].to(scores_BV.device)
            token = draw(warp(scores_BV[row : row + 1], self.group[row].sampler), chance)
            scores_BV = scores_BV.index_put(
                (torch.tensor([row], device=scores_BV.device),), torch.full_like(scores_BV[:1], float("-inf"))
            )
            scores_BV[row, token] = 0.0
        return scores_BV
