"""Acceptance of a greedy chain without decoding: one teacher-forced unroll over stored greedy responses.

While every earlier proposal of a round was accepted, the draft's inputs are the target's own tokens, so the
teacher-forced unroll gives the very proposals that decoding would make; walking the rounds then gives the chain's
acceptance. An average over all positions would be too high, because rounds start where the last one failed.

Shape legend: M packed anchors, J draft steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from redraft.data.store import Row
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.target import Target
from redraft.teacher.features import FeatureStore, anchors
from redraft.teacher.unroll import Batch, collate, unroll


def anchor_batches(rows: Sequence[Row], batch_anchors: int) -> Iterator[list[Row]]:
    """Rows of similar length together, at most ``batch_anchors`` supervised positions a batch.

    Rows of equal length keep the order they are given in.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=lambda r: len(r.prompt_ids) + len(r.response_ids)):
        if not anchors(row):
            continue
        if batch and sum(anchors(r) for r in batch) + anchors(row) > batch_anchors:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def matches(draft: Eagle3Draft, target: Target, batch: Batch, gamma: int) -> Tensor:
    """How many proposals in a row are right when a round starts at each anchor, [M], at most ``gamma``."""
    vocabulary = draft.vocabulary()
    right = []
    for step, states in enumerate(unroll(draft, target.embedding, batch, gamma)):
        right.append(vocabulary[draft.logits(states).argmax(-1)] == batch.future_MJ[:, step])
    return torch.stack(right, -1).long().cumprod(-1).sum(-1)


def walk(run_lengths: Sequence[int]) -> list[int]:
    """Accepted tokens of each round, from the run length at every anchor of one response."""
    accepted, at = [], 0
    while at < len(run_lengths):
        accepted.append(run_lengths[at])
        at += run_lengths[at] + 1
    return accepted


@torch.inference_mode()
def simulate_greedy_chain(
    draft: Eagle3Draft,
    target: Target,
    rows: Sequence[Row],
    store: FeatureStore,
    gamma: int,
    batch_anchors: int = 1024,
) -> dict[str, list[int]]:
    """Accepted draft tokens of every round, by row key. ``rows`` must hold greedy responses of this target.

    Accepted tokens are counted up to the end of the response; verification may accept more behind an end token,
    which nobody sees.
    """
    accepted: dict[str, list[int]] = {}
    dtype = target.dtype
    for group in anchor_batches(sorted(rows, key=lambda r: r.key), batch_anchors):
        batch = collate(group, store, gamma).to(target.device)
        with torch.autocast(target.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            runs = matches(draft, target, batch, gamma)
        for row, part in zip(group, runs.split([anchors(r) for r in group]), strict=True):
            accepted[row.key] = walk(part.tolist())
    return accepted


def tau_of(accepted: dict[str, list[int]], rows: Sequence[Row]) -> float:
    """tau_pooled of a simulation: tokens after the first of every response, over rounds."""
    rounds = sum(len(a) for a in accepted.values())
    return sum(anchors(r) for r in rows if r.key in accepted) / rounds if rounds else 0.0


@torch.inference_mode()
def row_alphas(
    draft: Eagle3Draft, target: Target, rows: Sequence[Row], store: FeatureStore, batch_anchors: int = 256
) -> list[float]:
    """alpha of the first drafted position, averaged over each row's anchors, in the order of ``rows``.

    The target's probabilities are over its whole vocabulary, so what the draft cannot say counts against it. Rows
    without an anchor give 0.
    """
    alphas = {row.key: 0.0 for row in rows}
    vocabulary = draft.vocabulary()
    for group in anchor_batches(sorted(rows, key=lambda r: r.key), batch_anchors):
        batch = collate(group, store, 1).to(target.device)
        with torch.autocast(target.device.type, torch.bfloat16, enabled=target.dtype == torch.bfloat16):
            states = next(unroll(draft, target.embedding, batch, 1))
            draft_probs = draft.logits(states).float().softmax(-1)
        logits = target.logits(batch.hidden_M).float()
        target_probs = (logits[:, vocabulary] - logits.logsumexp(-1, keepdim=True)).exp()
        overlap = torch.minimum(target_probs, draft_probs).sum(-1)
        for row, part in zip(group, overlap.split([anchors(r) for r in group]), strict=True):
            alphas[row.key] = float(part.mean())
    return [alphas[row.key] for row in rows]
