"""The data type that this machine multiplies matrices fastest in, found out by trying, and what limits its arithmetic.

Processors differ by a factor of fifty in bfloat16: with AMX or AVX512-BF16 it is the fastest type, without AVX512 it is
emulated and a hundredth of float32's speed. No table of processors could keep up, so ``auto`` holds a trial of a
fraction of a second, of products of many rows: generation and training are made of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from redraft.errors import UserError
from redraft.settings.base import AUTO, TYPES, check_dtype

# One product of the trial: rows times a square weight, 34 million operations, of which the slowest processor known
# does a third of a milliard a second.
ROWS, WIDTH = 64, 512
# A type is tried until it has had this long, after a call that may build the kernels.
TRIAL_SECONDS = 0.05
# bfloat16 takes half of the memory, and at one row a pass it is the faster everywhere; a draw is its own.
MARGIN = 1.1
# What a whole run reaches of the speed that single products have in the trial: in the quickstart's ledger, 0.37 in
# bfloat16, where products are over soon and the rest of a step weighs more.
EFFICIENCY = {"bfloat16": 0.37, "float32": 0.55}


@dataclass(frozen=True)
class Choice:
    """A data type for a device, and the speeds (10^9 operations a second, by type) it was chosen by, if any."""

    dtype: str
    gflops: tuple[tuple[str, float], ...] = ()
    why: str = ""

    def sentence(self) -> str:
        """The choice in one line for a reader."""
        if not self.gflops:
            return f"dtype auto: {self.dtype} ({self.why})"
        figures = ", ".join(f"{rate:.3g} in {name}" for name, rate in self.gflops)
        return f"dtype auto: {self.dtype} (products of many rows, GFLOP/s on this machine: {figures})"

    def to_dict(self) -> dict[str, Any]:
        """For a result file."""
        return {"dtype": self.dtype, "gflops": dict(self.gflops)} | ({"why": self.why} if self.why else {})


def choose_dtype(value: str, device: str, say: Callable[[str], None] | None = None) -> str:
    """``value``, or for ``auto`` the type for ``device``, which ``say`` is told with the figures, once a process.

    Raises ``UserError`` for an unknown type.
    """
    if check_dtype(value) != AUTO:
        return value
    kind = device.partition(":")[0]
    _chosen[kind] = found = fastest(kind)
    if say is not None and kind not in _told:
        _told.add(kind)
        say(found.sentence())
    return found.dtype


def go_on_with(value: str, stored: str | None, device: str, say: Callable[[str], None] | None = None) -> str:
    """The type of a run: of one that has begun (``stored``), whatever the machine, its own; else :func:`choose_dtype`.

    Raises ``UserError`` for an unknown type, and where ``value`` names another than the run was begun with.
    """
    check_dtype(value)
    if stored is None:
        return choose_dtype(value, device, say)
    if stored not in TYPES or value not in (AUTO, stored):
        raise UserError(f"the run was begun in {stored}, not in {value}; leave --dtype out, or begin another run")
    if value == AUTO and say is not None:
        say(f"dtype auto: {stored}, which the run was begun in")
    return stored


# What auto stood for in this process, and what has been told, by kind of device.
_chosen: dict[str, Choice] = {}
_told: set[str] = set()


@cache
def fastest(kind: str) -> Choice:
    """The type for a kind of device (``cpu``, ``cuda``): measured on a CPU, known of everything else."""
    if kind == "cpu":
        rates = trial()
        quick = max(rates, key=lambda name: rates[name] * (MARGIN if name == "bfloat16" else 1.0))
        return Choice(quick, tuple(rates.items()))
    if kind == "cuda" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return Choice("bfloat16", why="the GPU computes in it")
    return Choice("float32", why=f"{kind} is not known to compute in bfloat16")


def trial() -> dict[str, float]:
    """Speed of products of many rows on the CPU by type, in 10^9 operations a second, with the threads in force.

    A layer's product and those of its two gradients count: the same processor may be ten times slower in one of them
    than in another. The types take turns, so that a machine that slows down slows both.
    """
    weight, rows = torch.linspace(-1, 1, WIDTH * WIDTH).sin_(), torch.linspace(-2, 3, ROWS * WIDTH).cos_()
    types = {name: getattr(torch, name) for name in TYPES}
    given = {n: (weight.to(t).view(WIDTH, WIDTH), rows.to(t).view(ROWS, WIDTH)) for n, t in types.items()}
    with torch.inference_mode():
        for pair in given.values():
            _products(*pair)  # builds the kernels
        best, spent = dict.fromkeys(given, float("inf")), dict.fromkeys(given, 0.0)
        while open_types := [name for name, seconds in spent.items() if seconds < TRIAL_SECONDS]:
            for name in open_types:
                began = time.perf_counter()
                _products(*given[name])
                took = time.perf_counter() - began
                best[name], spent[name] = min(best[name], took), spent[name] + took
    operations = 3 * 2 * ROWS * WIDTH * WIDTH
    return {name: operations / seconds / 1e9 for name, seconds in best.items()}


def _products(weight: Tensor, rows: Tensor) -> None:
    given = nn.functional.linear(rows, weight)
    given @ weight
    given.T @ rows


def record() -> dict[str, Any]:
    """What a result must say of the arithmetic it was made with.

    ``instructions`` is the level that torch's own kernels use. oneDNN and MKL, which multiply the matrices, go by the
    processor, not by that: ``limits`` holds what the environment allows each of the three at most (null: whatever the
    processor has). ``chosen`` are the types that ``auto`` stood for in this process, by kind of device.
    """
    found: dict[str, Any] = {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "limits": {
            "torch": os.environ.get("ATEN_CPU_CAPABILITY"),
            # oneDNN reads the older name where the newer is not set.
            "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA"),
            "mkl": os.environ.get("MKL_ENABLE_INSTRUCTIONS"),
        },
    }
    chosen = {kind: choice.to_dict() for kind, choice in sorted(_chosen.items())}
    return found | ({"chosen": chosen} if chosen else {})
