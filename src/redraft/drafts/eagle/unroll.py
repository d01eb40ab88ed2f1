"""Training-time test (EAGLE-3, arXiv 2503.01840): the draft unrolled over its own states, teacher-forced tokens.

At step j the anchor t predicts x_{t+2+j} from the state of step j - 1 and the token x_{t+1+j}, at position t + j.
Its query sees the keys of step 0 up to t and its own keys of steps 1 .. j, which is exactly what a decoding round
that starts at t sees. Only anchors are run through queries, MLP and head: prompt positions give keys and values
and nothing else. Linear layers see packed tokens without padding; only attention pads.

Shape legend: N packed pairs, M packed anchors, B rows, T longest row of pairs, A most anchors a row, H draft
width, Q query heads, G query heads a key head, E key heads, W head width, J draft steps, D draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from redraft.features import FeatureSource
from redraft.rows import TokenRow, anchors


@dataclass
class Batch:
    """Packed rows. ``future_MJ`` holds x_{t+2+j}, or -1 behind the end of the response; ``weight_MJ``, where there is
    one, what each state counts for in training."""

    ids_N: Tensor
    taps_N: Tensor
    positions_N: Tensor
    anchor_M: Tensor
    hidden_M: Tensor
    future_MJ: Tensor
    key_BT: Tensor
    query_BA: Tensor
    row_M: Tensor
    column_M: Tensor
    visible_BAT: Tensor
    weight_MJ: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return Batch(**moved)


def collate(
    rows: Sequence[TokenRow], features: FeatureSource, steps: int, weights: Mapping[str, Tensor] | None = None
) -> Batch:
    """Pack rows with their features for an unroll of ``steps`` draft steps; ``weights`` [A, J] by row key."""
    pairs = [len(r.prompt_ids) + anchors(r) - 1 for r in rows]
    counts = [anchors(r) for r in rows]
    starts = [sum(pairs[:i]) for i in range(len(rows))]
    firsts = [sum(counts[:i]) for i in range(len(rows))]
    ids, taps, hidden, future, anchor = [], [], [], [], []
    for row, size, count, start in zip(rows, pairs, counts, starts, strict=True):
        full = torch.tensor([*row.prompt_ids, *row.response_ids])
        row_taps, row_hidden = features.get(row)
        taps.append(row_taps)
        hidden.append(row_hidden)
        ids.append(full[1 : size + 1])
        first = len(row.prompt_ids) - 1
        padded = torch.cat([full, torch.full((steps,), -1)])
        future.append(padded[first + 2 :].unfold(0, steps, 1)[:count])
        anchor.append(torch.arange(first, first + count) + start)
    longest, most = max(pairs), max(counts)
    column_T, column_A = torch.arange(longest), torch.arange(most)
    pairs_B, counts_B = torch.tensor(pairs)[:, None], torch.tensor(counts)[:, None]
    first_B = torch.tensor([len(r.prompt_ids) - 1 for r in rows])[:, None, None]
    visible = (column_T[None, None] <= first_B + column_A[None, :, None]) & (column_T < pairs_B)[:, None]
    # Padded queries see key 0, so that no softmax is over nothing; nothing reads them.
    visible |= ((column_A >= counts_B)[:, :, None]) & (column_T == 0)[None, None]
    return Batch(
        ids_N=torch.cat(ids),
        taps_N=torch.cat(taps),
        positions_N=torch.cat([torch.arange(size) for size in pairs]),
        anchor_M=torch.cat(anchor),
        hidden_M=torch.cat(hidden),
        future_MJ=torch.cat(future),
        key_BT=torch.tensor(starts)[:, None] + column_T.clamp(max=longest).minimum(pairs_B - 1),
        query_BA=torch.tensor(firsts)[:, None] + column_A.minimum(counts_B - 1),
        row_M=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts)),
        column_M=torch.cat([torch.arange(count) for count in counts]),
        visible_BAT=visible,
        weight_MJ=None if weights is None else torch.cat([weights[row.key] for row in rows]),
    )


class UnrollAttention:
    """Keys of step 0, shared by all anchors of a row, and the own keys of later steps, one an anchor."""

    def __init__(self, batch: Batch, keys_NEW: Tensor, values_NEW: Tensor) -> None:
        self.batch = batch
        self.keys_BEWT = keys_NEW[batch.key_BT].permute(0, 2, 3, 1)
        self.values_BETW = values_NEW[batch.key_BT].transpose(1, 2)
        self.hidden_BT = ~batch.visible_BAT[:, None, None]
        self.own: list[tuple[Tensor, Tensor]] = []

    def __call__(self, query_MQW: Tensor, key_MEW: Tensor, value_MEW: Tensor) -> Tensor:
        """Later steps: remember the own key, then attend."""
        self.own.append((key_MEW, value_MEW))
        return self.attend(query_MQW)

    def attend(self, query_MQW: Tensor) -> Tensor:
        """Mixed values [M, Q, W]: one softmax over the shared keys and the anchor's own."""
        batch = self.batch
        rows, most = batch.query_BA.shape
        key_heads, width = self.values_BETW.shape[1], query_MQW.shape[-1]
        groups = query_MQW.shape[1] // key_heads
        query = query_MQW[batch.query_BA].view(rows, most, key_heads, groups, width).permute(0, 2, 3, 1, 4)
        query = query * (1 / math.sqrt(width))
        shared = query.reshape(rows, key_heads, groups * most, width) @ self.keys_BEWT
        shared = shared.view(rows, key_heads, groups, most, -1).float().masked_fill(self.hidden_BT, float("-inf"))
        own = [(query * self._padded(key)).sum(-1, keepdim=True).float() for key, _ in self.own]
        weights = torch.cat([shared, *own], -1).softmax(-1).to(query.dtype)
        length = shared.shape[-1]
        mixed = weights[..., :length].reshape(rows, key_heads, groups * most, length) @ self.values_BETW
        mixed = mixed.view(rows, key_heads, groups, most, width)
        for i, (_, value) in enumerate(self.own):
            mixed = mixed + weights[..., length + i, None] * self._padded(value)
        mixed = mixed.permute(0, 3, 1, 2, 4).reshape(rows, most, key_heads * groups, width)
        return mixed[batch.row_M, batch.column_M]

    def narrow(self, keep_M: Tensor) -> None:
        """Go on with the anchors of this mask [M] alone; rows without one are dropped."""
        batch = self.batch
        rows_M, columns_M = batch.row_M[keep_M], batch.column_M[keep_M]
        rows, row_M, counts_B = rows_M.unique_consecutive(return_inverse=True, return_counts=True)
        first_B = counts_B.cumsum(0) - counts_B
        column_M = torch.arange(len(rows_M), device=rows_M.device) - first_B[row_M]
        column_A = torch.arange(int(counts_B.max()), device=rows_M.device)
        query_BA = first_B[:, None] + column_A.minimum(counts_B[:, None] - 1)
        visible_BAT = batch.visible_BAT[rows[:, None], columns_M[query_BA]]
        self.batch = replace(
            batch, row_M=row_M, column_M=column_M, query_BA=query_BA, visible_BAT=visible_BAT, key_BT=batch.key_BT[rows]
        )
        self.keys_BEWT, self.values_BETW = self.keys_BEWT[rows], self.values_BETW[rows]
        self.hidden_BT = ~visible_BAT[:, None, None]
        self.own = [(key_MEW[keep_M], value_MEW[keep_M]) for key_MEW, value_MEW in self.own]

    def _padded(self, x_MEW: Tensor) -> Tensor:
        """[B, E, 1, A, W]: the anchors' own keys or values, to be shared by the query heads of a group."""
        return x_MEW[self.batch.query_BA].transpose(1, 2).unsqueeze(2)


