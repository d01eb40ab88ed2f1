"""The tensors of a dense draft, made one by one of those of a draft with private parts.

Of a matrix that the private part changed there is one at a time, so that a draft is merged or exported in hardly more
memory than its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from redraft.drafts.layers import Linear, LowRank, SharedPrivateMLP

# Matrices of a SwiGLU, and the axis along which those of a private expert are joined to the shared one's.
MATRICES = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}


def is_private(name: str) -> bool:
    """Whether a tensor of a draft's state belongs to its private parts: experts, routers, low-rank updates."""
    return any(part in name for part in (".private.", ".router.", ".low_rank."))


# Numbers of a matrix that an update is added to in one go, in float32.
PIECE = 1 << 22


def added(whole: Tensor, update: LowRank) -> Tensor:
    """A matrix [out, in] with a low-rank update in it: computed in float32 by rows, so that it takes its own room.

    In equal parts: a product of few rows may be summed in another order than one of many.
    """
    parts, found = -(-whole.numel() // PIECE), torch.empty_like(whole)
    inner = update.inner.detach().float()
    sides = (tensor.detach().tensor_split(parts) for tensor in (found, whole, update.outer))
    for part, old, outer in zip(*sides, strict=True):
        part.copy_(old.float() + (outer.float() @ inner) * update.scale)
    return found


class MergedState(Mapping[str, Tensor]):
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

    def __getitem__(self, name: str) -> Tensor:
        whole = self.state[name].detach()
        if (layer := self.updates.get(name)) is not None and layer.low_rank is not None:
            whole = added(whole, layer.low_rank)
        if name in self.wider:
            part, axis = self.wider[name]
            whole = torch.cat([whole, part], axis)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)
