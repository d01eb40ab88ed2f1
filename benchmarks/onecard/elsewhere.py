"""A device that is not the CPU, played on the CPU: where its tensors meet those of the CPU it fails as a GPU does.

Every tensor of it holds one of the CPU, which does the arithmetic. Nothing is learned of speed, of kernels or of types:
``torch.autocast`` does nothing there, and a product of two types is one in the shorter. What shows is code that makes a
tensor in the wrong place, and how often numbers are asked for, each of which a GPU would be waited for (``waits``).

``play`` changes torch for the whole process. It stands on an interface that torch calls experimental (2.13 has it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

NAME = "elsewhere"
# Operations that may take tensors of both: copies, and an index, which a GPU takes from the CPU.
MIXED = ("copy", "index")
ASKING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")
PRODUCTS = ("mm", "bmm")

waits: list[str] = []


class Elsewhere(Tensor):
    """A tensor of the device; ``held`` is that of the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        while isinstance(held, Elsewhere):
            held = held.held
        layout: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, device=NAME + ":0", **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"elsewhere({self.held})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            twin = Elsewhere(self.held.detach().clone())
            memo[id(self)] = nn.Parameter(twin, self.requires_grad) if isinstance(self, nn.Parameter) else twin
        return memo[id(self)]

    def __getitem__(self, index: Any) -> Any:
        return Tensor.__getitem__(self, without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        Tensor.__setitem__(self, without_lists(index), value)

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.detach().held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def new_tensor(self, data: Any, **settings: Any) -> Tensor:
        return torch.tensor(data, dtype=settings.get("dtype", self.dtype), device=self.device)


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation's result, on the device if an operand is or it is asked for. Raises ``RuntimeError`` where tensors
    of both come together."""
    name, (flat, spec) = func._schema.name.partition("::")[2], tree_flatten((args, kwargs))
    here = {id(x.held): x for x in flat if isinstance(x, Elsewhere)}
    there = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.ndim]
    if here and there and not any(word in name for word in MIXED):
        raise RuntimeError(f"{name} of tensors on the device and on the CPU, {[list(x.shape) for x in there]}")
    plain, named = tree_unflatten([x.held if isinstance(x, Elsewhere) else x for x in flat], spec)
    where, stays = kwargs.get("device"), bool(here)
    if where is not None:
        stays, named = torch.device(where).type == NAME, named | {"device": torch.device("cpu")}
    if name.startswith(ASKING) or here and not stays:
        waits.append(name)
    if name in PRODUCTS and len(types := {x.dtype for x in plain}) > 1:
        plain = [x.to(min(types, key=lambda kind: kind.itemsize)) for x in plain]
    out = func(*plain, **named)
    if name == "copy_":
        return args[0]
    wrapped = tree_map_only(Tensor, lambda x: here.get(id(x)) if id(x) in here else Elsewhere(x), out)
    return wrapped if stays else out


def without_lists(index: Any) -> Any:
    """An index whose lists are tensors."""
    if isinstance(index, list):
        kind = torch.bool if index and isinstance(index[0], bool) else torch.long
        return torch.tensor(index, dtype=kind, device="cpu")
    return tuple(map(without_lists, index)) if isinstance(index, tuple) else index


class _Module:
    """What torch asks of a device's own module."""

    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    set_rng_state = staticmethod(lambda *_: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


def play() -> torch.device:
    """Make the device known to torch, for the rest of the process; call it before anything of redraft is imported.

    Raises ``AttributeError`` where this torch has no such interface.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: computed(func, args, kwargs), "PrivateUse1")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _kept.append(library)
    # Tensors that remember no versions cannot hold others, and a parameter that moves must be made anew.
    torch.inference_mode = lambda mode=True: torch.no_grad()  # type: ignore[misc,assignment]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    for name in ("tensor", "arange", "eye", "linspace", "randperm"):
        setattr(torch, name, _moved(getattr(torch, name)))
    return torch.device(NAME, 0)


_kept: list[Any] = []
_asking = False


def _moved(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes a tensor on the CPU and moves it, where torch's own would resize what it has made."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        global _asking
        if device is None and _asking:  # torch itself makes a tensor to see where they are made
            return plain(*args, **kwargs)
        _asking = True
        try:
            where = torch.device(device) if device is not None else torch.get_default_device()
        finally:
            _asking = False
        found = plain(*args, device="cpu" if where.type == NAME else where, **kwargs)
        return found.to(where) if where.type == NAME else found

    return made
