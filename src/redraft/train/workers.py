"""What the processes of one training run have between them."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_over_workers(sums: Tensor) -> Tensor:
    """The sum over all workers of a distributed run; of a single process, its own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums
