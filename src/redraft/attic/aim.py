"""Where low-rank updates begin: in the input directions that the gradient of their matrix lies in.

An update is outer @ inner, with outer zero at first. Rows of inner that are drawn at random see a random few of the
input directions, and the update can move nothing else until inner has turned. The gradient of the matrix, which is
there for the price of a few steps, says which directions matter: inner begins as its leading right singular vectors.
As outer is zero, the draft is what it was.

After LoRA-GA (arXiv 2407.05000), which starts outer as well and takes what it adds off the shared matrix; that would no
longer be the shared one, so it is left out here. Off by default: it brought a faster start and no better end
(docs/studies/learning-rates.md).

Shape legend: O outputs, I inputs of a matrix, R rank, K leading vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from redraft.drafts.layers import Linear
from redraft.training.workers import sum_gradients

# Steps whose batches the gradient is taken over.
STEPS = 4
# More vectors than are wanted, and rounds of iteration: what makes the randomised decomposition exact in practice.
SPARE, ROUNDS = 16, 4


def aim(trainer: Any) -> int:
    """A :class:`~redraft.training.trainer.Trainer`'s ``before``: turn new low-rank updates to where the gradient of the
    first steps is. Gives the supervised positions that it took, 0 where no update waits."""
    if not waiting(trainer.draft):
        return 0
    seen: list[int] = []

    def backward() -> None:
        trainer.draft.train()
        for number, step in zip(range(min(STEPS, trainer.loop.total)), trainer.steps(0, {}), strict=False):
            for part in step.parts:
                trainer.loop.loss(part, number).backward()
            seen.append(step.tokens)
        sum_gradients((p for p in trainer.draft.parameters() if p.requires_grad), trainer.workers)

    aim_updates(trainer.draft, backward)
    return sum(seen)


def waiting(draft: nn.Module) -> list[Linear]:
    """Layers whose update is new and still to be aimed."""
    layers = [layer for layer in draft.modules() if isinstance(layer, Linear)]
    return [layer for layer in layers if layer.low_rank is not None and layer.low_rank.aim]


def aim_updates(draft: nn.Module, backward: Callable[[], None]) -> None:
    """Aim all updates that wait for it. ``backward`` adds the gradients of a loss to the parameters that want one.

    On return no parameter has a gradient, and those want one that did before.
    """
    layers = waiting(draft)
    try:
        for layer in layers:
            layer.weight.requires_grad_(True)
        backward()
        for layer in layers:
            _turn(layer)
    finally:
        for layer in layers:
            layer.weight.requires_grad_(False)
        draft.zero_grad(set_to_none=True)
    for layer in layers:
        assert layer.low_rank is not None
        layer.low_rank.aim = False


@torch.no_grad()
def _turn(layer: Linear) -> None:
    """Leading directions into ``inner``, as long as its rows were; a matrix without a gradient keeps what it has."""
    update, gradient = layer.low_rank, layer.weight.grad
    if update is None or gradient is None or not gradient.any():
        return
    leading_KI = leading_directions(gradient, len(update.inner))
    length = update.inner.norm(dim=1).mean()
    update.inner[: len(leading_KI)] = (leading_KI * length).to(update.inner)


def leading_directions(gradient_OI: Tensor, count: int) -> Tensor:
    """The first right singular vectors [K, I] of a matrix, K the smaller of ``count`` and its sides."""
    most = min(gradient_OI.shape)
    count = min(count, most)
    cards = [gradient_OI.device] if gradient_OI.device.type == "cuda" else []
    with torch.random.fork_rng(cards):
        torch.manual_seed(0)
        _, _, right_IK = torch.svd_lowrank(gradient_OI.float(), min(count + SPARE, most), ROUNDS)
    return right_IK[:, :count].T
