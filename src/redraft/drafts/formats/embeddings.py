"""Whether the embedding that a draft ships is its target's, bit for bit, and may be borrowed instead.

Trainers copy the target's table into the draft and freeze it; a fine-tuned target has moved away from it, and a draft
that was trained with its own table computes other logits with another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from redraft.drafts.formats.meaning import Reading
from redraft.loading.checkpoint import weight_files
from redraft.loading.places import EMBEDDED_PREFIX, locate

# Rows compared in one go.
ROWS = 4096
TABLE = "embed_tokens.weight"


def equal_rows(own: Tensor, other: Tensor) -> bool:
    """Whether two tables [V, H] hold the same numbers in the narrower of their types."""
    if own.shape != other.shape:
        return False
    narrow = min((own.dtype, other.dtype), key=lambda kind: kind.itemsize)
    if own.dtype != other.dtype and own.dtype.itemsize == other.dtype.itemsize:
        narrow = torch.float32
    pairs = zip(own.split(ROWS), other.split(ROWS), strict=True)
    return all(torch.equal(a.to(narrow), b.to(a.device, narrow)) for a, b in pairs)


def table_of(target: Any) -> Tensor | None:
    """The embedding of a target [V, H], of its weights or in its folder; none where it is in no reach.

    ``target`` is a target, its head or the facts about it.
    """
    weight = getattr(getattr(target, "embedding", None), "weight", None)
    if isinstance(weight, Tensor):
        return weight.detach()
    name = str(getattr(target, "name", None) or "")
    place = locate(name)["pretrained_model_name_or_path"] if name.startswith(EMBEDDED_PREFIX) else name
    if not name or not (Path(place) / "config.json").is_file():
        return None
    for file in weight_files(Path(place)):
        try:
            with safe_open(str(file), framework="pt") as opened:
                found = [key for key in opened.keys() if key == TABLE or key.endswith(f".{TABLE}")]
                if len(found) == 1:
                    table: Tensor = opened.get_tensor(found[0])
                    return table
        except (SafetensorError, OSError, ValueError):
            return None  # whoever opens the target says what is wrong with it
    return None


def compare(own: Tensor, target: Any, reading: Reading) -> None:
    """Enter in ``reading`` whether ``own`` [V, H], which a draft ships, is the target's table."""
    table = table_of(target)
    if table is not None and equal_rows(own, table):
        reading.take("embedding", "target", "read", f"{TABLE}, which is the target's")
        return
    seen = "" if table is not None else "; the target's is not at hand to compare it with"
    reading.take("embedding", "own", "read", TABLE + seen)
    if table is None:
        return
    if table.shape != own.shape:
        why = f"it is {list(own.shape)} and the target's {list(table.shape)}"
    else:
        why = "it is not the target's"
    reading.notes.append(f"the draft keeps the embedding that it ships: {why}")
