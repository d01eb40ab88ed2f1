"""Shared and private parts of a draft: experts of the MLP (EDA, arXiv 2603.09527) and low-rank updates.

``y = shared(x) + private(x)``. With one expert on each side the routers of the paper's general form are constant
one, and the sum is exactly one SwiGLU: rows of gate and up concatenated, columns of down concatenated. So a
private expert attaches to any dense draft, is a file of its own, and merges back into an ordinary checkpoint.

A low-rank update (LoRA, arXiv 2106.09685) of any linear layer is the other private part: outer @ inner beside the
frozen shared matrix, to which merging adds it.

Shape legend: H hidden size, I inner width of the shared expert, P inner width of the private one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from redraft.drafts.layers import GatedMLP, Linear

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
    """An equal dense draft: a private expert becomes part of one wider SwiGLU, low-rank updates part of their matrix.

    Unchanged if there is neither.
    """
    config = draft.config
    if not config.private_width and not config.low_rank:
        return draft
    merged = copy.deepcopy(draft)
    for layer in merged.modules():
        if isinstance(layer, Linear):
            layer.merge_low_rank()
    if config.private_width:
        merged.midlayer.mlp = _merged_mlp(merged)
    merged.config = replace(
        config,
        intermediate_size=config.intermediate_size + config.private_width,
        private_width=0,
        low_rank=0,
        low_rank_on=(),
    )
    return merged


def linear_names(draft: Eagle3Draft) -> list[str]:
    """The linear layers that a low-rank update can be put on: all but those of a private expert."""
    return [n for n, layer in draft.named_modules() if isinstance(layer, Linear) and not is_private(f"{n}.weight")]


def attach_low_rank(draft: Eagle3Draft, rank: int, on: Sequence[str] = (), seed: int = 0) -> Eagle3Draft:
    """A copy of ``draft`` with updates of ``rank`` on the linear layers ``on`` (all by default), which start at zero.

    Raises ``ValueError`` when there are some already, the rank is not positive, or a name is no linear layer.
    """
    if draft.config.low_rank:
        raise ValueError("the draft has low-rank updates already; merge them first")
    known = linear_names(draft)
    if rank <= 0 or not set(on) <= set(known):
        raise ValueError(f"rank {rank} on {', '.join(on) or 'all'}: the rank must be positive, names among {known}")
    split = copy.deepcopy(draft)
    split.config = replace(draft.config, low_rank=rank, low_rank_on=tuple(on or known))
    generator = torch.Generator().manual_seed(seed)
    for name in split.config.low_rank_on:
        layer = split.get_submodule(name)
        assert isinstance(layer, Linear)
        layer.attach_low_rank(rank, generator)
    return split


def _merged_mlp(draft: Eagle3Draft) -> SharedPrivateMLP:
    mlp = draft.midlayer.mlp
    private = mlp.private
    assert private is not None
    dense = SharedPrivateMLP(draft.config.hidden_size, draft.config.intermediate_size + draft.config.private_width)
    dense = dense.to(mlp.gate_proj.weight)
    with torch.no_grad():
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            both: list[Tensor] = [getattr(mlp, name).weight, getattr(private, name).weight]
            getattr(dense, name).weight.copy_(torch.cat(both, axis))
    return dense


def is_private(name: str) -> bool:
    """Whether a tensor of a draft's state belongs to its private parts."""
    return ".private." in name or ".low_rank." in name
