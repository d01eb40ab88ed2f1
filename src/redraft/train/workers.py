"""The processes that train together: which one this is, sums over all of them, and who writes files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


class Workers(Protocol):
    """What training is handed of the processes it shares a step with.

    ``rank`` counts from 0 to ``size`` - 1. A step's batch is the same whatever their number: each takes its share, and
    counts, statistics and gradients are summed.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all workers, in place; every worker must call it."""
        ...

    def wait(self) -> None:
        """Return when every worker has come here."""
        ...


class SingleWorker:
    """One process on its own."""

    rank, size, writes = 0, 1, True

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def wait(self) -> None:
        """There is nobody to wait for."""


class TorchWorkers:
    """The processes of an initialised ``torch.distributed`` group."""

    def __init__(self) -> None:
        """Raises ``RuntimeError`` where no process group has been initialised."""
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.writes = self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """See :class:`Workers`."""
        torch.distributed.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """See :class:`Workers`."""
        torch.distributed.barrier()


def present_workers() -> Workers:
    """Those of this process: of the ``torch.distributed`` group where one is initialised, else itself alone."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return TorchWorkers() if together else SingleWorker()


SINGLE = SingleWorker()


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
