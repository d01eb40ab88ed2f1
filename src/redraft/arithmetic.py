"""How this machine multiplies matrices fastest, found out by trying, and what limits its arithmetic.

Processors differ by a factor of fifty in bfloat16: with AMX or AVX512-BF16 it is the fastest type, without AVX512 it is
emulated and a hundredth of float32's speed. No table of processors could keep up, so ``auto`` holds a trial of a
fraction of a second, of products of many rows: generation and training are made of them.

Decoding has a few tokens a pass. There, oneDNN reordering a plain weight at every call takes longer than the product
itself: a weight that was reordered once halves the time of a step. torch offers it only to compiled graphs, through
operators that are not documented, and which data types they take depends on the processor. So each type is tried once
on the machine at hand; where the operators are missing, refuse or err, layers stay as they are. The packed weight is a
copy. It follows its weight: one that was trained, loaded or replaced is packed anew.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

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

# Copies beyond this cost more memory than they save time; models of that size are decoded on a GPU.
MOST_BYTES = 4 * 2**30
# Reaching the kernel takes some 25 microseconds a call; for smaller weights that is more than the reordering.
LEAST_NUMBERS = 2**17
# The order is chosen for this many rows a product; what is best for a few is no worse for one or for thousands.
PACKED_ROWS = 16
# How far a packed product may be from the plain one, of itself and in absolute terms, by the types that are packed.
ACCURACY = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

AnyModule = TypeVar("AnyModule", bound=nn.Module)


# -- the type that is fastest ----------------------------------------------------------------------------------------
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
    if kind == AUTO:  # whatever accelerators there are
        kind = "cuda" if torch.cuda.is_available() else "cpu"
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
    given = F.linear(rows, weight)
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


# -- packed weights --------------------------------------------------------------------------------------------------
@cache
def takes(dtype: torch.dtype) -> bool:
    """Whether packed products in ``dtype`` work on this processor: tried once a process, against the plain product.

    bfloat16 needs AVX512 or AVX-NE-CONVERT, for instance; other processors raise at the first call.
    """
    if dtype not in ACCURACY or not torch.backends.mkldnn.is_available():
        return False
    # Values of both signs that no random generator was moved for; whole rows and a rest of the processor's blocks.
    weight = torch.linspace(-1, 1, 96 * 80).sin_().view(96, 80).to(dtype)
    x = torch.linspace(-2, 3, (PACKED_ROWS + 5) * 80).cos_().view(PACKED_ROWS + 5, 80).to(dtype)
    try:
        with torch.no_grad():
            packed = pack(weight)
            for rows, bias in ((1, None), (PACKED_ROWS + 5, weight[:, 0].clone())):
                found, plain = product(x[:rows], packed, bias), F.linear(x[:rows], weight, bias)
                if found.dtype != dtype or not torch.allclose(found, plain, rtol=ACCURACY[dtype], atol=ACCURACY[dtype]):
                    return False
    except (AttributeError, RuntimeError):
        return False
    return True


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight [out, in] in the kernel's order. Raises ``RuntimeError`` where the processor has none."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)


def product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times a packed weight, [..., out]. Raises ``RuntimeError`` where the processor refuses it."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def prepack(module: AnyModule) -> AnyModule:
    """The same module; products of its linear layers use packed weights wherever no gradient is wanted.

    What the module computes stays the same up to rounding; its parameters, state and file are untouched. A module
    that is too large (``MOST_BYTES``) is left alone, and so are layers that are too small (``LEAST_NUMBERS``) or on
    another device, where each call would only cost the look.
    """
    linear = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    layers = [layer for layer in linear if layer.weight.device.type == "cpu"]
    if sum(layer.weight.nbytes for layer in layers) <= MOST_BYTES:
        for layer in layers:
            if layer.weight.numel() >= LEAST_NUMBERS and "forward" not in layer.__dict__:
                layer.forward = PackedForward(layer)  # type: ignore[method-assign,assignment]
    return module


class PackedForward:
    """The forward of one linear layer: packed where that is possible and no gradient is wanted, else its own."""

    def __init__(self, layer: nn.Linear) -> None:
        # The layer holds this; a reference back would keep a target's weights until the next garbage collection.
        self.layer = weakref.ref(layer)
        self.packed: Tensor | None = None
        self.storage: StorageWeakRef | None = None
        self.version = 0
        self.refused = False

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output [..., out] for inputs [..., in]."""
        layer = self.layer()
        assert layer is not None
        weight = layer.weight
        if torch.is_grad_enabled() or not self.fits(x, layer):
            return type(layer).forward(layer, x)
        # An optimiser's step raises the version; a module that moves to another type gets another storage. The weak
        # reference keeps nothing alive, but as long as it is held no new storage can have the old one's identity.
        storage = weight.untyped_storage()
        try:
            if self.storage is None or storage._cdata != self.storage.cdata or weight._version != self.version:
                self.packed = pack(weight)
                self.storage, self.version = StorageWeakRef(storage), weight._version
            assert self.packed is not None
            return product(x, self.packed, layer.bias)
        except RuntimeError:  # a shape that the trial did not have, or no memory for the copy
            self.packed, self.refused = None, True
            return type(layer).forward(layer, x)

    def fits(self, x: Tensor, layer: nn.Linear) -> bool:
        """Whether the kernel takes this product as it stands."""
        weight = layer.weight
        return (
            x.dtype == weight.dtype
            and x.device.type == weight.device.type == "cpu"
            and x.is_contiguous()
            and x.numel() > 0
            and not torch.is_autocast_enabled("cpu")
            and not weight.is_inference()
            and getattr(layer, "low_rank", None) is None
            and not self.refused
            and takes(x.dtype)
        )

    def __reduce__(self) -> Any:
        """Copies pack for themselves: a packed weight is neither copied nor written."""
        return PackedForward, (self.layer(),)
