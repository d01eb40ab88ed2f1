"""Training-time test (EAGLE-3, arXiv 2503.01840): the draft unrolled over its own states, teacher-forced tokens.

At step j the anchor t predicts x_{t+2+j} from the state of step j - 1 and the token x_{t+1+j}, at position t + j.
Its query sees the keys of step 0 up to t and its own keys of steps 1 .. j, which is exactly what a decoding round
that starts at t sees. A layer with a window of W positions sees of these the keys of positions behind t + j - W, as
engines do while they decode; trainers differ there (speculators 0.9 keeps the window of step 0 and all own keys, at
any step), so that its later steps are not what is served where the text is longer than the window.

Only anchors are run through queries, MLP and head of the last layer: prompt positions give keys and values and nothing
else. Linear layers see packed tokens without padding; only attention pads.

One teacher-forced unroll holds the rounds from every anchor of a stored response, which is what the walk reads
(``walk.py``). Attention is here over all scores at once, which short rows want; long rows are unrolled block by block
(``blocks.py``).

Shape legend: N packed pairs, M packed anchors, B rows, T longest row of pairs, A most anchors a row, H draft
width, Q query heads, G query heads a key head, E key heads, W head width, J draft steps, D draft vocabulary, V target
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redraft.drafts.layers import attend_causally
from redraft.drafts.proposing import Weights
from redraft.features import FeatureSource
from redraft.rows import TokenRow, anchors, span_of


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
    weight_MJ: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return Batch(**moved)


def collate(rows: Sequence[TokenRow], features: FeatureSource, steps: int, weights: Weights = None) -> Batch:
    """Pack rows with their features for an unroll of ``steps`` draft steps; ``weights`` [A, J] by row key.

    The last anchors of a span go on into what follows it, and read the teacher there: up to ``steps`` - 1 anchors more
    stand behind it, which are not supervised.
    """
    spans = [span_of(row) for row in rows]
    ahead = [min(steps - 1, anchors(span.row) - span.start - span.count) for span in spans]
    first_B = torch.tensor([len(span.row.prompt_ids) + span.start - 1 for span in spans])
    counts_B = torch.tensor([span.count + more for span, more in zip(spans, ahead, strict=True)])
    pairs_B = first_B + counts_B
    ids, future, taps, hidden, weight = [], [], [], [], []
    for span, more, first, pairs in zip(spans, ahead, first_B.tolist(), pairs_B.tolist(), strict=True):
        full = torch.tensor([*span.row.prompt_ids, *span.row.response_ids])[: pairs + 2]
        ids.append(full[1 : pairs + 1])
        future.append(F.pad(full, (0, steps), value=-1)[first + 2 :].unfold(0, steps, 1)[: span.count + more])
        future[-1] = torch.where((torch.arange(span.count + more) < span.count)[:, None], future[-1], -1)
        row_taps, row_hidden = features.get(span.row)
        taps.append(row_taps[:pairs])
        hidden.append(row_hidden[span.start :][: span.count + more])
        if weights is not None:
            weight.append(F.pad(weights[span.key][span.start :][: span.count], (0, 0, 0, more)))
    starts_B, firsts_B = pairs_B.cumsum(0) - pairs_B, counts_B.cumsum(0) - counts_B
    row_M = torch.repeat_interleave(torch.arange(len(rows)), counts_B)
    column_M = torch.cat([torch.arange(count) for count in counts_B.tolist()])
    column_T, column_A = torch.arange(int(pairs_B.max())), torch.arange(int(counts_B.max()))
    pairs_B1, counts_B1 = pairs_B[:, None], counts_B[:, None]
    return Batch(
        ids_N=torch.cat(ids),
        taps_N=_joined(taps),
        positions_N=torch.cat([torch.arange(pairs) for pairs in pairs_B.tolist()]),
        anchor_M=(starts_B + first_B)[row_M] + column_M,
        hidden_M=_joined(hidden),
        future_MJ=torch.cat(future),
        key_BT=starts_B[:, None] + column_T.minimum(pairs_B1 - 1),
        query_BA=firsts_B[:, None] + column_A.minimum(counts_B1 - 1),
        row_M=row_M,
        column_M=column_M,
        weight_MJ=None if weights is None else torch.cat(weight),
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows' features in one tensor, without a copy where there is one row, which may be long."""
    return parts[0] if len(parts) == 1 and not parts[0].is_inference() else torch.cat(list(parts))


