"""Whether the embedding that a draft ships is its target's, bit for bit, and may be borrowed instead.

Trainers copy the target's table into the draft and freeze it; a fine-tuned target has moved away from it, and a draft
that was trained with its own table computes other logits with another.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from redraft.artifact import read_rows, read_tensors
from redraft.drafts.formats.meaning import Reading
from redraft.loading.checkpoint import weight_files
from redraft.loading.places import EMBEDDED_PREFIX, locate

# Rows compared in one go.
ROWS = 4096
TABLE = "embed_tokens.weight"


def is_targets(own: Tensor, target: Any) -> bool | None:
    """Whether ``own`` [V, H] holds the numbers of a target's embedding, in the narrower of their types.

    ``target`` is a target, its head or the facts about it; none where its embedding is in no reach.
    """
    weight = getattr(getattr(target, "embedding", None), "weight", None)
    if isinstance(weight, Tensor):
        return own.shape == weight.shape and _equal(own, weight.detach().split(ROWS))
    found = _on_disk(target)
    if found is None:
        return None
    file, name, shape = found
    return tuple(own.shape) == shape and _equal(own, read_rows(file, name, ROWS))


def _equal(own: Tensor, others: Iterable[Tensor]) -> bool:
    if not own.is_floating_point():
        return False
    for mine, other in zip(own.split(ROWS), others, strict=True):
        narrow = min((own.dtype, other.dtype), key=lambda kind: kind.itemsize)
        if own.dtype != other.dtype and own.dtype.itemsize == other.dtype.itemsize:
            narrow = torch.float32
        if not torch.equal(mine.to(narrow), other.to(mine.device, narrow)):
            return False
    return True


def table_of(target: Any) -> Tensor | None:
    """The embedding of a target [V, H], of its weights or in its folder; none where it is in no reach.

    ``target`` is a target, its head or the facts about it.
    """
    weight = getattr(getattr(target, "embedding", None), "weight", None)
    if isinstance(weight, Tensor):
        return weight.detach()
    found = _on_disk(target)
    return None if found is None else read_tensors(found[0])[found[1]]


def _on_disk(target: Any) -> tuple[Path, str, tuple[int, ...]] | None:
    """The file, the name there and the shape of a target's embedding, where the target is a folder here."""
    name = str(getattr(target, "name", None) or "")
    place = locate(name)["pretrained_model_name_or_path"] if name.startswith(EMBEDDED_PREFIX) else name
    if not name or not (Path(place) / "config.json").is_file():
        return None
    for file in weight_files(Path(place)):
        try:
            with safe_open(str(file), framework="pt") as opened:
                found = [key for key in opened.keys() if key == TABLE or key.endswith(f".{TABLE}")]
                if len(found) == 1:
                    return file, found[0], tuple(opened.get_slice(found[0]).get_shape())
        except (SafetensorError, OSError, ValueError):
            return None  # whoever opens the target says what is wrong with it
    return None


def compare(own: Tensor, target: Any, reading: Reading) -> None:
    """Enter in ``reading`` whether ``own`` [V, H], which a draft ships, is the target's table."""
    same = is_targets(own, target)
    if same:
        reading.take("embedding", "target", "read", f"{TABLE}, which is the target's")
        return
    seen = "" if same is not None else "; the target's is not at hand to compare it with"
    reading.take("embedding", "own", "read", TABLE + seen)
    if same is not None:
        reading.notes.append("the draft keeps the embedding that it ships: it is not the target's")
