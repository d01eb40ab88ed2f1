"""redraft's own format: a draft, or the private part of one, as a folder of ``redraft.json`` and safetensors.

Loading is strict in both directions: every missing, extra, misshaped or non-finite tensor is named. No
pickle is run or written. Writing is all or nothing: a new folder is filled beside the old one and takes its place at
the end, after the free space of the disk has been checked. A family may put more files into the folder of a draft, so
that others load it as it is. See docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.artifact import check_tensors, read_json, read_tensors, tensors_bytes, tensors_hash, write_tensors
from redraft.drafts.base import Draft, DraftConfig
from redraft.drafts.scaling import Coarse, told
from redraft.errors import UserError
from redraft.files import atomic_folder, atomic_write_json, settle
from redraft.registries import FAMILIES

SCHEMA = 1
META_FILE = "redraft.json"
PRIVATE_FILE = "private.safetensors"

# What redraft.json holds besides the schema: key, type, the type in words.
META_KINDS: tuple[tuple[str, type, str], ...] = (
    ("family", str, "text"),
    ("config", dict, "JSON object"),
    ("content_hash", str, "text"),
    ("base_draft_hash", str, "text"),
    ("tensors", list, "list of names"),
    ("by_rows", list, "list of names"),
    ("coarse", dict, "JSON object"),
    ("provenance", dict, "JSON object"),
)


# -- redraft.json ----------------------------------------------------------------------------------------------------
def read_meta(folder: str | Path, kind: str) -> dict[str, Any]:
    """``redraft.json`` of an artifact of this kind ("draft" or "private"), checked. Raises ``UserError``."""
    folder = Path(folder)
    settle(folder)
    if not folder.exists():
        raise UserError(f"{folder} does not exist; name a folder that holds {META_FILE}")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name one that holds {META_FILE}")
    path = folder / META_FILE
    meta = read_json(path, finite=False)
    schema = meta.get("schema")
    if type(schema) is not int or schema < 1:
        raise UserError(f"{path} has no schema number; it was not written by redraft")
    if schema > SCHEMA:
        raise UserError(f"{path} has schema {schema} and this redraft reads up to {SCHEMA}; upgrade redraft")
    if meta.get("kind") != kind:
        hint = "load it onto its base draft" if meta.get("kind") == "private" else "name a private part"
        raise UserError(f"{folder} holds a {meta.get('kind')} artifact where a {kind} is needed; {hint}")
    wanted = ["family", "config", "content_hash"] + (["base_draft_hash", "tensors"] if kind == "private" else [])
    absent = [key for key in wanted if key not in meta]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}; copy the artifact again")
    for key, form, what in META_KINDS:
        if not isinstance(meta.get(key, form()), form):
            raise UserError(f"{path} has a {key} that is no {what}; copy the artifact again")
    for key in ("tensors", "by_rows"):
        if not all(isinstance(name, str) for name in meta.get(key, [])):
            raise UserError(f"{path} has {key} that are no names of tensors; copy the artifact again")
    return meta


def _build(meta: Mapping[str, Any], where: Path) -> Draft:
    """An untrained draft of the family and config in ``meta``."""
    try:
        return FAMILIES.get(str(meta["family"])).build(dict(meta["config"]))
    except UserError as error:
        raise UserError(f"{where / META_FILE}: {error}") from error
    except (TypeError, LookupError, ValueError, AttributeError, RuntimeError, ArithmeticError, MemoryError) as error:
        first = str(error).strip().partition("\n")[0]  # torch's go on with a trace of its own
        raise UserError(f"{where / META_FILE} has a config that builds no draft: {first}") from error


def _meta(
    kind: str, draft: Draft, content_hash: str, given: Mapping[str, Any], config: DraftConfig | None = None
) -> dict[str, Any]:
    """``given`` (method, target, tokenizer_hash, provenance, ...) under the keys that the format fixes."""
    config = draft.config if config is None else config
    fixed = {"schema": SCHEMA, "kind": kind, "family": draft.family, "config": config.to_dict()}
    fixed["content_hash"] = content_hash
    defaults = {"method": None, "target": {"name": None, "hash": None}, "tokenizer_hash": None, "provenance": {}}
    # Metadata that was loaded with one artifact may be handed on to another: what ties it to the first is dropped.
    stale = {"base_draft_hash", "tensors", "by_rows", "coarse", *fixed}
    return fixed | {key: value for key, value in (defaults | dict(given)).items() if key not in stale}


def _verify_hash(state: Mapping[str, Tensor], meta: Mapping[str, Any], path: Path) -> None:
    if tensors_hash(state) != meta["content_hash"]:
        raise UserError(f"{path} is not the file that {META_FILE} describes (content hash differs); copy both again")


def own_files(family: str) -> set[str]:
    """What a folder of this family's own format may hold; anything else is somebody's work and not replaced."""
    known = FAMILIES.get(family)
    return {META_FILE, PRIVATE_FILE, known.weights_file, "README.md", *known.other_files}


def _only_over(kind: str) -> Callable[[Path], None]:
    """The check of a folder that an artifact of this kind would replace: only an earlier one of that kind.

    The check raises ``UserError``.
    """

    def check(folder: Path) -> None:
        if not (folder / META_FILE).is_file():
            raise UserError(
                f"{folder} holds files that are no artifact of redraft's own format; name a new or empty folder"
            )
        found = read_json(folder / META_FILE).get("kind")
        if found != kind:
            what = "a private part" if found == "private" else f"a {found} artifact"
            raise UserError(f"{folder} holds {what}, and a {kind} would replace it; name a new or empty folder")

    return check


# -- drafts ----------------------------------------------------------------------------------------------------------
def save_draft(folder: str | Path, draft: Draft, meta: Mapping[str, Any], merge: bool = False) -> None:
    """Write a whole draft. ``meta`` holds what the caller knows: method, target, tokenizer_hash, provenance.

    With ``merge`` private parts are merged, one matrix at a time, as they are written. Raises ``UserError`` on NaN, a
    full disk, or a folder that holds other files.
    """
    family = FAMILIES.get(draft.family)
    draft = draft.merged() if family.merges else draft
    merge = merge and not family.merges
    state = draft.dense_state() if merge else draft.stored()
    config = draft.config.dense() if merge else draft.config
    check_tensors(state, state, "the draft to be saved")
    size = tensors_bytes(state) + family.other_bytes
    with atomic_folder(folder, size, own_files(draft.family), _only_over("draft")) as new:
        family.write_beside(new, draft)
        write_tensors(new / family.weights_file, state)
        atomic_write_json(new / META_FILE, _meta("draft", draft, tensors_hash(state), meta, config))


def load_draft(folder: str | Path) -> tuple[Any, dict[str, Any]]:
    """The draft in a folder, in the dtypes of its file, and its metadata. Raises ``UserError``."""
    folder = Path(folder)
    meta = read_meta(folder, "draft")
    draft = _build(meta, folder)
    family = FAMILIES.get(draft.family)
    path = folder / family.weights_file
    state = read_tensors(path)
    check_tensors(state, draft.stored(), path)
    _verify_hash(state, meta, path)
    family.check_state(state, draft, path)
    draft.fill(state)
    family.read_beside(folder, draft)
    return draft, meta


# -- private parts ---------------------------------------------------------------------------------------------------
def save_private(
    folder: str | Path,
    draft: Draft,
    names: Iterable[str],
    base_hash: str,
    meta: Mapping[str, Any],
    base: Mapping[str, Tensor] | None = None,
    coarse: Mapping[str, Coarse] | None = None,
) -> None:
    """Write only the tensors ``names`` of ``draft``: what a method trained on top of a shared base draft.

    ``base_hash`` is ``base_hash()`` of the base draft. With its state in the stored dtype, ``base``, a
    matrix whose rows mostly stand in the base's is written as the rows that do not (a refreshed vocabulary). Matrices
    in ``coarse`` are written as their codes; what ``draft`` holds of them must be what these tell.
    Raises ``UserError`` as :func:`save_draft`, and ``ValueError`` for a name that the draft does not have.
    """
    whole, names = draft.state_dict(), sorted(names)
    unknown = [name for name in names if name not in whole]
    if unknown or not names:
        raise ValueError(f"a private part needs tensors of the draft; unknown: {unknown}")
    state, by_rows = private_state({name: whole[name] for name in names}, base or {}, coarse or {})
    check_tensors(state, state, "the private part to be saved")
    entry = _meta("private", draft, tensors_hash(state), meta) | {"base_draft_hash": base_hash, "tensors": names}
    if coarse:
        entry["coarse"] = {name: {"bits": part.bits, "columns": part.columns} for name, part in coarse.items()}
    if by_rows:
        entry["by_rows"] = by_rows
    with atomic_folder(folder, tensors_bytes(state), own_files(draft.family), _only_over("private")) as new:
        write_tensors(new / PRIVATE_FILE, state)
        atomic_write_json(new / META_FILE, entry)


def load_private(
    folder: str | Path, base_draft: Draft, base_hash: str, copy: bool = True
) -> tuple[Any, dict[str, Any]]:
    """A new draft: the base draft's tensors with the private part's put over them. The base is left as it is.

    Without ``copy`` the new draft has the base's own tensors, for who keeps no base.

    Raises ``UserError`` when the part belongs to another base draft, or its tensors are not exactly those listed.
    """
    folder = Path(folder)
    meta = read_meta(folder, "private")
    if meta["family"] != base_draft.family:
        raise UserError(
            f"{folder} is the private part of a draft of family {meta['family']} and was given one of family "
            f"{base_draft.family}; name the draft that it was trained on"
        )
    if meta["base_draft_hash"] != base_hash:
        raise UserError(
            f"{folder} belongs to the base draft {meta['base_draft_hash']} and was given {base_hash}; "
            "name the draft that it was trained on"
        )
    draft = _build(meta, folder)
    whole, path = draft.state_dict(), folder / PRIVATE_FILE
    shared = base_draft.state_dict()
    # A table that the part's draft borrows of the target is the base's own affair.
    unknown = sorted({*meta["tensors"]} - set(whole)) or sorted(set(shared) - set(whole) - set(draft.BORROWED))
    if unknown:
        raise UserError(f"{folder / META_FILE} describes a draft that has no {', '.join(unknown)}; copy the part again")
    listed = {name: whole[name] for name in meta["tensors"]}
    part = read_tensors(path)
    _verify_hash(part, meta, path)
    base = {name: tensor.detach() for name, tensor in shared.items() if name in whole}
    base = {name: tensor.clone() for name, tensor in base.items()} if copy else base
    for name, about in meta.get("coarse", {}).items():
        part[name] = _told(name, about, part, base.get(name), path)
    for name in meta.get("by_rows", []):
        part[name] = _rows_together(name, part, base.get(name), path)
    check_tensors(part, listed, path)
    device = next(iter(base.values())).device
    joined = base | {name: tensor.to(device) for name, tensor in part.items()}
    check_tensors(joined, whole, f"{folder} over its base draft")
    FAMILIES.get(draft.family).check_state(joined, draft, f"{folder} over its base draft")
    draft.load_state_dict(joined, strict=True, assign=True)
    return draft.inherit(base_draft), meta


def _told(name: str, about: Any, part: dict[str, Tensor], old: Tensor | None, path: Path) -> Tensor:
    """The matrix that the codes of ``name``, taken out of ``part``, tell. Raises ``UserError``."""
    found = {key: part.pop(f"{name}.{key}", None) for key in ("codes", "step", "source", "rows")}
    try:
        if old is None or found["codes"] is None or found["step"] is None:
            raise ValueError("codes, steps or the base draft's matrix are not there")
        return told(Coarse(int(about["bits"]), int(about["columns"]), **found), old)  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} does not tell {name} ({error}); save the private part again") from error


def private_state(
    trained: Mapping[str, Tensor], base: Mapping[str, Tensor], coarse: Mapping[str, Coarse]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a private part's file, and the names of the matrices of which it holds but the new rows."""
    state, by_rows = {name: tensor for name, tensor in trained.items() if name not in coarse}, []
    for name, tensor in list(state.items()):
        rows = _new_rows(tensor, base.get(name))
        if rows is not None:
            del state[name]
            state[f"{name}.source"], state[f"{name}.rows"] = rows
            by_rows.append(name)
    told_apart = ((name, key, tensor) for name, part in coarse.items() for key, tensor in part.tensors().items())
    return state | {f"{name}.{key}": tensor for name, key, tensor in told_apart}, by_rows


