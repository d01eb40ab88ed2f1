"""Optimisers and the schedule.

Matrices inside the layer take Muon (orthogonalised momentum, torch's own), scaled so that its steps have the size
of AdamW's and one learning rate serves both; the head, the norms, biases and routers of experts take AdamW.

torch's Muon orthogonalises in bfloat16, whatever the processor: where that is emulated it is nearly all of a step.
There, and where losses are in float32, the same iteration runs in float32, which is the more exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from redraft.arithmetic import fastest


class Optimizers:
    """One or two torch optimisers that step together."""

    def __init__(self, parts: list[torch.optim.Optimizer], names: dict[Any, str], muon: str = "bfloat16") -> None:
        """``muon`` is the data type that Muon orthogonalises in."""
        self.parts, self.names, self.muon = parts, names, muon

    def step(self, learning_rate: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            exact = isinstance(part, torch.optim.Muon) and self.muon == "float32"
            with InFloat32() if exact else nullcontext():
                part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Every state tensor under ``parameter/key``, for safetensors."""
        return {
            f"{self.names[parameter]}/{key}": value.detach().clone() if torch.is_tensor(value) else torch.tensor(value)
            for part in self.parts
            for parameter, entries in part.state.items()
            for key, value in entries.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for part in self.parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    prefix = f"{self.names[parameter]}/"
                    # A counter (no axes) stays where torch keeps it, on the CPU.
                    found = {
                        k.removeprefix(prefix): v.to(parameter.device, copy=True) if v.ndim else v.clone()
                        for k, v in tensors.items()
                        if k.startswith(prefix)
                    }
                    if found:
                        part.state[parameter] = found


class InFloat32(TorchFunctionMode):
    """While it is entered, what asks for a tensor in bfloat16 gets a float32 copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        asked = func is Tensor.bfloat16 or func is Tensor.to and torch.bfloat16 in (*args[1:], *given.values())
        # Who asked may write into what it gets, so the tensor itself will not do.
        return args[0].to(torch.float32, copy=True) if asked else func(*args, **given)


def muon_type(device: torch.device, precision: str) -> str:
    """The data type for Muon's orthogonalisation: float32 where losses are in it, since bfloat16 turns the last digit
    of a gradient into a thousandth of a step; else the faster on a CPU, and torch's own bfloat16 elsewhere."""
    if precision == "float32":
        return precision
    return fastest("cpu").dtype if device.type == "cpu" else "bfloat16"


def make_optimizers(named: Iterable[tuple[str, nn.Parameter]], kind: str, weight_decay: float) -> Optimizers:
    """The optimisers of a kind that the training settings name."""
    names = {parameter: name for name, parameter in named}
    matrices = [p for p, n in names.items() if p.ndim == 2 and not _is_table(n) and kind != "adamw"]
    others = [p for p in names if not any(p is m for m in matrices)]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    if others:
        parts.append(torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay))
    return Optimizers(parts, names)


def _is_table(name: str) -> bool:
    """Whether a matrix is a list of rows, looked up or scored one by one: orthogonal steps make no sense for it."""
    return name.startswith(("lm_head", "embed_tokens")) or name.endswith("router.weight")


def learning_rate(step: int, total: int, peak: float, warmup: float = 0.05, floor: float = 0.02) -> float:
    """Linear warm-up over the first ``warmup`` share of the steps, then a half cosine down to ``floor * peak``."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return peak * (step + 1) / rise
    share = min(1.0, (step - rise) / max(1, total - rise))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))
