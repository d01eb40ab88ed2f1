"""The tensors of a dense draft, made of those of a draft with private parts.

Of a matrix that the private part changed there are some rows at a time, so that a draft is merged or exported in hardly
more memory than its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from redraft.drafts.layers import Linear, LowRank, SharedPrivateMLP
from redraft.pieces import PIECE, Pieced, Table, in_rows

# Matrices of a SwiGLU, and the axis along which those of a private expert are joined to the shared one's.
MATRICES = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}


def is_private(name: str) -> bool:
    """Whether a tensor of a draft's state belongs to its private parts: experts, routers, low-rank updates."""
    return any(part in name for part in (".private.", ".router.", ".low_rank."))


def updated(whole: Tensor, update: LowRank) -> Iterator[Tensor]:
    """A matrix [out, in] with a low-rank update in it, some rows at a time, computed in float32.

    In equal parts: a product of few rows may be summed in another order than one of many.
    """
    inner, parts = update.inner.detach().float(), -(-whole.numel() // PIECE)
    sides = (tensor.detach().tensor_split(parts) for tensor in (whole, update.outer))
    for old, outer in zip(*sides, strict=True):
        yield (outer.float() @ inner).mul_(update.scale).add_(old).to(whole.dtype)


def joined(left: Table | Tensor, right: Tensor, axis: int) -> Table:
    """A matrix beside another, in the wider of their types: below it (``axis`` 0) or at its right."""
    kind = torch.promote_types(left.dtype, right.dtype)
    shape = torch.Size(a + b * (i == axis) for i, (a, b) in enumerate(zip(left.shape, right.shape, strict=True)))

    def make() -> Iterator[Tensor]:
        done = 0
        for rows in in_rows(left):
            yield torch.cat([rows, right[done : done + len(rows)]], 1) if axis else rows.to(kind)
            done += len(rows)
        if not axis:
            yield right.to(kind)

    return Table(kind, shape, make)


class MergedState(Pieced):
    """The state of the equal dense draft: a private expert widens its SwiGLU, a low-rank update is in its matrix.

    Tensors that the private parts leave alone are the module's own, all others are new whenever they are asked for.
    """

    def __init__(self, draft: nn.Module) -> None:
        self.state = {name: tensor for name, tensor in draft.state_dict().items() if not is_private(name)}
        self.updates = {f"{n}.weight": m for n, m in draft.named_modules() if isinstance(m, Linear) and m.low_rank}
        self.wider: dict[str, tuple[Tensor, int]] = {}
        for name, mlp in draft.named_modules():
            if isinstance(mlp, SharedPrivateMLP) and mlp.private is not None:
                for matrix, axis in MATRICES.items():
                    self.wider[f"{name}.{matrix}.weight"] = (getattr(mlp.private, matrix).weight.detach(), axis)

    def table(self, name: str) -> Table | Tensor:
        """See :class:`~redraft.pieces.Pieced`."""
        own = self.state[name].detach()
        found: Table | Tensor = own
        if (layer := self.updates.get(name)) is not None and layer.low_rank is not None:
            found = Table(own.dtype, own.shape, partial(updated, own, layer.low_rank))
        return joined(found, *self.wider[name]) if name in self.wider else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)
