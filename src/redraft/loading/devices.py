"""Where a target is put: one device, or all accelerators together.

``auto`` takes the accelerators that there are: one as it is; several by whole layers, each as many as its free memory
holds, with embedding, norm and head on the first, where drafts are too. Hidden states wander from one to the next, as
the package accelerate moves them. Without an accelerator it is the CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from redraft.errors import UserError
from redraft.loading.places import first_line
from redraft.settings.base import AUTO
from redraft.target.facts import text_decoder

# Of a device's free memory what weights may take: the rest is for keys, values and what a pass works with.
FILLED = 0.9


def usable(device: str | torch.device) -> torch.device:
    """The device of this name; of ``auto`` the first accelerator, or the CPU where there is none.

    Raises ``UserError`` where there is none of the name, before anything is read.
    """
    if device == AUTO:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {device} cannot be used: {first_line(error)}") from error


def placed(model: Any, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """Arguments of transformers that let the weights of ``model``, which holds no numbers, be read onto their devices
    without a copy in the machine's memory; none where they can only be moved there.

    Raises ``UserError`` where there is no room, or where several devices want a package that is not there.
    """
    first = usable(device)
    if first.type != "cuda":
        return {} if first.type == "cpu" or not _accelerate() else {"device_map": {"": first}}
    several = device == AUTO and torch.cuda.device_count() > 1
    numbers = range(torch.cuda.device_count()) if several else [first.index or 0]
    found = spread(model, dtype, [torch.cuda.mem_get_info(k)[0] for k in numbers])
    if several and not _accelerate():
        raise UserError("a target over several devices needs the package accelerate: pip install accelerate")
    if not several:
        return {"device_map": {"": first}} if _accelerate() else {}
    return {"device_map": found}


def _accelerate() -> bool:
    return importlib.util.find_spec("accelerate") is not None


def spread(model: Any, dtype: torch.dtype, free: Sequence[int]) -> dict[str, int]:
    """The number of the device of every part of ``model``, for as many devices as there are figures of ``free`` bytes.

    Layers in order, each device filled in proportion to its room; everything else is on the first. Raises ``UserError``
    where all together have no room.
    """
    names = {id(module): name for name, module in model.named_modules()}
    layers: nn.ModuleList = text_decoder(model).layers
    sizes = [sum(weight.numel() for weight in layer.parameters()) * dtype.itemsize for layer in layers]
    inside = tuple(f"{names[id(layer)]}." for layer in layers)
    rest = {name: weight for name, weight in model.named_parameters() if not name.startswith(inside)}
    ends = sum(weight.numel() for weight in rest.values()) * dtype.itemsize
    room = [FILLED * bytes for bytes in free]
    need = sum(sizes) + ends
    if need > sum(room) or ends > room[0]:
        figures = ", ".join(f"{bytes / 1e9:.1f}" for bytes in free)
        raise UserError(
            f"there is no room for {need / 1e9:.1f} GB of weights: {figures} GB are free on the device; name another, "
            "all of them (--device auto), or the CPU (--device cpu)"
        )
    around = {place[:k] for place in inside for k, letter in enumerate(place) if letter == "."}  # what holds layers
    found = {name: 0 for name in names.values() if name and name not in around and not f"{name}.".startswith(inside)}
    share, number, used = need / sum(room), 0, float(ends)
    for layer, size in zip(layers, sizes, strict=True):
        # A device takes a layer while more than half of it is within its share; the last one takes what is left.
        while number < len(free) - 1 and used + size / 2 > share * room[number]:
            number, used = number + 1, 0.0
        used += size
        found[names[id(layer)]] = number
    return found
