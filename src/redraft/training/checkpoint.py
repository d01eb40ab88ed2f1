"""Training state on disk: trained weights, optimiser state and position, replaced atomically, without pickle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redraft.artifact import atomic_write_json, read_checked, read_json, write_checked
from redraft.errors import UserError
from redraft.training.optimizer import Optimizers

Named = list[tuple[str, nn.Parameter]]
BEST_FILE, STATE_FILE = "best.safetensors", "state.json"
# The entry of an identity that names what a draft was before it was trained; empty for a new draft.
OLD_DRAFT = "old draft"


class Checkpoint:
    """``state.json`` names the tensor file that belongs to it, so that no half-written pair is ever read."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Raises ``UserError`` when the folder holds a run of another config, or a damaged one."""
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / STATE_FILE
        if self.path.exists():
            stored = self._stored()["identity"]
            if OLD_DRAFT in self.identity and not stored.get(OLD_DRAFT):
                stored[OLD_DRAFT] = self.identity[OLD_DRAFT]  # most runs did not say it once
            if stored.keys() != self.identity.keys():
                raise UserError(f"{folder} was begun by another version of redraft; delete it to train anew")
            if stored != self.identity:
                changed = sorted(k for k in stored if stored[k] != self.identity[k])
                raise UserError(
                    f"{folder} belongs to a run with another {', '.join(changed)}; "
                    "give another run directory or the settings it was started with"
                )

    @property
    def _mend(self) -> str:
        """What a person does about damage."""
        return f"delete the folder {self.folder} and give the same command again, which trains anew"

    def _stored(self) -> dict[str, Any]:
        """``state.json``. Raises ``UserError`` when it is damaged; older ones have no checksum."""
        stored = read_json(self.path)
        entries = {"identity", "file", "state"}
        if not entries <= stored.keys() or stored.get("checksum", digest(stored)) != digest(stored):
            raise UserError(f"{self.path} is damaged: it no longer says what was written; {self._mend}")
        return stored

    def save(self, trained: Named, optimizers: Optimizers, state: dict[str, Any]) -> None:
        """Write weights, optimisers and ``state`` as one. Raises ``UserError`` on a full disk; the last one stays."""
        tensors: dict[str, torch.Tensor] = {f"weight/{name}": p for name, p in trained}
        tensors |= {f"optimizer/{key}": value for key, value in optimizers.state().items()}
        name = f"state-{state['step']:07d}.safetensors"
        write_checked(self.folder / name, tensors)
        entry = json.loads(json.dumps({"identity": self.identity, "file": name, "state": state}))
        atomic_write_json(self.path, entry | {"checksum": digest(entry)})
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self, trained: Named, optimizers: Optimizers) -> dict[str, Any] | None:
        """Restore weights and optimisers in place; ``None`` when there is nothing to resume.

        Raises ``UserError`` that names the damaged file, also for the best weights, which are read only at the end.
        """
        if not self.path.exists():
            return None
        stored = self._stored()
        if (self.folder / BEST_FILE).exists():  # some that train keep no best weights besides the last
            self._best(trained)
        tensors = read_checked(self.folder / stored["file"], self._mend)
        self._copy({name: f"weight/{name}" for name, _ in trained}, tensors, trained, stored["file"])
        prefix = "optimizer/"
        optimizers.load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        return stored["state"]

    def save_best(self, trained: Named) -> None:
        write_checked(self.folder / BEST_FILE, dict(trained))

    def load_best(self, trained: Named) -> None:
        """Put the best weights in place. Raises ``UserError`` when their file is damaged."""
        self._copy({name: name for name, _ in trained}, self._best(trained), trained, BEST_FILE)

    def _best(self, trained: Named) -> dict[str, torch.Tensor]:
        return read_checked(self.folder / BEST_FILE, self._mend)

    def _copy(self, names: dict[str, str], tensors: dict[str, torch.Tensor], trained: Named, file: str) -> None:
        if missing := sorted(set(names.values()) - set(tensors)):
            raise UserError(f"{self.folder / file} is damaged: it lacks {missing[0]}; {self._mend}")
        with torch.no_grad():
            for name, parameter in trained:
                parameter.copy_(tensors[names[name]])


def digest(entry: dict[str, Any]) -> str:
    """A fingerprint of a JSON object without its ``checksum`` (16 hex digits)."""
    text = json.dumps({k: v for k, v in entry.items() if k != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
