"""Keys and values of several sequences in flight, each at its own length, in buffers that are allocated once.

Every sequence has a slot (a row of the buffers). New keys are written at the slot's own length; rolling back or
emptying a slot only lowers that length, since whatever stands behind it is masked until it is overwritten.

Shape legend: B slots, T new tokens, C capacity, H key heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, H, C, D]."""

    def __init__(self, slots: SlotCache) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.slots.size, key_states.shape[1], self.slots.capacity)
        # Zeros: a masked column still enters a product, and a stray NaN would survive its weight of zero.
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        at_BT = self.slots.positions(key_states.shape[2])
        write(self.keys, key_states.transpose(1, 2), at_BT)
        write(self.values, value_states.transpose(1, 2), at_BT)
        # Whole buffers, not slices: the batched product over a strided slice is four times slower than the few
        # masked columns beyond the longest row cost.
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.capacity, 0

    def get_seq_length(self) -> int:
        return self.slots.capacity

    def get_max_length(self) -> int:
        return self.slots.capacity


class SlotCache(Cache):
    """A target's cache over ``size`` sequences of at most ``capacity`` tokens.

    ``lengths`` [B] belongs to the caller: a forward pass over T tokens writes at ``positions(T)`` and changes no
    length; the caller then raises each by what it keeps. Pass ``positions`` and ``mask`` of the same T with it.
    """

    def __init__(self, layers: int, size: int, capacity: int, device: torch.device) -> None:
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])
        self.size, self.capacity = size, capacity
        self.lengths = torch.zeros(size, dtype=torch.long, device=device)

    def key_positions(self, positions_BT: Tensor) -> Tensor:
        """Where every column stands in its slot's text, [B, C]: a column's number."""
        return torch.arange(self.capacity, device=positions_BT.device).expand(len(positions_BT), -1)

    def positions(self, tokens: int) -> Tensor:
        """Where the next T tokens of every slot stand, [B, T]."""
        return self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)

    def mask(self, tokens: int) -> Tensor:
        """Boolean [B, 1, T, C]: each new token sees its own slot up to itself."""
        return causal_mask(self.positions(tokens), self.capacity)

    def fill(self, rows: Tensor, filled: Cache, lengths: Tensor) -> None:
        """Copy prefilled sequences into the slots ``rows``; of each, the first ``lengths`` tokens count."""
        for layer, source in zip(self.layers, filled.layers, strict=True):
            tokens = source.get_seq_length()
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            layer.keys[rows, :, :tokens] = source.keys[:, :, :tokens]
            layer.values[rows, :, :tokens] = source.values[:, :, :tokens]
        self.lengths[rows] = lengths


def write(buffer_BHCD: Tensor, new_BTHD: Tensor, at_BT: Tensor) -> None:
    """Write T vectors into every slot of a buffer at the given columns."""
    rows_B1 = torch.arange(len(buffer_BHCD), device=at_BT.device)[:, None]
    buffer_BHCD[rows_B1, :, at_BT] = new_BTHD


def causal_mask(at_BT: Tensor, capacity: int) -> Tensor:
    """Boolean [B, 1, T, C]: a query at column c of its slot sees columns 0 to c."""
    return (torch.arange(capacity, device=at_BT.device) <= at_BT[..., None])[:, None]


# -- attention -------------------------------------------------------------------------------------------------------
def _slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A few queries a row as two batched products on the key heads; anything else goes to the stock kernel.

    The stock CPU kernel is made for long queries: for 128 rows of 300 tokens and one query each it takes 3.0 ms
    where these two products take 1.6.
    """
    batch, query_heads, length, width = query.shape
    if attention_mask is None or length > 16 or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    heads, cached = key.shape[1], key.shape[2]
    scores = torch.bmm(
        query.reshape(batch * heads, -1, width),
        key.view(batch * heads, cached, width).transpose(1, 2),
    ).float() * (scaling if scaling is not None else 1 / math.sqrt(width))
    scores = scores.view(batch, query_heads, length, cached).masked_fill_(~attention_mask, float("-inf"))
    weights = scores.softmax(-1).to(value.dtype).view(batch * heads, -1, cached)
    mixed = torch.bmm(weights, value.view(batch * heads, cached, value.shape[-1]))
    return mixed.view(batch, query_heads, length, -1).transpose(1, 2), None


AttentionInterface.register("redraft_slots", _slot_attention)
# Without this a model makes no masks for this attention, windows included, and every prompt is seen whole.
AttentionMaskInterface.register("redraft_slots", sdpa_mask)


@contextmanager
def slot_attention(target: Any, kernel: bool | None = None) -> Iterator[None]:
    """Let the target attend over slots as fast as this machine can, and restore its own attention after.

    ``kernel``: through the two products of ours; by default where they equal the model's own attention.
    """
    if not (target.paths.kernel if kernel is None else kernel):
        yield
        return
    previous = target.backbone.config._attn_implementation
    target.backbone.set_attn_implementation("redraft_slots")
    try:
        yield
    finally:
        target.backbone.set_attn_implementation(previous)
