"""Vocabulary maps of Eagle3 checkpoints: as several hands write them, brought into the one form of this project.

Shape legend: D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from redraft.drafts.eagle3.module import Eagle3Config
from redraft.errors import UserError

# With this many entries or more, offsets that grow at every step would mean that no two ids of the map are
# neighbours, which maps of frequent tokens never are.
MANY = 256


def read_maps(state: dict[str, Tensor], config: Eagle3Config, where: Path, notes: list[str]) -> dict[str, Tensor]:
    """The state with ``d2t`` [D] as int64 offsets and ``t2d`` [V] as booleans, each derived from the other if absent.

    With the full vocabulary, maps that change nothing are left out: engines refuse them. What was done is noted.
    Raises ``UserError`` for maps that tell no set of target ids; what they tell is checked elsewhere.
    """
    state = dict(state)
    for name in ("d2t", "t2d"):
        if name in state:
            state[name] = _integers(name, state[name], where, notes)
    if config.draft_vocab_size == config.target_vocab_size:
        return _without_identities(state, notes)
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
        state["t2d"] = torch.zeros(config.target_vocab_size, dtype=torch.bool)
        state["t2d"][ids_D] = True
        notes.append("t2d is not in the file; derived from d2t")
    return state


def _integers(name: str, tensor: Tensor, where: Path, notes: list[str]) -> Tensor:
    """The map in the type that engines read; whole numbers of any other integer type are taken, and noted."""
    wanted = torch.int64 if name == "d2t" else torch.bool
    if tensor.dtype == wanted:
        return tensor
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_floating_point() or tensor.is_complex():
        raise UserError(f"{where}: {name} is {kind}, which does not hold every id; save it with integers")
    if name == "t2d" and not bool(((tensor == 0) | (tensor == 1)).all()):
        raise UserError(f"{where}: t2d is {kind} with other values than 0 and 1; it must mark target ids")
    notes.append(f"{name} was {kind}; taken as {str(wanted).removeprefix('torch.')}")
    return tensor.to(wanted)


def _without_identities(state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    for name, identity in (("d2t", lambda t: not t.any()), ("t2d", lambda t: bool(t.all()))):
        if name in state and identity(state[name]):
            notes.append(f"{name} was left out: it maps the full vocabulary onto itself")
            del state[name]
    return state


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
    if sure and not (told is not None and _same_set(found_D + numbers_D, told)):
        state["d2t"] = found_D - numbers_D
        notes.append("d2t held target ids; taken as such and turned into offsets")


def check_vocabulary_map(state: Mapping[str, Tensor], config: Eagle3Config, where: str | Path) -> None:
    """The maps must describe one ascending set of target ids. Raises ``UserError``.

    ``d2t`` [D] holds offsets (target id = i + d2t[i]); ``t2d`` [V] marks the ids that the draft can say.
    """
    if config.draft_vocab_size > config.target_vocab_size:
        raise UserError(f"{where}: a draft vocabulary of {config.draft_vocab_size} exceeds the target's")
    if config.draft_vocab_size == config.target_vocab_size:
        return
    ids_D = state["d2t"] + torch.arange(config.draft_vocab_size)
    if int(ids_D.min()) < 0 or int(ids_D.max()) >= config.target_vocab_size:
        raise UserError(f"{where}: d2t points outside the target's vocabulary of {config.target_vocab_size}")
    if not bool((ids_D[1:] > ids_D[:-1]).all()):
        raise UserError(f"{where}: d2t must hold offsets that give ascending target ids (id = i + d2t[i])")
    member_V = torch.zeros(config.target_vocab_size, dtype=torch.bool)
    member_V[ids_D] = True
    if not torch.equal(member_V, state["t2d"].bool()):
        raise UserError(f"{where}: t2d does not mark the same target ids as d2t")


def _inside(ids_D: Tensor, rows: int) -> bool:
    return bool(((ids_D >= 0) & (ids_D < rows)).all())


def _same_set(ids_D: Tensor, told_V: Tensor) -> bool:
    return _inside(ids_D, len(told_V)) and bool(told_V[ids_D].all())
