"""Writing files so that a reader sees the old one or the new one, never a part, and says so when a disk is full.

Nothing here knows what the files are. See docs/formats.md.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from redraft.errors import UserError

# Room for file headers, the metadata file and what the file system itself needs.
SLACK_BYTES = 1 << 20


def disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room. safetensors has an error class of its own, which tells it in words."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__name__ == "SafetensorError" and "no space left" in str(error).lower()


def free_bytes(folder: str | Path) -> int:
    """What is free on the disk that holds ``folder``, which need not exist."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def write_error(path: str | Path, error: BaseException) -> UserError:
    """The one line about a file that could not be written: how much room there is, or the system's own reason."""
    if disk_is_full(error):
        free = free_bytes(Path(path).parent) / 1e6
        return UserError(
            f"no room on the disk for {path}: {free:.1f} MB are free; free some and give the same command again, "
            "whatever was finished is kept"
        )
    return UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or disk_is_full(error)):
            raise
        raise write_error(path, error) from error


@contextmanager
def replacing(path: str | Path, temporary: str | None = None) -> Iterator[Path]:
    """Yield a place beside ``path`` to write to; it takes the place of ``path`` when the block ends without an error.

    Nothing is left of it otherwise. ``temporary`` is its name, by default one of this process alone. Raises
    ``UserError`` when the disk cannot hold it or the folder cannot be written.
    """
    path = Path(path)
    new = path.with_name(temporary or f".{path.name}.{os.getpid()}.new")
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield new
            os.replace(new, path)
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never a part.

    Raises ``UserError`` when the disk cannot hold it or the folder cannot be written.
    """
    require_free_space(Path(path).parent, len(data))
    with replacing(path) as new, open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def atomic_write_text(path: str | Path, text: str) -> None:
    """:func:`atomic_write_bytes` for text, as UTF-8."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: str | Path, value: Any) -> None:
    """:func:`atomic_write_bytes` for a JSON value, indented, with a line break at the end."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def require_free_space(folder: str | Path, needed: int) -> None:
    """Raise ``UserError`` when the disk that holds ``folder`` (which need not exist) has fewer bytes free."""
    free = free_bytes(folder)
    if free < needed + SLACK_BYTES:
        raise UserError(
            f"no room on the disk for {folder}: {(needed + SLACK_BYTES) / 1e6:.1f} MB are needed and "
            f"{free / 1e6:.1f} MB are free; free some or choose another folder"
        )


@contextmanager
def atomic_folder(folder: str | Path, needed: int, replaceable: Iterable[str]) -> Iterator[Path]:
    """Yield an empty sibling folder to fill; it takes the place of ``folder`` when the block ends without an error.

    ``needed`` is the number of bytes that will be written. An existing ``folder`` is replaced only when it holds
    nothing but the ``replaceable`` file names, so that no slip in a path deletes other work. Raises ``UserError``.
    """
    folder = Path(folder).absolute()
    settle(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    strangers = sorted({entry.name for entry in folder.iterdir()} - set(replaceable)) if folder.exists() else []
    if strangers:
        raise UserError(f"{folder} holds other files ({', '.join(strangers[:3])}); name a new or empty folder")
    require_free_space(folder, needed)
    new, old = folder.with_name(f".{folder.name}.{os.getpid()}.new"), _old(folder)
    try:
        with _writing(folder):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            yield new
            for file in new.iterdir():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def settle(folder: str | Path) -> None:
    """Finish a replacement that was killed between its two renames: bring the old folder back."""
    folder = Path(folder).absolute()
    if os.path.exists(_old(folder)):  # false for a name that is too long for one, where the Path's own method raises
        if folder.exists():
            shutil.rmtree(_old(folder), ignore_errors=True)
        else:
            os.replace(_old(folder), folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