class UnrollAttention:
    """One layer's keys of step 0, shared by all anchors of a row, and the own keys of later steps, one an anchor.

    ``window`` is how many positions back the layer sees, 0 for all.
    """

    def __init__(self, batch: Batch, keys_NEW: Tensor, values_NEW: Tensor, window: int = 0) -> None:
        self.batch, self.window = batch, window
        self.keys_BEWT = self.of_rows(keys_NEW).permute(0, 2, 3, 1)
        self.values_BETW = self.of_rows(values_NEW).transpose(1, 2)
        self.own: list[tuple[Tensor, Tensor]] = []
        self.shared_mask: Tensor | None = None

    def of_rows(self, packed_NEW: Tensor) -> Tensor:
        """[B, T, E, W]: what is packed, row by row."""
        return packed_NEW[self.batch.key_BT]

    def __call__(self, query_MQW: Tensor, key_MEW: Tensor, value_MEW: Tensor) -> Tensor:
        """Later steps: remember the own key, then attend."""
        self.own.append((key_MEW, value_MEW))
        return self.attend(query_MQW)

    def attend(self, query_MQW: Tensor) -> Tensor:
        """Mixed values [M, Q, W]: one softmax over the shared keys and the anchor's own."""
        query = self._queries(query_MQW)
        rows, key_heads, groups, most, width = query.shape
        shared = query.reshape(rows, key_heads, groups * most, width) @ self.keys_BEWT
        shared = shared.view(rows, key_heads, groups, most, -1).float().masked_fill(self.hidden(), float("-inf"))
        seen = self._seen()
        own = [(query * self._padded(key)).sum(-1, keepdim=True).float() for key, _ in seen]
        weights = torch.cat([shared, *own], -1).softmax(-1).to(query.dtype)
        length = shared.shape[-1]
        mixed = weights[..., :length].reshape(rows, key_heads, groups * most, length) @ self.values_BETW
        mixed = mixed.view(rows, key_heads, groups, most, width)
        for i, (_, value) in enumerate(seen):
            mixed = mixed + weights[..., length + i, None] * self._padded(value)
        return self._packed(mixed)

    def _queries(self, query_MQW: Tensor) -> Tensor:
        """Scaled queries [B, E, G, A, W] of packed ones."""
        rows, most = self.batch.query_BA.shape
        key_heads, width = self.values_BETW.shape[1], query_MQW.shape[-1]
        groups = query_MQW.shape[1] // key_heads
        query = query_MQW[self.batch.query_BA].view(rows, most, key_heads, groups, width).permute(0, 2, 3, 1, 4)
        return query * (1 / math.sqrt(width))

    def _seen(self) -> list[tuple[Tensor, Tensor]]:
        """The own keys and values that are seen now: at step j number i stands j - i positions back."""
        return self.own[-self.window :] if self.window else self.own

    def _packed(self, mixed: Tensor) -> Tensor:
        """[M, Q, W] of [B, E, G, A, W]."""
        rows, _, _, most, width = mixed.shape
        return mixed.permute(0, 3, 1, 2, 4).reshape(rows, most, -1, width)[self.batch.row_M, self.batch.column_M]

    def hidden(self) -> Tensor:
        """Which keys of step 0 an anchor does not see now, [B, 1, 1, A, T]."""
        if self.shared_mask is None or self.window:
            anchor_BA1 = self.places().unsqueeze(-1)
            column_T = torch.arange(self.batch.key_BT.shape[1], device=anchor_BA1.device)
            hidden_BAT = column_T > anchor_BA1
            if self.window:
                hidden_BAT |= column_T <= anchor_BA1 + len(self.own) - self.window
            self.shared_mask = hidden_BAT[:, None, None]
        return self.shared_mask

    def places(self) -> Tensor:
        """The position [B, A] of every anchor at step 0. Of a place that pads the row's last anchor is taken, so that
        no softmax is over nothing."""
        return self.batch.positions_N[self.batch.anchor_M][self.batch.query_BA]

    def narrow(self, batch: Batch, keep_M: Tensor) -> None:
        """Go on with the anchors of this mask [M] alone, which ``batch`` is cut down to; see :func:`narrowed`."""
        rows = self.batch.row_M[keep_M].unique_consecutive()
        self.batch, self.shared_mask = batch, None
        self.keys_BEWT, self.values_BETW = self.keys_BEWT[rows], self.values_BETW[rows]
        self.own = [(key_MEW[keep_M], value_MEW[keep_M]) for key_MEW, value_MEW in self.own]

    def _padded(self, x_MEW: Tensor) -> Tensor:
        """[B, E, 1, A, W]: the anchors' own keys or values, to be shared by the query heads of a group."""
        return x_MEW[self.batch.query_BA].transpose(1, 2).unsqueeze(2)