def unroll(draft: Any, embedding: nn.Module, batch: Batch, steps: int) -> Generator[Tensor, Tensor | None, None]:
    """Pre-norm states [M, H] of draft steps 0 .. ``steps`` - 1 at every anchor.

    A mask [M] that is sent back drops anchors from all later steps: the next states are those of the anchors that
    are left, in their order. At least one must be.
    """
    layer, anchor_M, future_MJ = draft.midlayer, batch.anchor_M, batch.future_MJ
    fused_N = draft.fuse(batch.taps_N)
    x_N, residual_N = layer.inputs(draft.embed(batch.ids_N, embedding), fused_N)
    cosines, sines = draft.rotary(batch.positions_N)
    attention = UnrollAttention(batch, *layer.self_attn.keys_values(x_N, (cosines, sines)))
    query = layer.self_attn.queries(x_N[anchor_M], (cosines[anchor_M], sines[anchor_M]))
    states_M = layer.finish(residual_N[anchor_M], attention.attend(query))
    keep_M = yield states_M
    for step in range(1, steps):
        if keep_M is not None:
            attention.narrow(keep_M)
            states_M, anchor_M, future_MJ = states_M[keep_M], anchor_M[keep_M], future_MJ[keep_M]
        # Behind the end of a response any token will do: such anchors are not supervised at this step.
        ids_M = future_MJ[:, step - 1].clamp(min=0)
        positions_M = batch.positions_N[anchor_M] + step
        states_M = draft(draft.embed(ids_M, embedding), draft.carry(states_M), positions_M, attention)
        keep_M = yield states_M


def supervised(draft: Any, batch: Batch) -> Tensor:
    """Whether step j of an anchor can be reached and be right, [M, J].

    A chain reaches step j only through tokens that the draft can say, so an anchor is dropped from the first
    future token that lies outside the draft vocabulary or behind the end of the response.
    """
    inside = batch.future_MJ >= 0
    if draft.reduced:
        inside = inside & draft.t2d[batch.future_MJ.clamp(min=0)]
    return inside.long().cumprod(-1).bool()
