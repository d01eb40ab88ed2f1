"""Shared and private experts of a draft's MLP (EDA, arXiv 2603.09527).

``y = shared(x) + private(x)``. With one expert on each side the routers of the paper's general form are constant
one, and the sum is exactly one SwiGLU: rows of gate and up concatenated, columns of down concatenated. So a
private expert attaches to any dense draft, is a file of its own, and merges back into an ordinary checkpoint.

Shape legend: H hidden size, I inner width of the shared expert, P inner width of the private one.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from redraft.drafts.layers import GatedMLP

if TYPE_CHECKING:
    from redraft.drafts.eagle3 import Eagle3Draft


class SharedPrivateMLP(GatedMLP):
    """A SwiGLU (the shared expert, under the plain names) with an optional private one beside it."""

    def __init__(self, hidden: int, inner: int, private_width: int = 0) -> None:
        super().__init__(hidden, inner)
        self.private = GatedMLP(hidden, private_width) if private_width else None

    def forward(self, x: Tensor) -> Tensor:
        shared = super().forward(x)
        return shared if self.private is None else shared + self.private(x)


def attach_private(draft: Eagle3Draft, width: int, seed: int = 0) -> Eagle3Draft:
    """A copy of ``draft`` with a private expert of inner width ``width``, whose output starts at exactly zero.

    The private gate and up rows are copies of the shared expert's rows (a random choice of them, tiled when there
    are fewer), with a little noise where they repeat, so that the expert starts from useful directions; its down
    matrix is zero, hence every logit is bit-identical to the old draft's.

    Raises ``ValueError`` when a private expert is already attached or ``width`` is not positive.
    """
    if draft.config.private_width:
        raise ValueError("the draft has a private expert already; merge it first")
    if width <= 0:
        raise ValueError(f"private width must be positive, not {width}")
    split = copy.deepcopy(draft)
    split.config = replace(draft.config, private_width=width)
    shared = split.midlayer.mlp
    private = GatedMLP(draft.config.hidden_size, width).to(shared.gate_proj.weight)
    generator = torch.Generator().manual_seed(seed)
    inner = shared.gate_proj.weight.shape[0]
    rows = torch.cat([torch.randperm(inner, generator=generator) for _ in range(-(-width // inner))])[:width]
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            source = getattr(shared, name).weight
            noise = torch.randn(width, source.shape[1], generator=generator).to(source) * source.std() * 0.1
            getattr(private, name).weight.copy_(source[rows.to(source.device)] + noise)
        private.down_proj.weight.zero_()
    shared.private = private
    return split


def merge_private(draft: Eagle3Draft) -> Eagle3Draft:
    """An equal dense draft: the private expert becomes part of one wider SwiGLU. Unchanged if there is none."""
    if not draft.config.private_width:
        return draft
    merged = copy.deepcopy(draft)
    mlp = merged.midlayer.mlp
    private = mlp.private
    assert private is not None
    dense = SharedPrivateMLP(draft.config.hidden_size, draft.config.intermediate_size + draft.config.private_width)
    dense = dense.to(mlp.gate_proj.weight)
    with torch.no_grad():
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            both: list[Tensor] = [getattr(mlp, name).weight, getattr(private, name).weight]
            getattr(dense, name).weight.copy_(torch.cat(both, axis))
    merged.midlayer.mlp = dense
    merged.config = replace(
        draft.config, intermediate_size=draft.config.intermediate_size + draft.config.private_width, private_width=0
    )
    return merged


def is_private(name: str) -> bool:
    """Whether a tensor of a draft's state belongs to its private expert."""
    return ".private." in name
