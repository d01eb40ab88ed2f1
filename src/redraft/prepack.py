"""Linear layers on a CPU with their weights in the order that the processor's matrix kernels want.

oneDNN reorders a plain weight at every call. With a few tokens a pass, which is what decoding is, that takes longer
than the product itself: a weight that was reordered once halves the time of a step. torch offers it only to compiled
graphs, through operators that are not documented; where they are missing, layers stay as they are.

The packed weight is a copy. It follows its weight: one that was trained, loaded or replaced is packed anew.
"""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# Copies beyond this cost more memory than they save time; models of that size are decoded on a GPU.
MOST_BYTES = 4 * 2**30
# Reaching the kernel takes some 25 microseconds a call; for smaller weights that is more than the reordering.
LEAST_NUMBERS = 2**17
# The order is chosen for this many rows a product; what is best for a few is no worse for one or for thousands.
ROWS = 16

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def available() -> bool:
    """Whether this build of torch can pack weights."""
    try:
        torch.ops.mkldnn._reorder_linear_weight  # noqa: B018  looked up, not called
        torch.ops.mkldnn._linear_pointwise  # noqa: B018
    except (AttributeError, RuntimeError):
        return False
    return bool(torch.backends.mkldnn.is_available())


def prepack(module: AnyModule) -> AnyModule:
    """The same module; products of its linear layers use packed weights wherever no gradient is wanted.

    What the module computes stays the same up to rounding; its parameters, state and file are untouched. A module
    that is too large (``MOST_BYTES``) is left alone, and so are layers that are too small (``LEAST_NUMBERS``) or on
    another device, where each call would only cost the look.
    """
    linear = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    layers = [layer for layer in linear if layer.weight.device.type == "cpu"]
    if available() and sum(layer.weight.nbytes for layer in layers) <= MOST_BYTES:
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
        if self.storage is None or storage._cdata != self.storage.cdata or weight._version != self.version:
            self.storage, self.version = StorageWeakRef(storage), weight._version
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, layer.bias, "none", [], "")

    def fits(self, x: Tensor, layer: nn.Linear) -> bool:
        """Whether the kernel takes this product as it stands."""
        weight = layer.weight
        return (
            x.dtype == weight.dtype
            and x.dtype in (torch.float32, torch.bfloat16)
            and x.device.type == weight.device.type == "cpu"
            and x.is_contiguous()
            and x.numel() > 0
            and not torch.is_autocast_enabled("cpu")
            and not weight.is_inference()
            and getattr(layer, "low_rank", None) is None
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies pack for themselves: a packed weight is neither copied nor written."""
        return {"layer": self.layer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["layer"])  # type: ignore[misc]
