"""Tensors and JSON on disk: safetensors files with fingerprints, strict checks of what they hold. No pickle is run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.serialization import config as load_settings

from redraft.errors import UserError

# Whoever reads our formats also writes files; these are handed on.
from redraft.files import atomic_folder as atomic_folder
from redraft.files import atomic_write_bytes as atomic_write_bytes
from redraft.files import atomic_write_json as atomic_write_json
from redraft.files import atomic_write_text as atomic_write_text
from redraft.files import replacing
from redraft.files import require_free_space as require_free_space
from redraft.files import settle as settle
from redraft.inputs import loads, read_object, require_file
from redraft.inputs import read_json as read_json
from redraft.pieces import PIECE, Table, pieces, table
from redraft.seals import digest, sealed, unsealed


# -- tensors ---------------------------------------------------------------------------------------------------------
def tensors_hash(state: Mapping[str, Tensor]) -> str:
    """A fingerprint of named tensors: names, dtypes, shapes and every byte, in name order (16 hex digits)."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = table(state, name)
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        for piece in pieces(tensor):
            digest.update(piece.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def tensors_bytes(state: Mapping[str, Tensor]) -> int:
    """How many bytes the tensors take on disk, headers not counted."""
    return sum(table(state, name).nbytes for name in state)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file, on the CPU. Raises ``UserError`` when it is missing or damaged."""
    return _whole_file(path, "not a whole safetensors file", "copy or download it again")[0]


def read_shapes(path: str | Path) -> dict[str, list[int]]:
    """The shape of every tensor of a safetensors file, by its header alone. Raises ``UserError`` as above."""
    require_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error


def _whole_file(path: str | Path, fault: str, mend: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and the texts of its header. Raises ``UserError``."""
    require_file(path, mend)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise UserError(f"{path} is {fault} ({error}); {mend}") from error


def read_rows(path: str | Path, name: str, rows: int) -> Iterator[Tensor]:
    """A table [V, H] of a safetensors file, ``rows`` at a time, through plain reads.

    A mapped file counts as memory page by page, until it is closed. Raises ``UserError`` for a file that does not hold
    the whole table.
    """
    try:
        with open(path, "rb") as file:
            entry = read_layout(file)[name]
            kind, (height, width) = entry.dtype, entry.shape
            file.seek(entry.begin)
            for first in range(0, height, rows):
                count = min(rows, height - first) * width
                yield torch.frombuffer(bytearray(file.read(count * kind.itemsize)), dtype=kind).view(-1, width)
    except (OSError, ValueError, LookupError, TypeError, StopIteration, RuntimeError) as error:
        raise UserError(f"{path} does not hold the table {name} whole; copy or download it again") from error


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a safetensors file: its first byte, counted from the file's begin."""

    dtype: torch.dtype
    shape: torch.Size
    begin: int


def read_layout(file: BinaryIO) -> dict[str, Entry]:
    """The tensors of an opened safetensors file by its header alone; those of types not in ``KIND_OF`` are left out.

    Raises ``ValueError``, ``LookupError`` or ``TypeError`` for one that is damaged.
    """
    length = min(int.from_bytes(file.read(8), "little"), MOST_HEADER)
    kinds, found = {word: kind for kind, word in KIND_OF.items()}, {}
    for name, entry in loads(file.read(length).decode()).items():
        if name == "__metadata__" or entry["dtype"] not in kinds:
            continue
        kind, shape, (begin, end) = kinds[entry["dtype"]], torch.Size(entry["shape"]), entry["data_offsets"]
        if begin < 0 or end - begin != shape.numel() * kind.itemsize:
            raise ValueError(f"{name} is not whole")
        found[name] = Entry(kind, shape, 8 + length + begin)
    return found


def read_pickled(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a file of torch's older kind (``pytorch_model.bin``), on the CPU.

    torch's reader of tensors alone is used, which runs nothing that a file brings. Raises ``UserError`` when the file
    holds anything but named tensors.
    """
    path = Path(path)
    found = _unpickled(path)
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in found.items()):
        raise UserError(f"{path} holds more than named tensors; convert the weights to safetensors")
    for name, tensor in found.items():
        _plain_table(tensor, name, path)
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def read_pickled_table(path: str | Path) -> Tensor:
    """The one tensor that a file of torch's older kind holds, as trainers keep vocabulary maps. As above."""
    path = Path(path)
    found = _unpickled(path)
    if not isinstance(found, Tensor):
        raise UserError(f"{path} holds more than one table of numbers; save it as a tensor alone")
    _plain_table(found, "a table", path)
    return found.detach().contiguous()


def _unpickled(path: Path) -> Any:
    """What a file of torch's older kind holds, by torch's reader of tensors alone. Raises ``UserError``."""
    if not path.is_file():
        raise UserError(f"{path} is no ordinary file; put the weights in its place")
    try:
        # Files of the newer layout are mapped; of others the reader makes a copy.
        with load_settings.patch({"load.mmap": is_zipfile(path)}):  # type: ignore[attr-defined]
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises many kinds over a damaged or a foreign file
        raise UserError(
            f"{path} cannot be read as tensors alone, and pickle is never run; convert the weights to safetensors"
        ) from error


def _plain_table(tensor: Tensor, name: str, path: Path) -> None:
    """Raise ``UserError`` for a tensor that is no table of numbers, or that repeats them to any size."""
    absent = tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu"
    if absent or tensor.nbytes > path.stat().st_size:
        raise UserError(f"{path} holds {name} in a form that is no plain table; convert the weights to safetensors")


# What the library takes for the length of a header.
MOST_HEADER = 100_000_000

# How safetensors names the types of tensors that are written here, and the order in which its own writer lays them out.
KIND_OF = {
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
}
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")


def write_tensors(path: str | Path, state: Mapping[str, Tensor], mark: Mapping[str, str] | None = None) -> None:
    """Write the tensors to one safetensors file, byte for byte the same for the same tensors and ``mark``.

    ``mark`` goes into the metadata of its header, which loaders pass over.

    Piece by piece: the library's own writer holds a copy of all of them, which are gigabytes. The file takes the
    place of an older one only when it is whole: tensors that were read from that one may still be mapped.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(mark or {})}}  # "pt": loaders ask for it
    known = {name: _about(table(state, name)) for name in state}
    names = sorted(state, key=lambda name: (ORDER.index(known[name][0]), name))
    end = 0
    for name in names:
        kind, shape, size = known[name]
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    with replacing(path) as new:
        with open(new, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            begin = file.tell()
            for name in names:
                for piece in pieces(table(state, name)):
                    file.write(piece.view(torch.uint8).numpy().data)
                if file.tell() != begin + entries[name]["data_offsets"][1]:
                    raise RuntimeError(f"{name} has another number of bytes than it says")
        let_others_read(new)


def _about(tensor: Tensor | Table) -> tuple[str, list[int], int]:
    """Type, shape and bytes of a tensor in a file."""
    return KIND_OF[tensor.dtype], list(tensor.shape), tensor.nbytes


def holds_tensors(path: str | Path, state: Mapping[str, Tensor]) -> bool:
    """Whether a safetensors file holds exactly these tensors, bit for bit; it is read piece by piece and not mapped."""
    with open(path, "rb") as file:
        entries = read_layout(file)
        if entries.keys() != state.keys():
            return False
        for name, entry in entries.items():
            tensor = table(state, name)
            if (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
                return False
            file.seek(entry.begin)
            if not goes_on(file, tensor):
                return False
    return True


def goes_on(file: BinaryIO, tensor: Tensor | Table) -> bool:
    """Whether the file has exactly these numbers where it stands; they are compared piece by piece."""
    parts = (part for piece in pieces(tensor) for part in piece.view(torch.uint8).split(PIECE) if len(part))
    return all(file.read(len(part)) == part.numpy().tobytes() for part in parts)


def let_others_read(*paths: str | Path) -> None:
    """The usual rights for files of safetensors, which its writer leaves to their owner alone.

    An engine often runs as somebody else.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        os.chmod(path, 0o666 & ~mask)


# -- files of a run, each with the fingerprint of what it holds ------------------------------------------------------
CHECKSUM, TENSORS = "checksum", "redraft.tensors/1"


def write_checked(path: str | Path, state: Mapping[str, Tensor], **header: str) -> None:
    """:func:`write_tensors` with schema and :func:`tensors_hash` in the header, and further texts, which are in the
    fingerprint too. Raises ``UserError`` for want of room."""
    known = header | {"schema": TENSORS}
    write_tensors(path, state, known | {CHECKSUM: tensors_hash(state), "about": digest(known)})


def read_checked(path: str | Path, mend: str, **header: str) -> dict[str, Tensor]:
    """The tensors of a file that :func:`write_checked` wrote; older files have no fingerprint and are read as they are.

    Raises ``UserError`` that names the file, and says with ``mend`` what to do, when it is missing or damaged, or when
    a text of ``header`` is there and is another.
    """
    found, texts = _whole_file(path, "missing or damaged", mend)
    stored, about = texts.pop(CHECKSUM, None), texts.pop("about", None)
    texts.pop("format", None)
    if stored not in (None, tensors_hash(found)) or about not in (None, digest(texts)) or (about and not stored):
        raise UserError(f"{path} is damaged: it no longer holds what was written; {mend}")
    for name, text in header.items():
        if texts.get(name, text) != text:
            raise UserError(f"{path} belongs to another {name}; {mend}")
    return found


def write_sealed(path: str | Path, value: Mapping[str, Any], kind: str, of: str = "") -> None:
    """:func:`atomic_write_json` with a seal (:mod:`redraft.seals`): ``kind`` is the schema, ``of`` the run's mark."""
    atomic_write_json(path, sealed(value, kind, of))


def read_sealed(path: str | Path, kind: str | None, of: str | None, mend: str) -> dict[str, Any]:
    """What :func:`write_sealed` wrote; files of older versions have no seal and are read as they are.

    Raises ``UserError`` that names the file and says ``mend``: it is missing, damaged, another kind's or run's (where
    these are asked for).
    """
    try:
        value = read_object(path, finite=False)
    except UserError as error:
        raise UserError(f"{error}; {mend}") from error
    return unsealed(value, path, mend, kind, of)


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str | Path, values: bool = True
) -> None:
    """Raise ``UserError`` that names every missing, extra, misshaped, wrongly typed or non-finite tensor.

    ``expected`` gives names, shapes and kinds; a floating-point tensor may have any of float32, float16, bfloat16.
    Without ``values`` the numbers are not looked at.
    """
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    faults = [f"missing {', '.join(missing)}"] if missing else []
    faults += [f"extra {', '.join(extra)}"] if extra else []
    for name in sorted(set(found) & set(expected)):
        tensor = table(found, name)
        wanted = tensor if expected is found else table(expected, name)
        kind, right = dtype_name(tensor.dtype), dtype_name(wanted.dtype)
        if tensor.shape != wanted.shape:
            faults.append(f"{name} has shape {list(tensor.shape)} instead of {list(wanted.shape)}")
        elif not wanted.dtype.is_floating_point:
            faults += [f"{name} is {kind} instead of {right}"] if kind != right else []
        elif tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            faults.append(f"{name} is {kind} instead of float32, float16 or bfloat16")
        elif values and not all(map(all_finite, pieces(tensor))):
            faults.append(f"{name} holds NaN or infinity")
    if faults:
        raise UserError(f"{where} does not hold the tensors that its config asks for: {'; '.join(faults)}")


def all_finite(tensor: Tensor) -> bool:
    """Whether every number is one, looked through piece by piece: the check takes no room beside the tensor."""
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.detach().reshape(-1).split(PIECE))


def dtype_name(dtype: torch.dtype) -> str:
    """As files and messages have it: without the library's name."""
    return str(dtype).removeprefix("torch.")