def narrowed(batch: Batch, keep_M: Tensor) -> Batch:
    """The batch with the anchors of this mask [M] alone; rows without one are no rows of anchors any more."""
    rows, row_M, counts_B = batch.row_M[keep_M].unique_consecutive(return_inverse=True, return_counts=True)
    first_B = counts_B.cumsum(0) - counts_B
    column_M = torch.arange(len(row_M), device=row_M.device) - first_B[row_M]
    column_A = torch.arange(int(counts_B.max()), device=row_M.device)
    return replace(
        batch,
        anchor_M=batch.anchor_M[keep_M],
        hidden_M=batch.hidden_M[keep_M],
        future_MJ=batch.future_MJ[keep_M],
        weight_MJ=None if batch.weight_MJ is None else batch.weight_MJ[keep_M],
        key_BT=batch.key_BT[rows],
        query_BA=first_B[:, None] + column_A.minimum(counts_B[:, None] - 1),
        row_M=row_M,
        column_M=column_M,
    )


@dataclass
class Context:
    """What anchors read of the text in front of them: the input of the last layer at every position, as
    :meth:`EagleLayer.inputs` gives it, and the keys and values [N, E, W] of each layer."""

    x_N: Tensor
    residual_N: Tensor
    keys_values: list[tuple[Tensor, Tensor]]


def read_context(draft: Any, embedding: nn.Module, batch: Batch) -> Context:
    """A layer that another follows runs at every position, since that one makes keys of its states; the last one, which
    is the first as a rule, at the anchors alone."""
    rope_N = draft.rotary(batch.positions_N)
    embeds_N, states_N = draft.embed(batch.ids_N, embedding), draft.fuse(batch.taps_N)
    row_N = (batch.positions_N == 0).long().cumsum(0) - 1
    found: list[tuple[Tensor, Tensor]] = []
    for layer, window in zip(draft.layers, draft.config.reach, strict=True):
        x_N, residual_N = layer.inputs(embeds_N, states_N)
        keys_NEW, values_NEW = layer.self_attn.keys_values(x_N, rope_N)
        found.append((keys_NEW, values_NEW))
        if len(found) < len(draft.layers):
            parts = (layer.self_attn.queries(x_N, rope_N), keys_NEW, values_NEW)
            query, key, value = (part[batch.key_BT].transpose(1, 2) for part in parts)
            mixed_BTQW = attend_causally(query, key, value, window).transpose(1, 2)
            states_N = layer.finish(residual_N, mixed_BTQW[row_N, batch.positions_N])
    return Context(x_N, residual_N, found)


def unroll(draft: Any, embedding: nn.Module, batch: Batch, steps: int) -> Generator[Tensor, Tensor | None, None]:
    """Pre-norm states [M, H] of draft steps 0 .. ``steps`` - 1 at every anchor.

    A mask [M] that is sent back drops anchors from all later steps: the next states are those of the anchors that
    are left, in their order. At least one must be.
    """
    context, anchor_M = read_context(draft, embedding, batch), batch.anchor_M
    windows = draft.config.reach
    stores = [UnrollAttention(batch, *each, window) for each, window in zip(context.keys_values, windows, strict=True)]
    inputs = context.x_N[anchor_M], context.residual_N[anchor_M]
    return unroll_from(draft, embedding, batch, stores, inputs, steps)


def unroll_from(
    draft: Any,
    embedding: nn.Module,
    batch: Batch,
    stores: Sequence[UnrollAttention],
    inputs: tuple[Tensor, Tensor],
    steps: int,
) -> Generator[Tensor, Tensor | None, None]:
    """As :func:`unroll`, from what was read of the text: each layer's keys, and what the last one's attention reads and
    its residual stream at the anchors."""
    layer, (x_M, residual_M) = draft.layers[-1], inputs
    query_MQW = layer.self_attn.queries(x_M, draft.rotary(batch.positions_N[batch.anchor_M]))
    states_M = layer.finish(residual_M, stores[-1].attend(query_MQW))
    keep_M = yield states_M
    for step in range(1, steps):
        if keep_M is not None:
            batch, states_M = narrowed(batch, keep_M), states_M[keep_M]
            for store in stores:
                store.narrow(batch, keep_M)
        # Behind the end of a response any token will do: such anchors are not supervised at this step.
        ids_M = batch.future_MJ[:, step - 1].clamp(min=0)
        positions_M = batch.positions_N[batch.anchor_M] + step
        states_M = draft(draft.embed(ids_M, embedding), draft.carry(states_M), positions_M, stores)
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
