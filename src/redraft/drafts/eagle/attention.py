"""Attention of anchors over a long text without a matrix of anchors times tokens.

What :class:`~redraft.drafts.eagle.unroll.UnrollAttention` computes at once is computed here by chunks of keys, with a
running maximum and sum (online softmax, arXiv 1805.02867), and again by chunks in the backward pass, from the logarithm
of the sum alone (FlashAttention, arXiv 2205.14135). It is exact: the same sum in another order. The keys and values of
the text are kept once, whatever the number of draft steps. On CUDA a fused kernel does the same (``flex.py``).

Shape legend: B rows, E key heads, G query heads a key head, A most anchors a row, T positions of a row, C those of a
chunk, W head width, M packed anchors, Q query heads, I own keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from redraft.drafts.eagle.flex import fused_attention
from redraft.drafts.eagle.unroll import Batch, UnrollAttention


class ChunkedAttention(UnrollAttention):
    """As its parent, for some anchors of a batch, which see a text of any length."""

    def __init__(self, batch: Batch, keys_NEW: Tensor, values_NEW: Tensor, window: int, chunk: int) -> None:
        """``chunk`` keys of the text are compared with at once. A batch of one row has its own keys alone."""
        super().__init__(batch, keys_NEW, values_NEW, window)
        self.chunk = chunk

    def of_rows(self, packed_NEW: Tensor) -> Tensor:
        """Without a copy where there is one row."""
        key_BT = self.batch.key_BT
        if len(key_BT) > 1:
            return packed_NEW[key_BT]
        return packed_NEW[int(key_BT[0, 0]) :][: key_BT.shape[1]].unsqueeze(0)

    def attend(self, query_MQW: Tensor) -> Tensor:
        """Mixed values [M, Q, W]: one softmax over the shared keys and the anchor's own."""
        query = self._queries(query_MQW)
        keys, values = self.keys_BEWT.mT.to(query.dtype), self.values_BETW.to(query.dtype)
        last_BA = self.places()
        first_BA = last_BA + len(self.own) - self.window + 1 if self.window else torch.zeros_like(last_BA)
        own = [tuple(self._padded(part)[:, :, 0].to(query.dtype) for part in pair) for pair in self._seen()]
        mixed = fused_attention(query, keys, values, first_BA, last_BA, own)
        if mixed is None:
            flat = [part for pair in own for part in pair]
            mixed = _ByChunks.apply(query, keys, values, first_BA, last_BA, self.chunk, *flat)
        return self._packed(mixed)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores and sums are computed in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class _ByChunks(torch.autograd.Function):
    """Scaled queries [B, E, G, A, W] on keys and values [B, E, T, W] of positions ``first_BA`` to ``last_BA``, and on
    own keys and values [B, E, A, W], as many as there are."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        first_BA: Tensor,
        last_BA: Tensor,
        chunk: int,
        *own: Tensor,
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            high = sum_dtype(query.dtype)
            own_scores = [(query * key.unsqueeze(2)).sum(-1).to(high) for key in own[::2]]
            most = query.new_full(query.shape[:-1], -torch.inf, dtype=high)
            for score in own_scores:
                most = torch.maximum(most, score)
            total, mixed = torch.zeros_like(most), torch.zeros_like(query, dtype=high)
            for score, value in zip(own_scores, own[1::2], strict=True):
                weight = (score - most).exp()
                total, mixed = total + weight, mixed + weight.unsqueeze(-1) * value.unsqueeze(2)
            for part in chunks(first_BA, last_BA, chunk):
                scores = _scores(query, keys, first_BA, last_BA, part)
                higher = torch.maximum(most, scores.amax(-1))
                # Where nothing was seen yet there is nothing to scale: -inf less -inf is no number.
                shrink = (most - higher).exp().nan_to_num_(0.0)
                weights = scores.sub_(higher.nan_to_num(neginf=0.0).unsqueeze(-1)).exp_()
                total = total * shrink + weights.sum(-1)
                mixed = mixed.mul_(shrink.unsqueeze(-1)).add_(_rows(weights.to(query.dtype), values[:, :, part]))
                most = higher
            mixed = mixed.div_(total.unsqueeze(-1)).to(query.dtype)
            ctx.chunk = chunk
            ctx.save_for_backward(query, keys, values, first_BA, last_BA, mixed, most + total.log(), *own)
            return mixed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, first_BA, last_BA, mixed, log_total, *own = ctx.saved_tensors
        high = log_total.dtype
        with torch.autocast(query.device.type, enabled=False):
            outer = outer.to(query.dtype)
            delta = (outer.to(high) * mixed.to(high)).sum(-1)
            query_grad = torch.zeros_like(query, dtype=high)
            key_grad, value_grad, own_grads = torch.zeros_like(keys), torch.zeros_like(values), list[Tensor]()
            for part in chunks(first_BA, last_BA, ctx.chunk):
                weights = _scores(query, keys, first_BA, last_BA, part).sub_(log_total.unsqueeze(-1)).exp_()
                value_grad[:, :, part] = _columns(weights.to(query.dtype), outer)
                towards = _rows(outer, values[:, :, part].mT).to(high).sub_(delta.unsqueeze(-1))
                moved = weights.mul_(towards).to(query.dtype)
                del towards
                query_grad += _rows(moved, keys[:, :, part])
                key_grad[:, :, part] = _columns(moved, query)
            for key, value in zip(own[::2], own[1::2], strict=True):
                weight = ((query * key.unsqueeze(2)).sum(-1).to(high) - log_total).exp()
                towards = (outer * value.unsqueeze(2)).sum(-1).to(high)
                moved = (weight * (towards - delta)).unsqueeze(-1)
                query_grad += moved * key.unsqueeze(2)
                own_grads.append((moved * query).sum(2).to(key.dtype))
                own_grads.append((weight.unsqueeze(-1) * outer).sum(2).to(value.dtype))
        return query_grad.to(query.dtype), key_grad, value_grad, None, None, None, *own_grads


def chunks(first_BA: Tensor, last_BA: Tensor, size: int) -> Iterator[slice]:
    """Slices of ``size`` positions that hold all positions which any anchor sees."""
    begin, end = max(0, int(first_BA.min())), int(last_BA.max()) + 1
    for start in range(begin, end, size):
        yield slice(start, min(start + size, end))


def _scores(query: Tensor, keys: Tensor, first_BA: Tensor, last_BA: Tensor, part: slice) -> Tensor:
    """Scores [B, E, G, A, C] of a chunk of keys, -inf where an anchor does not see one."""
    position_C = torch.arange(part.start, part.stop, device=query.device)
    hidden_BAC = (position_C > last_BA.unsqueeze(-1)) | (position_C < first_BA.unsqueeze(-1))
    scores = _rows(query, keys[:, :, part].mT).to(sum_dtype(query.dtype))
    return scores.masked_fill_(hidden_BAC[:, None, None], -torch.inf)


def _rows(x: Tensor, y_BEXY: Tensor) -> Tensor:
    """[B, E, G, A, Y] = [B, E, G, A, X] @ [B, E, X, Y], the heads of a group in one product."""
    return (x.flatten(2, 3) @ y_BEXY).unflatten(2, x.shape[2:4])


def _columns(x: Tensor, y: Tensor) -> Tensor:
    """[B, E, X, Y] = sum over groups and anchors of [B, E, G, A, X] times [B, E, G, A, Y]."""
    return x.flatten(2, 3).mT @ y.flatten(2, 3)
