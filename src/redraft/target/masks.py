"""Masks of our own, in the form that a model's layers want them.

A pass under a mask of ours (a tree of proposals, sequences of several lengths) says who may look at whom. A layer with
a window or with chunks sees less, by the distance in the *text*, and a model that is given a finished mask asks its
windows no more: they are put into the mask here. Models whose layers differ take one mask a kind of layer; attention
that adds its mask wants numbers where others take true and false.

Shape legend: B batch, T new tokens, C cached and new positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


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
