"""The processes that train together: which one this is, sums over all of them, and who writes files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


class Workers:
    """What training is handed of the processes that it shares a step with; by default there is one.

    A step's batch is the same whatever their number: each takes its share, and counts, statistics and gradients are
    summed. ``rank`` counts from 0 to ``size`` - 1.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def present(cls) -> Workers:
        """Those of the ``torch.distributed`` group, where one is initialised; else this process alone."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all workers, in place; all must call it."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Return when all workers have come here."""
        if self.size > 1:
            torch.distributed.barrier()


SINGLE = Workers()


class Shares:
    """How one step after another is divided among the workers, and what its counts and statistics sum to.

    All workers must come to every sum. One that has no part of a step, since it has fewer parts than there are
    workers, computes another's as a stand-in that counts for nothing.
    """

    def __init__(self, workers: Workers) -> None:
        self.workers, self.idle = workers, False

    def of(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Those of the next step's parts that this worker computes."""
        self.idle = self.workers.rank >= len(parts)
        return parts[self.workers.rank :: self.workers.size] or parts[:1]

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all workers."""
        return self.workers.sum(torch.zeros_like(tensor) if self.idle else tensor)

    def loss(self, found: Tensor) -> Tensor:
        """A part's loss as it counts in the step."""
        return found * 0 if self.idle else found


def sum_gradients(parameters: Iterable[Tensor], workers: Workers) -> None:
    """Give every worker the sum of all workers' gradients; a parameter without one on any of them keeps none."""
    if workers.size == 1:
        return
    listed = list(parameters)
    there = torch.tensor([float(p.grad is not None) for p in listed], device=listed[0].device)
    for parameter, count in zip(listed, workers.sum(there).tolist(), strict=True):
        if count:
            parameter.grad = workers.sum(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
