"""Steps of static shapes, recorded as CUDA graphs where there are any.

A graph replays all of a step's kernels at once, but only if nothing in the step depends on a Python number that
changes. Capture and replay were written against the documented interface of ``torch.cuda.CUDAGraph``; neither they nor
any speed has been measured on a GPU: ``benchmarks/gpu.py`` is there to do it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3


def graphs_available(device: torch.device) -> bool:
    """Whether steps on this device can be recorded as graphs: CUDA devices only."""
    return device.type == "cuda" and torch.cuda.is_available()


class Recorded:
    """A function of fixed input buffers: recorded at its first call and replayed afterwards, where graphs exist.

    Inputs are copied into the buffers, outputs are copied out, so a caller may keep what it gets. Without graphs the
    function runs eagerly on the same buffers.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> None:
        self.function = function
        self.inputs = tuple(one.clone() for one in inputs)
        self.graph: Any = None
        self.outputs: tuple[Tensor, ...] = ()
        if graphs_available(self.inputs[0].device):
            self._record()

    def _record(self) -> None:
        # Streams belong to the current device, which need not be the one that the tensors are on: what runs on another
        # is not recorded. Kernels choose their algorithms and workspaces on first use, before recording.
        with torch.cuda.device(self.inputs[0].device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side):
                self.outputs = self.function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for buffer, value in zip(self.inputs, inputs, strict=True):
            buffer.copy_(value)
        if self.graph is None:
            return self.function(*self.inputs)
        self.graph.replay()
        return tuple(one.clone() for one in self.outputs)
