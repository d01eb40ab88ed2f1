"""Vocabulary maps of Eagle3 checkpoints, as several hands write them, brought into the one form of this project.

The form: ``d2t`` [D] as int64 offsets (target id = i + d2t[i]) and ``t2d`` [V] as booleans, both of one ascending set
of target ids; none at all for a draft of the full vocabulary, since engines refuse them there.

Shape legend: D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from redraft.artifact import dtype_name, read_pickled, read_pickled_table
from redraft.drafts.formats.rows import MAPS
from redraft.errors import UserError

# Files beside the weights that trainers keep the maps in: both in one, or one each.
BOTH = ("vocab_mapping.pt", "vocab_mapping.bin")
ENDINGS = (".pt", ".bin", ".npy")

# With this many entries or more, offsets that grow at every step would mean that no two ids of the map are
# neighbours, which maps of frequent tokens never are.
MANY = 256


# -- files beside the weights ------------------------------------------------------------------------------------------
def beside(folder: Path, state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The state with the maps that files beside the weights hold, where the weights have none themselves.

    Raises ``UserError`` for a file that holds no such map, and where it disagrees with the weights' own.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for name in BOTH:
        if (folder / name).is_file():
            found |= {key: (name, table) for key, table in read_pickled(folder / name).items() if key in MAPS}
    for key in MAPS:
        for file in (folder / f"{key}{ending}" for ending in ENDINGS):
            if file.is_file():
                found[key] = (file.name, _one_map(file))
    state = dict(state)
    for key, (name, table) in found.items():
        if key not in state:
            state[key] = table
            notes.append(f"{key} was read from {name} beside the weights")
        elif state[key].shape != table.shape or not torch.equal(state[key].long(), table.long()):
            raise UserError(f"{folder}: {key} in the weights and in {name} disagree; delete the one that is stale")
    return state


def _one_map(file: Path) -> Tensor:
    """The one table that a file holds. Raises ``UserError``."""
    try:
        if file.suffix == ".npy":
            return torch.from_numpy(numpy.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read as one table of numbers ({error}); save it as a tensor alone"
        ) from error
    return read_pickled_table(file)


# -- the maps ----------------------------------------------------------------------------------------------------------
def read_maps(state: dict[str, Tensor], config: Any, where: Path, notes: list[str]) -> dict[str, Tensor]:
    """The state with both maps in their form, each derived from the other if absent. What was done is noted.

    With the full vocabulary, maps that change nothing are left out. ``config`` has ``draft_vocab_size`` and
    ``target_vocab_size``. Raises ``UserError`` for maps that tell no set of target ids; what they tell is checked by
    :func:`check_vocabulary_map`.
    """
    state = dict(state)
    for name in MAPS:
        if name in state:
            state[name] = _integers(name, state[name], where, notes)
    if config.draft_vocab_size == config.target_vocab_size:
        whole = [n for n in MAPS if n in state and state[n].shape == (config.target_vocab_size,)]
        for name in [n for n in whole if bool((state[n] == (n == "t2d")).all())]:
            notes.append(f"{name} was left out: it maps the full vocabulary onto itself")
            del state[name]
        return state
    if "d2t" not in state and "t2d" not in state:
        return state
    if "d2t" not in state:
        ids_D = state["t2d"].nonzero().flatten()
        state["d2t"] = ids_D - torch.arange(len(ids_D))
        notes.append("d2t is not in the file; derived from t2d")
    elif state["d2t"].ndim == 1:
        _settle_offsets(state, config.target_vocab_size, where, notes)
    if not state["d2t"].any():
        notes.append(f"d2t is zero throughout: the draft can say the ids 0 to {len(state['d2t']) - 1} alone")
    if "t2d" not in state and state["d2t"].ndim == 1:
        ids_D = state["d2t"] + torch.arange(len(state["d2t"]))
        if not _inside(ids_D, config.target_vocab_size):
            raise UserError(f"{where}: d2t points outside the target's vocabulary of {config.target_vocab_size}")
        state["t2d"] = torch.isin(torch.arange(config.target_vocab_size), ids_D)
        notes.append("t2d is not in the file; derived from d2t")
    return state


def _integers(name: str, tensor: Tensor, where: Path, notes: list[str]) -> Tensor:
    """The map in the type that engines read; whole numbers of any other integer type are taken, and noted."""
    wanted = torch.int64 if name == "d2t" else torch.bool
    if tensor.dtype == wanted:
        return tensor
    kind = dtype_name(tensor.dtype)
    if tensor.is_floating_point() or tensor.is_complex() or (name == "d2t" and tensor.dtype == torch.bool):
        raise UserError(f"{where}: {name} is {kind}, which does not hold every id; save it with integers")
    if name == "t2d" and not bool(((tensor == 0) | (tensor == 1)).all()):
        raise UserError(f"{where}: t2d is {kind} with other values than 0 and 1; it must mark target ids")
    notes.append(f"{name} was {kind}; taken as {dtype_name(wanted)}")
    return tensor.to(wanted)


def _settle_offsets(state: dict[str, Tensor], rows: int, where: Path, notes: list[str]) -> None:
    """Turn a ``d2t`` of target ids into offsets where it certainly holds ids; refuse it where it may."""
    found_D = state["d2t"]
    numbers_D = torch.arange(len(found_D))
    growing = len(found_D) > 1 and bool((found_D[1:] > found_D[:-1]).all())
    if not growing or not _inside(found_D, rows):
        return  # offsets, or nothing at all
    told = state.get("t2d")
    if told is not None and told.shape == (rows,):
        sure = bool(told[found_D].all()) and int(told.sum()) == len(found_D)
    else:
        sure = not _inside(found_D + numbers_D, rows)
        if not sure and len(found_D) >= MANY:
            raise UserError(
                f"{where}: d2t grows at every step, as target ids do and offsets hardly ever; it must hold offsets "
                "(target id = i + d2t[i]), with t2d beside it where it does"
            )
    ids_D = found_D + numbers_D
    if sure and not (told is not None and _inside(ids_D, len(told)) and bool(told[ids_D].all())):
        state["d2t"] = found_D - numbers_D
        notes.append("d2t held target ids; taken as such and turned into offsets")


def check_vocabulary_map(state: Mapping[str, Tensor], config: Any, where: str | Path) -> None:
    """The maps must describe one ascending set of target ids. Raises ``UserError``.

    ``config`` as of :func:`read_maps`.
    """
    if config.draft_vocab_size > config.target_vocab_size:
        raise UserError(f"{where}: a draft vocabulary of {config.draft_vocab_size} exceeds the target's")
    if config.draft_vocab_size == config.target_vocab_size:
        return
    ids_D = state["d2t"] + torch.arange(config.draft_vocab_size)
    if not _inside(ids_D, config.target_vocab_size):
        raise UserError(f"{where}: d2t points outside the target's vocabulary of {config.target_vocab_size}")
    if not bool((ids_D[1:] > ids_D[:-1]).all()):
        raise UserError(f"{where}: d2t must hold offsets that give ascending target ids (id = i + d2t[i])")
    if not torch.equal(state["t2d"].nonzero().flatten(), ids_D):
        raise UserError(
            f"{where}: t2d does not mark the same target ids as d2t; put the map that the draft was trained with "
            "beside the weights (vocab_mapping.pt), or take the checkpoint anew"
        )


def _inside(ids_D: Tensor, rows: int) -> bool:
    return bool(((ids_D >= 0) & (ids_D < rows)).all())
