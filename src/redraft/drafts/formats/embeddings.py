"""Whether the embedding that a draft ships is its target's, bit for bit, and may be borrowed instead.

Trainers copy the target's table into the draft and freeze it; a fine-tuned target has moved away from it, and a draft
that was trained with its own table computes other logits with another.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from redraft.artifact import KIND_OF, read_rows
from redraft.drafts.formats.meaning import Reading
from redraft.loading.checkpoint import weight_files
from redraft.loading.places import EMBEDDED_PREFIX, locate
from redraft.pieces import Table, in_rows

# Rows read in one go, and those by which a table is told where no numbers are looked at.
ROWS, FEW = 1024, 16
TABLE = "embed_tokens.weight"


def is_targets(own: Tensor, target: Any, rows: int | None = None) -> bool | None:
    """Whether ``own`` [V, H] holds the numbers of a target's embedding, in the narrower of their types.

    ``target`` is a target, its head or the facts about it; none where its embedding is in no reach. With ``rows`` the
    first of them stand for all.
    """
    other = table_of(target)
    if other is None or own.shape != other.shape:
        return None if other is None else False
    return own.is_floating_point() and _equal(own[:rows], in_rows(other))


def _equal(own: Tensor, others: Iterable[Tensor]) -> bool:
    done = 0
    for other in others:
        mine = own[done : done + len(other)]
        if not len(mine):
            break
        other, done = other[: len(mine)], done + len(mine)
        narrow = min((own.dtype, other.dtype), key=lambda kind: kind.itemsize)
        if own.dtype != other.dtype and own.dtype.itemsize == other.dtype.itemsize:
            narrow = torch.float32
        if not torch.equal(mine.to(narrow), other.to(mine.device, narrow)):
            return False
    return True


def table_of(target: Any) -> Table | Tensor | None:
    """The embedding of a target [V, H], of its weights or in its folder; none where it is in no reach.

    ``target`` is a target, its head or the facts about it.
    """
    weight = getattr(getattr(target, "embedding", None), "weight", None)
    if isinstance(weight, Tensor):
        return weight.detach()
    return _on_disk(target)


def _on_disk(target: Any) -> Table | None:
    """A target's embedding, where the target is a folder here."""
    name = str(getattr(target, "name", None) or "")
    place = locate(name)["pretrained_model_name_or_path"] if name.startswith(EMBEDDED_PREFIX) else name
    if not name or not (Path(place) / "config.json").is_file():
        return None
    for file in weight_files(Path(place)):
        try:
            with safe_open(str(file), framework="pt") as opened:
                found = [key for key in opened.keys() if key == TABLE or key.endswith(f".{TABLE}")]
                if len(found) == 1:
                    part = opened.get_slice(found[0])
                    kind = next(kind for kind, word in KIND_OF.items() if word == part.get_dtype())
                    return Table(kind, torch.Size(part.get_shape()), partial(read_rows, file, found[0], ROWS))
        except (SafetensorError, OSError, ValueError, StopIteration):
            return None  # whoever opens the target says what is wrong with it
    return None


def compare(own: Tensor, target: Any, reading: Reading, values: bool = True) -> None:
    """Enter in ``reading`` whether ``own`` [V, H], which a draft ships, is the target's table; without ``values`` by
    its first rows."""
    same = is_targets(own, target, None if values else FEW)
    if same:
        reading.take("embedding", "target", "read", f"{TABLE}, which is the target's")
        return
    seen = "" if same is not None else "; the target's is not at hand to compare it with"
    reading.take("embedding", "own", "read", TABLE + seen)
    if same is not None:
        reading.notes.append("the draft keeps the embedding that it ships: it is not the target's")
