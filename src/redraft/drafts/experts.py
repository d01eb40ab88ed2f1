"""Shared and private parts of a draft: experts of the MLP (EDA, arXiv 2603.09527) and rows of the head.

``y = shared(x) + private(x)``. With one expert on each side the routers of the paper's general form are constant
one, and the sum is exactly one SwiGLU: rows of gate and up concatenated, columns of down concatenated. So a
private expert attaches to any dense draft, is a file of its own, and merges back into an ordinary checkpoint.

The head is the larger half of a small draft, and a fine-tuned target writes few of its tokens most of the time.
Private rows take the place of the shared head's rows for just those tokens; merging copies them in.

Shape legend: H hidden size, I inner width of the shared expert, P inner width of the private one, D draft
vocabulary, R private rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class HeadRows(nn.Module):
    """Rows [R, H] of a head and the draft ids [R], ascending, that they stand for."""

    rows: Tensor

    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, hidden))
        self.register_buffer("rows", torch.arange(count))


class SharedPrivateHead(nn.Linear):
    """A head [D, H] (the shared one, under the plain name) of which some rows may be replaced by private ones."""

    def __init__(self, hidden: int, vocabulary: int, private_rows: int = 0) -> None:
        super().__init__(hidden, vocabulary, bias=False)
        self.private = HeadRows(hidden, private_rows) if private_rows else None

    def effective(self) -> Tensor:
        """The head [D, H] with the private rows in their places."""
        if self.private is None:
            return self.weight
        return self.weight.index_copy(0, self.private.rows, self.private.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective())


def frequent_ids(draft: Eagle3Draft, responses: Iterable[Sequence[int]], count: int) -> Tensor:
    """The draft ids, ascending, of the ``count`` tokens that occur most often in ``responses`` (target ids).

    Fewer when the responses hold fewer of the draft's tokens; ties go to the lower id.
    """
    counts_V = torch.zeros(draft.config.target_vocab_size, dtype=torch.long)
    for ids in responses:
        counts_V += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=len(counts_V))
    counts_D = counts_V[draft.vocabulary().cpu()]
    order = counts_D.sort(descending=True, stable=True).indices[:count]
    return order[counts_D[order] > 0].sort().values


def attach_rows(draft: Eagle3Draft, ids_R: Tensor) -> Eagle3Draft:
    """A copy of ``draft`` with private head rows for the draft ids ``ids_R`` [R], equal to the shared ones.

    Raises ``ValueError`` when there are private rows already, or none are asked for.
    """
    if draft.config.private_rows:
        raise ValueError("the draft has private head rows already; merge them first")
    if not len(ids_R):
        raise ValueError("private head rows need at least one draft id")
    split = copy.deepcopy(draft)
    split.config = replace(draft.config, private_rows=len(ids_R))
    shared = split.lm_head.weight
    private = HeadRows(draft.config.hidden_size, len(ids_R)).to(shared)
    private.rows = ids_R.to(shared.device)
    with torch.no_grad():
        private.weight.copy_(shared[private.rows])
    split.lm_head.private = private
    return split


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
    """An equal dense draft: a private expert becomes part of one wider SwiGLU, private rows part of the head.

    Unchanged if there is neither.
    """
    if not draft.config.private_width and not draft.config.private_rows:
        return draft
    merged = copy.deepcopy(draft)
    if draft.config.private_width:
        merged.midlayer.mlp = _merged_mlp(draft)
    if draft.config.private_rows:
        with torch.no_grad():
            merged.lm_head.weight.copy_(draft.lm_head.effective())
        merged.lm_head.private = None
    merged.config = replace(
        draft.config,
        intermediate_size=draft.config.intermediate_size + draft.config.private_width,
        private_width=0,
        private_rows=0,
    )
    return merged


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
    return ".private." in name
