"""The unroll of long rows in blocks of anchors, so that memory grows with what is kept of a position and no faster.

An anchor needs the keys and values of the text in front of it and nothing of other anchors. So these are made first, by
blocks of positions; then the draft steps of one block of anchors after another. In training a block's inner states are
dropped and made again in its backward pass (activation checkpointing); what stays is, for each position, its keys and
values, and for each anchor its states. The numbers are those of :func:`~redraft.drafts.eagle.unroll.unroll` but for the
order of sums. A batch whose activations fit is not divided: it costs what it did, to the bit.

Shape legend: as in ``unroll.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from redraft.drafts.eagle.attention import ChunkedAttention
from redraft.drafts.eagle.unroll import Batch, narrowed, unroll, unroll_from
from redraft.drafts.layers import Router, attend_causally, cast_once
from redraft.errors import UserError

# A block takes a part of what is allowed: the rest is for what is kept of the whole batch.
BLOCK_SHARE, SCORE_SHARE = 1 / 8, 1 / 32
LEAST_CHUNK, MOST_CHUNK = 64, 4096


@dataclass(frozen=True)
class Sizes:
    """What the activations of a draft take, in bytes; ``kept`` says that a backward pass follows, which keeps them."""

    anchor: float  # an anchor at all steps, but for attention
    position: float  # a position of the text, while its keys are made
    score: float  # a score of every head on one key, at all steps

    @classmethod
    def of(cls, draft: Any, batch: Batch, steps: int, kept: bool) -> Sizes:
        config = draft.config
        item = 8 if batch.hidden_M.dtype == torch.float64 else 4
        heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size + config.private_width
        layer = 8 * hidden + 4 * heads + 4 * keys + 4 * inner
        taps = batch.taps_N.shape[-1]
        depth, times = config.num_layers, steps if kept else 1
        anchor = item * layer * (times * depth)
        position = item * (2 * taps + 8 * hidden + 3 * keys + (layer if depth > 1 else 0))
        # While scores become weights four matrices of them stand at once; one and a half are kept of each step.
        score = config.num_attention_heads * item * (4.0 + 1.5 * times * depth * kept)
        return cls(anchor, position, score)

    def whole(self, batch: Batch) -> float:
        """Of a batch that is not divided."""
        padded = batch.query_BA.numel() * batch.key_BT.shape[1]
        return self.anchor * len(batch.anchor_M) + self.position * len(batch.ids_N) + self.score * padded


@dataclass(frozen=True)
class Plan:
    """How many anchors, positions and keys a block has."""

    anchors: int
    positions: int
    keys: int

    @classmethod
    def of(cls, draft: Any, batch: Batch, steps: int, limit: float) -> Plan | None:
        """None where the activations of the batch, taken at once, keep to ``limit`` bytes.

        Raises ``UserError`` for a limit that not even one anchor keeps to.
        """
        sizes = Sizes.of(draft, batch, steps, torch.is_grad_enabled())
        if sizes.whole(batch) <= limit:
            return None
        least = sizes.anchor + sizes.score * LEAST_CHUNK + sizes.position
        if least > limit:
            raise UserError(
                f"activation_memory of {limit / 2**30:.3g} GiB does not hold one position of this draft, which takes "
                f"{least / 2**30:.3g}; give more"
            )
        share = limit * BLOCK_SHARE
        anchors = max(1, int(share / (sizes.anchor + sizes.score * LEAST_CHUNK)))
        keys = int(limit * SCORE_SHARE / (sizes.score * anchors))
        return cls(anchors, max(1, int(share / sizes.position)), min(max(keys, LEAST_CHUNK), MOST_CHUNK))


def unrolled(draft: Any, embedding: nn.Module, batch: Batch, steps: int, plan: Plan | None) -> list[Tensor]:
    """Pre-norm states [M, H] of every draft step at every anchor."""
    if plan is None:
        with cast_once(*draft.layers):
            return list(unroll(draft, embedding, batch, steps))
    again = partial(_again, draft)
    states_M, text = _text(draft, embedding, batch, plan, again)
    run = partial(_states, draft, embedding, steps, plan)
    parts = _blocks(batch, plan.anchors)
    found = [again(run, _block(batch, part), states_M[part], text) for part in parts]
    return [torch.cat(step) for step in zip(*found, strict=True)]


def in_blocks(draft: Any, embedding: nn.Module, batch: Batch, steps: int, limit: float) -> Iterator[tuple[slice, Any]]:
    """Blocks of anchors, each with its unroll (see :func:`~redraft.drafts.eagle.unroll.unroll`); one block where all
    keep to ``limit`` bytes. Without gradients. Raises ``UserError`` as :meth:`Plan.of`."""
    plan = Plan.of(draft, batch, steps, limit)
    if plan is None:
        yield slice(0, len(batch.anchor_M)), unroll(draft, embedding, batch, steps)
        return
    states_M, text = _text(draft, embedding, batch, plan, lambda run, *inputs: run(*inputs))
    for part in _blocks(batch, plan.anchors):
        yield part, _unroll_block(draft, embedding, steps, plan, _block(batch, part), states_M[part], text)


# -- one block ---------------------------------------------------------------------------------------------------------
Text = list[tuple[Tensor, Tensor]]
"""Keys and values [N, E, W] of every layer."""
Again = Callable[..., Any]


def _again(draft: Any, run: Callable[..., Any], *inputs: Any) -> Any:
    """``run(*inputs)``, whose inner states are not kept but made again in the backward pass."""
    if not torch.is_grad_enabled():
        return run(*inputs)
    contexts = lambda: (nullcontext(), _uncounted(draft))  # noqa: E731
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def _uncounted(draft: nn.Module) -> Iterator[None]:
    """What routers see here they have seen before."""
    seen = [(module, list(module.seen)) for module in draft.modules() if isinstance(module, Router)]
    try:
        yield
    finally:
        for module, before in seen:
            module.seen = before


def _blocks(batch: Batch, size: int) -> Iterator[slice]:
    """Anchors in slices of at most ``size``, counting what pads their rows; a row that is longer is divided."""
    begin = end = rows = most = 0
    for count in batch.row_M.bincount().tolist():
        if rows and (rows + 1) * max(most, count) > size:
            yield slice(begin, end)
            begin, rows, most = end, 0, 0
        end += count
        while end - begin > size and not rows:
            yield slice(begin, begin + size)
            begin += size
        rows, most = rows + 1, max(most, min(count, end - begin))
    if end > begin:
        yield slice(begin, end)


def _block(batch: Batch, part: slice) -> Batch:
    """The batch with these anchors alone, over the text that they see."""
    chosen_M = torch.zeros(len(batch.anchor_M), dtype=torch.bool, device=batch.anchor_M.device)
    chosen_M[part] = True
    found = narrowed(batch, chosen_M)
    seen = int(batch.positions_N[found.anchor_M].max()) + 1
    found.key_BT = found.key_BT[:, :seen]
    return found


def _unroll_block(
    draft: Any, embedding: nn.Module, steps: int, plan: Plan, block: Batch, states_M: Tensor, text: Text
) -> Any:
    """The unroll of a block; ``states_M`` enter the last layer at its anchors."""
    windows = draft.config.reach
    stores = [ChunkedAttention(block, *each, window, plan.keys) for each, window in zip(text, windows, strict=True)]
    embeds_M = draft.embed(block.ids_N[block.anchor_M], embedding)
    inputs = draft.layers[-1].inputs(embeds_M, states_M)
    return unroll_from(draft, embedding, block, stores, inputs, steps)


def _states(
    draft: Any, embedding: nn.Module, steps: int, plan: Plan, block: Batch, states_M: Tensor, text: Text
) -> tuple[Tensor, ...]:
    with cast_once(*draft.layers):
        return tuple(_unroll_block(draft, embedding, steps, plan, block, states_M, text))


# -- the text ----------------------------------------------------------------------------------------------------------
def _text(draft: Any, embedding: nn.Module, batch: Batch, plan: Plan, again: Again) -> tuple[Tensor, Text]:
    """What enters the last layer at every anchor [M, H], and each layer's keys and values, by blocks of positions."""
    parts = [slice(n, n + plan.positions) for n in range(0, len(batch.ids_N), plan.positions)]
    row_N = (batch.positions_N == 0).long().cumsum(0) - 1
    text: Text = []

    def joined(run: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        found = [again(run, part, *(x[part] for x in inputs)) for part in parts]
        return tuple(map(torch.cat, zip(*found, strict=True)))

    def begin(part: slice, taps_N: Tensor) -> tuple[Tensor]:
        return (draft.fuse(taps_N),)

    (states_N,) = joined(begin, batch.taps_N)
    for number, (layer, window) in enumerate(zip(draft.layers, draft.config.reach, strict=True)):
        followed = number + 1 < len(draft.layers)

        def read(part: slice, states_N: Tensor, layer: Any = layer, followed: bool = followed) -> tuple[Tensor, ...]:
            x_N, _ = layer.inputs(draft.embed(batch.ids_N[part], embedding), states_N)
            rope_N, attention = draft.rotary(batch.positions_N[part]), layer.self_attn
            keys_values = attention.keys_values(x_N, rope_N)
            return (*keys_values, attention.queries(x_N, rope_N)) if followed else keys_values

        keys_NEW, values_NEW, *queries = joined(read, states_N)
        text.append((keys_NEW, values_NEW))
        if followed:
            parts_NXW = (*queries, keys_NEW, values_NEW)
            query, key, value = (x[batch.key_BT].transpose(1, 2) for x in parts_NXW)
            mixed_NQW = attend_causally(query, key, value, window).transpose(1, 2)[row_N, batch.positions_N]

            def finish(part: slice, states_N: Tensor, mixed_NQW: Tensor, layer: Any = layer) -> tuple[Tensor]:
                _, residual_N = layer.inputs(draft.embed(batch.ids_N[part], embedding), states_N)
                return (layer.finish(residual_N, mixed_NQW),)

            (states_N,) = joined(finish, states_N, mixed_NQW)
    return states_N[batch.anchor_M], text
