"""Keys and values of one sequence, with exact roll-back: in buffers of ours, or in the model's own cache.

Shape legend: B batch, T new tokens, C cached and new positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin


class FixedLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers that are allocated once; rolling back only moves ``length``.

    Layers with a window keep everything too: what a query may not see is the mask's affair.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, width = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(batch, heads, self.capacity, width)
        self.values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
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
            source = torch.tensor(moved, device=self.layers[0].keys.device) + start
            for layer in self.layers:
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
