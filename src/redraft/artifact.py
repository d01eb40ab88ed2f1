"""redraft's own format: a draft, or the private part of one, as a folder of ``redraft.json`` and safetensors.

Loading is strict in both directions: every missing, extra, misshaped or non-finite tensor is named. No
pickle is run or written. Writing is all or nothing: a new folder is filled beside the old one and takes its place at
the end, after the free space of the disk has been checked. See docs/formats.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from redraft.coarse import Coarse, told
from redraft.errors import UserError

# Whoever reads our formats also writes files; these are handed on.
from redraft.files import atomic_folder as atomic_folder
from redraft.files import atomic_write_bytes as atomic_write_bytes
from redraft.files import atomic_write_json as atomic_write_json
from redraft.files import atomic_write_text as atomic_write_text
from redraft.files import replacing
from redraft.files import require_free_space as require_free_space
from redraft.files import settle as settle
from redraft.registries import FAMILIES

SCHEMA = 1
META_FILE = "redraft.json"
DRAFT_FILE = "draft.safetensors"
PRIVATE_FILE = "private.safetensors"
OWN_FILES = {META_FILE, DRAFT_FILE, PRIVATE_FILE, "README.md"}


# -- tensors ---------------------------------------------------------------------------------------------------------
def tensors_hash(state: Mapping[str, Tensor]) -> str:
    """A fingerprint of named tensors: names, dtypes, shapes and every byte, in name order (16 hex digits)."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}|{tensor.dtype}|{tuple(state[name].shape)}|".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def tensors_bytes(state: Mapping[str, Tensor]) -> int:
    """How many bytes the tensors take on disk, headers not counted."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file, on the CPU. Raises ``UserError`` when it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error


def read_pickled(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a file of torch's older kind (``pytorch_model.bin``), on the CPU.

    torch's reader of tensors alone is used, which runs nothing that a file brings. Raises ``UserError`` when the file
    holds anything but named tensors.
    """
    path = Path(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises many kinds over a damaged or a foreign file
        raise UserError(
            f"{path} cannot be read as tensors alone, and pickle is never run; convert the weights to safetensors"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in found.items()):
        raise UserError(f"{path} holds more than named tensors; convert the weights to safetensors")
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def write_tensors(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write the tensors to one safetensors file, byte for byte the same for the same tensors."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    # One entry only: the writer shuffles the order of several. Hugging Face's loaders ask for this one.
    save_file(plain, str(path), metadata={"format": "pt"})
    let_others_read(path)


def let_others_read(*paths: str | Path) -> None:
    """The usual rights for files of safetensors, which its writer leaves to their owner alone.

    An engine often runs as somebody else.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        os.chmod(path, 0o666 & ~mask)


# -- files of a run, each with the fingerprint of what it holds ------------------------------------------------------
CHECKSUM = "checksum"


def write_shard(path: str | Path, state: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write the tensors and the texts of ``header`` in one move. Raises ``UserError`` for want of room."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    # One name for all tries: what a killed one left is written over, not added to.
    with replacing(path, f".{Path(path).name}.partial") as new:
        save_file(plain, str(new), metadata=header)


def write_checked(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """:func:`write_shard` with :func:`tensors_hash` in the header."""
    write_shard(path, state, {CHECKSUM: tensors_hash(state)})


def read_checked(path: str | Path, mend: str) -> dict[str, Tensor]:
    """The tensors of a file that :func:`write_checked` wrote; older files have no fingerprint and are read as they are.

    Raises ``UserError`` that names the file, and says with ``mend`` what to do, when it is missing or damaged.
    """
    path = Path(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            stored = (file.metadata() or {}).get(CHECKSUM)
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); {mend}") from error
    if stored is not None and stored != tensors_hash(found):
        raise UserError(f"{path} is damaged: it no longer holds what was written; {mend}")
    return found


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise ``UserError`` that names every missing, extra, misshaped, wrongly typed or non-finite tensor.

    ``expected`` gives names, shapes and kinds; a floating-point tensor may have any of float32, float16, bfloat16.
    """
    faults = []
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        faults.append(f"missing {', '.join(missing)}")
    if extra:
        faults.append(f"extra {', '.join(extra)}")
    for name in sorted(set(found) & set(expected)):
        faults.extend(_faults(name, found[name], expected[name]))
    if faults:
        raise UserError(f"{where} does not hold the tensors that its config asks for: {'; '.join(faults)}")


def _faults(name: str, tensor: Tensor, wanted: Tensor) -> list[str]:
    if tensor.shape != wanted.shape:
        return [f"{name} has shape {list(tensor.shape)} instead of {list(wanted.shape)}"]
    if wanted.is_floating_point():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return [f"{name} is {_short(tensor.dtype)} instead of float32, float16 or bfloat16"]
        if not torch.isfinite(tensor).all():
            return [f"{name} holds NaN or infinity"]
    elif tensor.dtype != wanted.dtype:
        return [f"{name} is {_short(tensor.dtype)} instead of {_short(wanted.dtype)}"]
    return []


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fill(draft: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a draft these tensors in their own dtypes. Call :func:`check_tensors` first."""
    draft.load_state_dict(dict(state), strict=True, assign=True)


# -- redraft.json ----------------------------------------------------------------------------------------------------
def read_json(path: str | Path) -> dict[str, Any]:
    """One JSON object from a file. Raises ``UserError`` with the file and line when there is none."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: line {error.lineno}: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_meta(folder: str | Path, kind: str) -> dict[str, Any]:
    """``redraft.json`` of an artifact of this kind ("draft" or "private"), checked. Raises ``UserError``."""
    folder = Path(folder)
    settle(folder)
    if not folder.exists():
        raise UserError(f"{folder} does not exist; name a folder that holds {META_FILE}")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name one that holds {META_FILE}")
    path = folder / META_FILE
    meta = read_json(path)
    schema = meta.get("schema")
    if not isinstance(schema, int) or schema < 1:
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
    return meta


def _build(meta: Mapping[str, Any], where: Path) -> Any:
    """An untrained draft of the family and config in ``meta``."""
    if not isinstance(meta["config"], dict):
        raise UserError(f"{where / META_FILE} has a config that is no JSON object; copy the artifact again")
    try:
        return FAMILIES.get(str(meta["family"]))(dict(meta["config"]))
    except UserError as error:
        raise UserError(f"{where / META_FILE}: {error}") from error
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{where / META_FILE} has a config that builds no draft: {error}") from error


def _meta(kind: str, draft: nn.Module, content_hash: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` (family, method, target, tokenizer_hash, provenance, ...) under the keys that the format fixes."""
    config: Any = draft.config
    family = getattr(draft, "family", given.get("family", "eagle3"))
    fixed = {"schema": SCHEMA, "kind": kind, "family": family, "config": config.to_dict()}
    fixed["content_hash"] = content_hash
    defaults = {"method": None, "target": {"name": None, "hash": None}, "tokenizer_hash": None, "provenance": {}}
    # Metadata that was loaded with one artifact may be handed on to another: what ties it to the first is dropped.
    stale = {"base_draft_hash", "tensors", *fixed}
    return fixed | {key: value for key, value in (defaults | dict(given)).items() if key not in stale}


def _verify_hash(state: Mapping[str, Tensor], meta: Mapping[str, Any], path: Path) -> None:
    if tensors_hash(state) != meta["content_hash"]:
        raise UserError(f"{path} is not the file that {META_FILE} describes (content hash differs); copy both again")


# -- drafts ----------------------------------------------------------------------------------------------------------
def save_draft(folder: str | Path, draft: nn.Module, meta: Mapping[str, Any]) -> None:
    """Write a whole draft. ``meta`` holds what the caller knows: method, target, tokenizer_hash, provenance.

    Raises ``UserError`` on NaN, a full disk, or a folder that holds other files.
    """
    state = draft.state_dict()
    check_tensors(state, state, "the draft to be saved")
    with atomic_folder(folder, tensors_bytes(state), OWN_FILES) as new:
        write_tensors(new / DRAFT_FILE, state)
        atomic_write_json(new / META_FILE, _meta("draft", draft, tensors_hash(state), meta))


def load_draft(folder: str | Path) -> tuple[Any, dict[str, Any]]:
    """The draft in a folder, in the dtypes of its file, and its metadata. Raises ``UserError``."""
    folder = Path(folder)
    meta = read_meta(folder, "draft")
    draft = _build(meta, folder)
    path = folder / DRAFT_FILE
    state = read_tensors(path)
    check_tensors(state, draft.state_dict(), path)
    _verify_hash(state, meta, path)
    fill(draft, state)
    return draft, meta


def save_private(
    folder: str | Path,
    draft: nn.Module,
    names: Iterable[str],
    base_hash: str,
    meta: Mapping[str, Any],
    base: Mapping[str, Tensor] | None = None,
    coarse: Mapping[str, Coarse] | None = None,
) -> None:
    """Write only the tensors ``names`` of ``draft``: what a method trained on top of a shared base draft.

    ``base_hash`` is :func:`tensors_hash` of the base draft's state. With that state in the stored dtype, ``base``, a
    matrix whose rows mostly stand in the base's is written as the rows that do not (a refreshed vocabulary). Matrices
    in ``coarse`` are written as their codes; what ``draft`` holds of them must be what these tell.
    Raises ``UserError`` as :func:`save_draft`, and ``ValueError`` for a name that the draft does not have.
    """
    whole, names = draft.state_dict(), sorted(names)
    unknown = [name for name in names if name not in whole]
    if unknown or not names:
        raise ValueError(f"a private part needs tensors of the draft; unknown: {unknown}")
    told_apart = dict(coarse or {})
    state, by_rows = private_state({name: whole[name] for name in names if name not in told_apart}, base or {})
    state |= coarse_state(told_apart)
    check_tensors(state, state, "the private part to be saved")
    entry = _meta("private", draft, tensors_hash(state), meta) | {"base_draft_hash": base_hash, "tensors": names}
    if told_apart:
        entry["coarse"] = {name: {"bits": part.bits, "columns": part.columns} for name, part in told_apart.items()}
    if by_rows:
        entry["by_rows"] = by_rows
    with atomic_folder(folder, tensors_bytes(state), OWN_FILES) as new:
        write_tensors(new / PRIVATE_FILE, state)
        atomic_write_json(new / META_FILE, entry)


def coarse_state(parts: Mapping[str, Coarse]) -> dict[str, Tensor]:
    """The tensors of a private part's file that tell these matrices."""
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.tensors().items()}


def _told(name: str, about: Any, part: dict[str, Tensor], old: Tensor | None, path: Path) -> Tensor:
    """The matrix that the codes of ``name``, taken out of ``part``, tell. Raises ``UserError``."""
    found = {key: part.pop(f"{name}.{key}", None) for key in ("codes", "step", "source", "rows")}
    try:
        if old is None or found["codes"] is None or found["step"] is None:
            raise ValueError("codes, steps or the base draft's matrix are not there")
        return told(Coarse(int(about["bits"]), int(about["columns"]), **found), old)  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} does not tell {name} ({error}); save the private part again") from error


def private_state(trained: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a private part's file, and the names of the matrices of which it holds but the new rows."""
    state, by_rows = dict(trained), []
    for name, tensor in trained.items():
        rows = _new_rows(tensor, base.get(name))
        if rows is not None:
            del state[name]
            state[f"{name}.source"], state[f"{name}.rows"] = rows
            by_rows.append(name)
    return state, by_rows


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


def load_private(folder: str | Path, base_draft: nn.Module, base_hash: str) -> tuple[Any, dict[str, Any]]:
    """A new draft: the base draft's tensors with the private part's put over them. The base is left as it is.

    Raises ``UserError`` when the part belongs to another base draft, or its tensors are not exactly those listed.
    """
    folder = Path(folder)
    meta = read_meta(folder, "private")
    if meta["base_draft_hash"] != base_hash:
        raise UserError(
            f"{folder} belongs to the base draft {meta['base_draft_hash']} and was given {base_hash}; "
            "name the draft that it was trained on"
        )
    draft = _build(meta, folder)
    whole, path = draft.state_dict(), folder / PRIVATE_FILE
    listed = {name: whole[name] for name in meta["tensors"] if name in whole}
    part = read_tensors(path)
    _verify_hash(part, meta, path)
    base = {name: tensor.detach().clone() for name, tensor in base_draft.state_dict().items()}
    for name, about in meta.get("coarse", {}).items():
        part[name] = _told(name, about, part, base.get(name), path)
    for name in meta.get("by_rows", []):
        part[name] = _rows_together(name, part, base.get(name), path)
    check_tensors(part, listed, path)
    device = next(iter(base.values())).device
    joined = base | {name: tensor.to(device) for name, tensor in part.items()}
    check_tensors(joined, whole, f"{folder} over its base draft")
    fill(draft, joined)
    return draft, meta