def _new_rows(matrix: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """(where in ``old`` each row stands, -1 if nowhere; those that stand nowhere), if they are less than half."""
    if old is None or matrix.ndim != 2 or matrix.dtype != old.dtype or matrix.shape[1:] != old.shape[1:]:
        return None
    sides = (part.detach().cpu().contiguous().view(torch.uint8).numpy() for part in (matrix, old))
    wanted, known = ([row.tobytes() for row in side] for side in sides)
    places = {row: place for place, row in enumerate(known)}
    source = torch.tensor([places.get(row, -1) for row in wanted], dtype=torch.int32)
    new = source < 0
    return (source, matrix[new.to(matrix.device)]) if 2 * int(new.sum()) < len(wanted) else None


def _rows_together(name: str, part: dict[str, Tensor], old: Tensor | None, path: Path) -> Tensor:
    """The matrix that ``name``.source and ``name``.rows, taken out of ``part``, describe. Raises ``UserError``."""
    source, rows = part.pop(f"{name}.source", None), part.pop(f"{name}.rows", None)
    if source is None or rows is None or old is None:
        raise UserError(f"{path} lacks the rows of {name}; the file is incomplete, save the private part again")
    place = source.long()
    new = place < 0
    fits = rows.ndim == 2 and rows.shape[1:] == old.shape[1:] and int(new.sum()) == len(rows)
    if source.is_floating_point() or source.ndim != 1 or not fits or (len(place) and int(place.max()) >= len(old)):
        raise UserError(f"{path}: the rows of {name} do not fit its base draft; save the private part again")
    matrix = old.detach().cpu()[place.clamp(min=0)]
    matrix[new] = rows.to(matrix.dtype)
    return matrix
