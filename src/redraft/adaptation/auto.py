"""gamma=auto from prompts: the target answers them, the features of its answers give every chain's acceptance, then
the shapes are timed and compared (:mod:`redraft.decode.auto`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from redraft.adaptation.probe import greedy_answers
from redraft.decode.auto import Pick, pick_shape
from redraft.drafts.base import Draft
from redraft.evaluate.speed import Prompt
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import Shape
from redraft.target import Target

# Prompts that every tree decodes (and, when the target samples, every chain).
DECODED_PROMPTS = 3


@torch.inference_mode()
def run_lengths(
    target: Target, draft: Draft, prompts: Sequence[Prompt], max_new_tokens: int, longest: int
) -> list[list[int]]:
    """How many proposals in a row are right from each anchor of each greedy response, at most ``longest``."""
    draft = draft.eval().to(target.device)
    with greedy_answers(target, draft, prompts, max_new_tokens) as (rows, store):
        return [runs for _, runs in draft.walk(target).runs(rows, store, longest)]


def auto_shape(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    sampler: Sampler | None = None,
    longest: int = 8,
    trees: Sequence[Shape] | None = None,
    greedy_drafts: bool = False,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> Pick:
    """The fastest shape for these prompts on this machine, or no draft; ``Pick.sentence`` says why.

    A greedy target answers all prompts, batched, for the acceptance of every chain of up to ``longest``; the first
    three are decoded by every tree. Raises ``UserError`` without prompts, for ``longest`` below 1, or when the
    answers are too short to measure anything.
    """
    walked: list[list[int]] | None = None
    if longest >= 1 and (sampler is None or sampler.greedy):
        walked = run_lengths(target, draft, prompts, max_new_tokens, longest)
    ids = [prompt.ids for prompt in prompts[:DECODED_PROMPTS]]
    return pick_shape(target, draft, ids, walked, longest, trees, sampler, greedy_drafts, max_new_tokens, seed)
