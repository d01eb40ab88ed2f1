"""Keys and values of texts that are being written, with exact roll-back, and masks over them.

:class:`KeyValueCache` holds one text, or several of one length, :class:`SlotCache` several at lengths of their own,
in buffers that are allocated once; :class:`OwnCache` is the model's own cache, for models whose state is more.

A pass under a mask of ours (a tree of proposals, sequences of several lengths) says who may look at whom. A layer with
a window or with chunks sees less, by the distance in the *text*, and a model that is given a finished mask asks its
windows no more: :class:`MaskPlan` puts them into the mask. Models whose layers differ take one mask a kind of layer;
attention that adds its mask wants numbers where others take true and false.

Shape legend: B batch or slots, T new tokens, C columns (cached and new positions), H key heads, D head width.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


# -- one text or several of one length -------------------------------------------------------------------------------
class FixedLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers that are allocated once; rolling back only moves ``length``.

    Layers with a window keep everything too: what a query may not see is the mask's affair.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int, rows: int = 0) -> None:
        """``rows``: how many sequences there is room for; by default as many as come first."""
        super().__init__()
        self.capacity, self.rows = capacity, rows
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.rows or key_states.shape[0], key_states.shape[1], self.capacity)
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros: a masked column still enters a product, and a stray NaN would survive its weight of zero.
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            raise ValueError(f"cache of {self.capacity} tokens cannot hold {end}")
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class KeyValueCache(Cache):
    """A fixed-capacity cache over all layers of the target, with exact roll-back."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[FixedLayer(capacity) for _ in range(layers)])
        self.capacity = capacity

    @property
    def length(self) -> int:
        return self.layers[0].length

    def key_positions(self, positions_BT: Tensor) -> Tensor:
        """Where every column that the next pass attends to stands in its text, [B, C]; new ones at ``positions``."""
        before = torch.arange(self.length, device=positions_BT.device).expand(len(positions_BT), -1)
        return torch.cat([before, positions_BT], -1)

    def rollback(self, length: int) -> None:
        """Forget every position from ``length`` on. The kept keys and values are not touched."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll a cache of {self.length} tokens back to {length}")
        for layer in self.layers:
            layer.length = length

    def spread(self, rows: int, capacity: int) -> KeyValueCache:
        """A new cache of ``rows`` sequences with room for ``capacity`` tokens, which all begin with this one's."""
        wider = KeyValueCache(len(self.layers), capacity)
        for layer, source in zip(wider.layers, self.layers, strict=True):
            kept = slice(0, source.length)
            layer.update(
                source.keys[:, :, kept].expand(rows, -1, -1, -1), source.values[:, :, kept].expand(rows, -1, -1, -1)
            )
        return wider

    def compact(self, start: int, kept: Sequence[int]) -> None:
        """Of the positions from ``start`` on keep these, counted from ``start``, ascending, moved side by side.

        After a tree pass this leaves what a pass over the accepted path alone would have left: a key carries its
        position in the sequence, not its place in the buffer.
        """
        rows = list(kept)
        if any(one >= two for one, two in zip(rows, rows[1:], strict=False)):
            raise ValueError(f"rows to keep must ascend, not {rows}")
        if rows and not 0 <= rows[0] <= rows[-1] < self.length - start:
            raise ValueError(f"cannot keep rows {rows} of {self.length - start}")
        # What stands in its place already stays untouched.
        stay = sum(1 for place, row in enumerate(rows) if place == row)
        moved = rows[stay:]
        if moved:
            first, end = start + stay, start + len(rows)
            rows_R = torch.tensor(moved, device=self.layers[0].keys.device) + start
            for layer in self.layers:
                source = rows_R.to(layer.keys.device)  # layers may be on several devices
                layer.keys[:, :, first:end] = layer.keys.index_select(2, source)
                layer.values[:, :, first:end] = layer.values.index_select(2, source)
        self.rollback(start + len(rows))


