"""Whether the embedding that a draft ships is its target's, bit for bit, and may be borrowed instead.

Trainers copy the target's table into the draft and freeze it; a fine-tuned target has moved away from it, and a draft
that was trained with its own table computes other logits with another.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from redraft.artifact import KIND_OF, dtype_name, read_rows
from redraft.drafts.formats.meaning import Reading
from redraft.loading.checkpoint import weight_files
from redraft.loading.places import folder_of, split_name
from redraft.pieces import Table, in_rows

# Rows read in one go, and those by which a table is told where no numbers are looked at.
ROWS, FEW = 1024, 16
TABLE = "embed_tokens.weight"
# The file of a PEFT adapter, and what names of its tensors hold that change the embedding or the head.
ADAPTER_WEIGHTS, ENDS = "adapter_model.safetensors", ("embed_tokens", "lm_head", "lora_embedding")

Likeness = Literal["same", "rounded", "other"]


def is_targets(own: Tensor, target: Any, rows: int | None = None) -> bool | None:
    """Whether ``own`` [V, H] holds the numbers of a target's embedding, in the narrower of their types.

    ``target`` is a target, its head or the facts about it; none where its embedding is in no reach. With ``rows`` the
    first of them stand for all.
    """
    found = likeness(own, target, rows)
    return None if found is None else found != "other"


def likeness(own: Tensor, target: Any, rows: int | None = None) -> Likeness | None:
    """How like ``own`` [V, H] is to a target's embedding; none where that is in no reach.

    "rounded": the same in the narrower of their types, and not in the wider one. ``target`` and ``rows`` as of
    :func:`is_targets`.
    """
    other = table_of(target)
    if other is None or own.shape != other.shape:
        return None if other is None else "other"
    return _compared(own[:rows], in_rows(other))


def _compared(own: Tensor, others: Iterable[Tensor]) -> Likeness:
    if not own.is_floating_point():
        return "other"
    same: Likeness = "same"
    done = 0
    for other in others:
        mine = own[done : done + len(other)]
        if not len(mine):
            break
        other, done = other[: len(mine)], done + len(mine)
        narrow = min((own.dtype, other.dtype), key=lambda kind: kind.itemsize)
        if own.dtype != other.dtype and own.dtype.itemsize == other.dtype.itemsize:
            narrow = torch.float32
        other = other.to(mine.device)
        if not torch.equal(mine.to(narrow), other.to(narrow)):
            return "other"
        if own.dtype != other.dtype and not torch.equal(mine.float(), other.float()):
            same = "rounded"
    return same


def table_of(target: Any) -> Table | Tensor | None:
    """The embedding of a target [V, H], of its weights or in its folder; none where it is in no reach.

    ``target`` is a target, its head or the facts about it.
    """
    weight = getattr(getattr(target, "embedding", None), "weight", None)
    if isinstance(weight, Tensor):
        return weight.detach()
    return _on_disk(target)


def _on_disk(target: Any) -> Table | None:
    """A target's embedding, where its weights are on this machine.

    Of a target that is an adapter it is the base model's, unless the adapter changes it.
    """
    name = str(getattr(target, "name", None) or "")
    base, adapter = split_name(name) if name else ("", None)
    if adapter is not None and not _spares_embedding(Path(adapter)):
        return None
    folder = folder_of(base) if base else None
    if folder is None or not (folder / "config.json").is_file():
        return None
    for file in weight_files(folder):
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


def _spares_embedding(adapter: Path) -> bool:
    """Whether an adapter in a folder leaves the embedding of its base model as it is; false where that is not seen.

    A change of the head counts too: where both share one table, PEFT may change both.
    """
    try:
        with safe_open(str(adapter / ADAPTER_WEIGHTS), framework="pt") as opened:
            return not any(part in key for key in opened.keys() for part in ENDS)
    except (SafetensorError, OSError):
        return False


def compare(own: Tensor, target: Any, reading: Reading, values: bool = True) -> None:
    """Enter in ``reading`` whether ``own`` [V, H], which a draft ships, is the target's table; without ``values`` by
    its first rows."""
    like = likeness(own, target, None if values else FEW)
    if like in ("same", "rounded"):
        rounded = "" if like == "same" else ", but for rounding"
        reading.take("embedding", "target", "read", f"{TABLE}, which is the target's{rounded}")
        if rounded:
            reading.notes.append(
                f"the embedding that the draft ships ({dtype_name(own.dtype)}) is the target's but for rounding; "
                "the target's own numbers are taken in its place"
            )
        return
    seen = "" if like is not None else "; the target's is not at hand to compare it with"
    reading.take("embedding", "own", "read", TABLE + seen)
    if like is not None:
        reading.notes.append("the draft keeps the embedding that it ships: it is not the target's")
