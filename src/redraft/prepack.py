"""Linear layers on a CPU with their weights in the order that the processor's matrix kernels want.

oneDNN reorders a plain weight at every call. With a few tokens a pass, which is what decoding is, that takes longer
than the product itself: a weight that was reordered once halves the time of a step. torch offers it only to compiled
graphs, through operators that are not documented, and which data types they take depends on the processor. So each
type is tried once on the machine at hand; where the operators are missing, refuse or err, layers stay as they are.

The packed weight is a copy. It follows its weight: one that was trained, loaded or replaced is packed anew.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# Copies beyond this cost more memory than they save time; models of that size are decoded on a GPU.
MOST_BYTES = 4 * 2**30
# Reaching the kernel takes some 25 microseconds a call; for smaller weights that is more than the reordering.
LEAST_NUMBERS = 2**17
# The order is chosen for this many rows a product; what is best for a few is no worse for one or for thousands.
ROWS = 16
# How far a packed product may be from the plain one, of itself and in absolute terms, by the types that are packed.
ACCURACY = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@cache
def takes(dtype: torch.dtype) -> bool:
    """Whether packed products in ``dtype`` work on this processor: tried once a process, against the plain product.

    bfloat16 needs AVX512 or AVX-NE-CONVERT, for instance; other processors raise at the first call.
    """
    if dtype not in ACCURACY or not torch.backends.mkldnn.is_available():
        return False
    # Values of both signs that no random generator was moved for; whole rows and a rest of the processor's blocks.
    weight = torch.linspace(-1, 1, 96 * 80).sin_().view(96, 80).to(dtype)
    x = torch.linspace(-2, 3, (ROWS + 5) * 80).cos_().view(ROWS + 5, 80).to(dtype)
    try:
        with torch.no_grad():
            packed = pack(weight)
            for rows, bias in ((1, None), (ROWS + 5, weight[:, 0].clone())):
                found, plain = product(x[:rows], packed, bias), F.linear(x[:rows], weight, bias)
                if found.dtype != dtype or not torch.allclose(found, plain, rtol=ACCURACY[dtype], atol=ACCURACY[dtype]):
                    return False
    except (AttributeError, RuntimeError):
        return False
    return True


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight [out, in] in the kernel's order. Raises ``RuntimeError`` where the processor has none."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


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

    def __getstate__(self) -> dict[str, Any]:
        """Copies pack for themselves: a packed weight is neither copied nor written."""
        return {"layer": self.layer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["layer"])  # type: ignore[misc]