class OwnCache:
    """The model's own cache, for models whose state is more than keys and values (linear attention, convolutions).

    Such a state cannot forget its last tokens. Before every pass that may be taken back in part, a copy of it is put
    aside; rolling back goes to the copy and feeds what was kept once more, through the model itself. Further back than
    that copy, everything kept is fed anew.
    """

    def __init__(self, config: Any, feed: Callable[[Tensor, Any], Any]) -> None:
        """``config`` is the text model's; ``feed(ids_BT, cache)`` runs the model over new tokens."""
        self.config, self._feed = config, feed
        self.inner = DynamicCache(config=config)
        self._ids: Tensor | None = None
        self._before: tuple[int, Any] | None = None

    @property
    def length(self) -> int:
        return 0 if self._ids is None else self._ids.shape[1]

    def begin(self, ids_BT: Tensor) -> None:
        """The next pass is over these tokens: put a copy aside where they may be taken back one by one."""
        several = ids_BT.shape[1] > 1 and self.length > 0
        self._before = (self.length, copy.deepcopy(self.inner)) if several else None
        self._ids = ids_BT if self._ids is None else torch.cat([self._ids, ids_BT], 1)

    def rollback(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll a cache of {self.length} tokens back to {length}")
        if length == self.length:
            return
        start, self.inner = 0, DynamicCache(config=self.config)
        if self._before is not None and self._before[0] <= length:
            start, self.inner = self._before
        assert self._ids is not None
        self._ids, self._before = self._ids[:, :length], None
        if length > start:
            self._feed(self._ids[:, start:], self.inner)


@cache
def _takes_cache(kind: Any) -> bool:
    # The decorator that still takes the old name keeps the signature of what it wraps.
    return "cache" in inspect.signature(kind.forward).parameters


def cache_argument(module: Any, held: Any) -> dict[str, Any]:
    """Arguments that hand a key-value cache (or ``None``, none) to a decoder's forward.

    5.24 calls it ``cache`` and warns of the older ``past_key_values``, which 5.40 will refuse.
    """
    name = "cache" if _takes_cache(module.__class__) else "past_key_values"
    return {name: held, "use_cache": held is not None}


# -- several texts, each at its own length ---------------------------------------------------------------------------
class _SlotLayer(FixedLayer):
    """Keys and values of one layer, [B, H, C, D], of which the layer always shows the whole."""

    def __init__(self, slots: SlotCache) -> None:
        super().__init__(slots.capacity, slots.size)
        self.slots, self.length = slots, slots.capacity

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


class SlotCache(Cache):
    """A target's cache over ``size`` sequences of at most ``capacity`` tokens.

    ``lengths`` [B] belongs to the caller: a forward pass over T tokens writes at ``positions(T)`` and changes no
    length; the caller then raises each by what it keeps. Pass ``positions`` and ``mask`` of the same T with it.
    """

    def __init__(self, layers: int, size: int, capacity: int, device: torch.device) -> None:
        self.size, self.capacity = size, capacity
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])
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
            own = rows.to(layer.keys.device)
            layer.keys[own, :, :tokens] = source.keys[:, :, :tokens]
            layer.values[own, :, :tokens] = source.values[:, :, :tokens]
        self.lengths[rows] = lengths


def write(buffer_BHCD: Tensor, new_BTHD: Tensor, at_BT: Tensor) -> None:
    """Write T vectors into every slot of a buffer at the given columns."""
    at_BT = at_BT.to(buffer_BHCD.device)
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


# -- masks -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MaskPlan:
    """The kinds of a model's layers, whether it takes a mask a kind, and whether masks are numbers to be added."""

    kinds: tuple[str, ...]
    window: int = 0
    chunk: int = 0
    additive: bool = False

    @classmethod
    def of(cls, config: Any) -> MaskPlan | None:
        """The plan of a text model's config; nothing where it has kinds of layers that are not known here."""
        layer_types = getattr(config, "layer_types", None)
        window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
        kinds = tuple(sorted(set(layer_types))) if layer_types else (SLIDING if window else FULL,)
        needs: dict[str, Any] = {FULL: True, SLIDING: window, CHUNKED: chunk}
        if not all(needs.get(kind) for kind in kinds):
            return None
        additive = getattr(config, "_attn_implementation", None) == "eager"
        return cls(kinds, int(window or 0), int(chunk or 0), additive)

    @property
    def plain(self) -> bool:
        """Whether a mask of true and false is taken as it stands."""
        return self.kinds == (FULL,) and not self.additive

    def masks(
        self,
        allowed_B1TC: Tensor,
        positions_BT: Tensor,
        key_positions: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> Any:
        """What the model takes in place of ``allowed``: a mask, or one a kind of layer.

        ``positions`` are the new tokens', ``key_positions(positions)`` those of all columns [B, C].
        """
        if self.plain:
            return allowed_B1TC
        found = {FULL: allowed_B1TC}
        if self.kinds != (FULL,):
            query_BT1, key_B1C = positions_BT[..., None], key_positions(positions_BT)[:, None]
            if self.window:
                found[SLIDING] = allowed_B1TC & (query_BT1 - key_B1C < self.window)[:, None]
            if self.chunk:
                found[CHUNKED] = allowed_B1TC & (query_BT1 // self.chunk == key_B1C // self.chunk)[:, None]
        chosen = {kind: _added(found[kind], dtype) if self.additive else found[kind] for kind in self.kinds}
        return chosen if len(chosen) > 1 else next(iter(chosen.values()))


def _added(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query may look, the type's lowest number elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)
