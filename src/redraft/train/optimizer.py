"""Optimisers and the schedule.

Matrices inside the layer take Muon (orthogonalised momentum, torch's own), scaled so that its steps have the size
of AdamW's and one learning rate serves both; the head, the norms, biases and routers of experts take AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from redraft.errors import UserError

OPTIMIZERS = ("muon", "adamw")


class Optimizers:
    """One or two torch optimisers that step together."""

    def __init__(self, parts: list[torch.optim.Optimizer], names: dict[Any, str]) -> None:
        self.parts, self.names = parts, names

    def step(self, learning_rate: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
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


def make_optimizers(named: Iterable[tuple[str, nn.Parameter]], kind: str, weight_decay: float) -> Optimizers:
    """Raises ``UserError`` for an unknown kind."""
    if kind not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {kind!r}; choose one of {', '.join(OPTIMIZERS)}")
    names = {parameter: name for name, parameter in named}
    matrices = [p for p, n in names.items() if p.ndim == 2 and not _is_table(n)]
    if kind == "adamw":
        matrices = []
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
