"""Training state on disk: trained weights, optimiser state and position, replaced atomically, without pickle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from redraft.artifact import atomic_write_json, read_json, read_tensors
from redraft.errors import UserError
from redraft.train.optimizer import Optimizers

Named = list[tuple[str, nn.Parameter]]


class Checkpoint:
    """``state.json`` names the tensor file that belongs to it, so that no half-written pair is ever read."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Raises ``UserError`` when the folder holds a run of another config."""
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "state.json"
        if self.path.exists():
            stored = read_json(self.path)["identity"]
            if stored.keys() != self.identity.keys():
                raise UserError(f"{folder} was begun by another version of redraft; delete it to train anew")
            if stored != self.identity:
                changed = sorted(k for k in stored if stored[k] != self.identity[k])
                raise UserError(
                    f"{folder} belongs to a run with another {', '.join(changed)}; "
                    "give another run directory or the settings it was started with"
                )

    def save(self, trained: Named, optimizers: Optimizers, state: dict[str, Any]) -> None:
        tensors = {f"weight/{name}": p.detach().clone() for name, p in trained}
        tensors |= {f"optimizer/{key}": value for key, value in optimizers.state().items()}
        name = f"state-{state['step']:07d}.safetensors"
        self._write(tensors, name)
        atomic_write_json(self.path, {"identity": self.identity, "file": name, "state": state})
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self, trained: Named, optimizers: Optimizers) -> dict[str, Any] | None:
        """Restore weights and optimisers in place; ``None`` when there is nothing to resume."""
        if not self.path.exists():
            return None
        stored = read_json(self.path)
        tensors = read_tensors(self.folder / stored["file"])
        with torch.no_grad():
            for name, parameter in trained:
                parameter.copy_(tensors[f"weight/{name}"])
        prefix = "optimizer/"
        optimizers.load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        return stored["state"]

    def save_best(self, trained: Named) -> None:
        self._write({name: p.detach().clone() for name, p in trained}, "best.safetensors")

    def load_best(self, trained: Named) -> None:
        tensors = read_tensors(self.folder / "best.safetensors")
        with torch.no_grad():
            for name, parameter in trained:
                parameter.copy_(tensors[name])

    def _write(self, tensors: dict[str, torch.Tensor], name: str) -> None:
        temporary = self.folder / f".{name}.partial"
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
        temporary.replace(self.folder / name)


def stored_precision(folder: Path, unrecorded: str) -> str | None:
    """The data type that the training in ``folder`` computes in; None where none has begun. Raises ``UserError``.

    ``unrecorded`` stands for that of a run of before this was recorded.
    """
    path = folder / "state.json"
    if not path.exists():
        return None
    return str(read_json(path)["state"].get("arithmetic", {}).get("precision", unrecorded))


def rows_digest(keys: list[str]) -> str:
    """A short fingerprint of which rows a run trains on."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16]
