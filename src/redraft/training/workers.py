"""The processes that train together: which one this is, sums over all of them, and who writes files.

``torchrun`` starts them, each with the same command. The first one does by itself what cannot be shared (answers,
selection, features, measuring) while the others wait; then each goes through the same steps and finds done what the
first has written; the training they share. One that fails says why, and the others end without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from redraft.errors import UserError
from redraft.locks import workers_started

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
        """Return when all workers have come here, however long the slowest takes."""
        if self.size > 1:
            if torch.distributed.get_backend() == "nccl":  # a group of the caller's own, without the CPU
                torch.distributed.barrier()
            else:
                self.sum(torch.zeros(1))

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give all workers the first one's numbers, in place; all must call it."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, 0)

    @contextmanager
    def first(self) -> Iterator[bool]:
        """The block is gone through by the first worker alone and then by the others, who find done what it did.

        Gives whether this is the first one. Such blocks do not lie within each other.
        """
        if not self.writes:
            self.wait()
        yield self.writes
        if self.writes:
            self.wait()


class WorkerError(UserError):
    """What a worker has to say, whichever it is: it was the first to fail."""


SINGLE = Workers()
FAILED = "failed"
# What a collective says when another process has gone.
GONE = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "timed out", "socket", "nccl")


@contextmanager
def together() -> Iterator[Workers]:
    """The processes that ``torchrun`` has started, as one group within the block; else this process alone.

    Whoever fails first says so; the others end with exit code 2 and no word of their own. Raises ``UserError`` when
    they do not find each other, and when one has gone without a word.
    """
    count = workers_started()
    if count == 1 or torch.distributed.is_initialized():
        yield Workers.present()
        return
    store = _meet(count)
    try:
        yield Workers.present()
    except Exception as error:
        raise _told(error, store) from error
    torch.distributed.destroy_process_group()


def _told(error: Exception, store: Any) -> BaseException:
    """What a worker ends with that met this error."""
    first = True
    with suppress(Exception):  # the store has gone with the process that kept it
        first = store.add(FAILED, 1) == 1
    if not first:
        return SystemExit(2)
    if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in GONE):
        return WorkerError(
            "one of the processes that train together has ended without a word (killed, or out of memory); the same "
            "command goes on from the last checkpoint, with any number of processes"
        )
    rank = torch.distributed.get_rank()
    said = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return WorkerError(f"process {rank} of those that train together: {said}") if rank else error


def _meet(count: int) -> Any:
    """Form the group; the store in which its processes leave word. Raises ``UserError``."""
    # Answers may take days, and the others wait for them.
    patience = timedelta(days=100)
    try:
        store, rank, size = next(iter(torch.distributed.rendezvous("env://", timeout=timedelta(minutes=10))))
        store.set_timeout(patience)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
        group = torch.distributed.PrefixStore("redraft", store)
        torch.distributed.init_process_group(backend(), store=group, rank=rank, world_size=size, timeout=patience)
    except (ValueError, RuntimeError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the {count} processes of this command do not find each other ({first}); start them with torchrun"
        ) from error
    return group


def backend() -> str:
    """What sums tensors between the processes: those of the CPU, and of GPUs where there are some."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


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
