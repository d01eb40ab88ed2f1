"""Writing files so that a reader sees the old one or the new one, never a part, and says so when a disk is full.

Nothing here knows what the files are. See docs/formats.md.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from redraft.errors import UserError

# Room for file headers, the metadata file and what the file system itself needs.
SLACK_BYTES = 1 << 20
# What a place for files may be without any fault of ours: read-only, another's, at a limit, broken.
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO)
NO_SUCH_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
# Of what is being written, and of what it takes the place of. Nobody else calls files so: what bears such a name may be
# removed wherever it lies, also in a folder that holds other people's hidden files.
UNFINISHED = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.redraft-new")
REPLACED = re.compile(r"\.(?P<name>.+)\.redraft-old")
# What older versions called a folder that is being replaced, and anybody may: it is brought back, never removed.
REPLACED_ONCE = re.compile(r"\.(?P<name>.+)\.old")
STANDARD_OUTPUT = "standard output"
OUR_FOLDERS = ("ledger.json", "study.json", "distill.json")  # one of them is in every run directory


def disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room. safetensors has an error class of its own, which tells it in words."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__name__ == "SafetensorError" and "no space left" in str(error).lower()


def is_refused(error: BaseException) -> bool:
    """Whether the system refuses a file or a folder for a reason that the user can mend: rights, limits, its disk."""
    return isinstance(error, OSError) and error.errno in (*REFUSALS, *NO_SUCH_PLACE)


def free_bytes(folder: str | Path) -> int:
    """What is free on the disk that holds ``folder``, which need not exist."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def write_error(path: str | Path, error: BaseException) -> UserError:
    """The one line about a file that could not be written: how much room there is, or the system's own reason."""
    if disk_is_full(error):
        if str(path) == STANDARD_OUTPUT:
            return UserError("no room for standard output, where it was sent to; send it elsewhere")
        free = free_bytes(Path(path).parent) / 1e6
        return UserError(
            f"no room on the disk for {path}: {free:.1f} MB are free; free some and give the same command again, "
            "whatever was finished is kept"
        )
    return UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")


def use_folder(folder: str | Path, what: str = "folder") -> None:
    """Make the folder where there is none. Raises ``UserError`` that says what it is to be used as."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if disk_is_full(error):
            raise write_error(folder, error) from error
        raise UserError(f"cannot use {folder} as {what}: {error.strerror or error}") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or disk_is_full(error)):
            raise
        raise write_error(path, error) from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a place beside ``path`` to write to; it takes the place of ``path`` when the block ends without an error.

    The file and its new name are on the disk then, so that whatever names it may be written next. Nothing is left of
    it otherwise; what a process that has died left of the same file is removed. Raises ``UserError`` when the disk
    cannot hold it or the folder cannot be written.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "no ordinary file (a pipe, a socket or a device)"
        raise UserError(f"{path} is {what}, which no file may take the place of; name another file to write")
    new = _unfinished(path)
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _clean_once(path)
            yield new
            sync(new)
            os.replace(new, path)
            sync(path.parent)
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


def atomic_write_text(path: str | Path, text: str) -> None:
    """:func:`atomic_write_bytes` for text, as UTF-8."""
    atomic_write_bytes(path, text.encode())


def append_text(path: str | Path, text: str) -> None:
    """Put ``text`` at the end of a file, on the disk when this returns: all of it or, after an error, nothing.

    Raises ``UserError`` when the disk cannot hold it or the file cannot be written.
    """
    with _writing(Path(path)), open(path, "ab", buffering=0) as file:
        append(file, text.encode())


def append(file: BinaryIO, data: bytes) -> None:
    """Put ``data`` at the end of an unbuffered file that is open for appending; all or nothing. Raises ``OSError``."""
    size = file.seek(0, os.SEEK_END)
    try:
        written = 0
        while written < len(data):
            written += file.write(data[written:])
        os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            file.truncate(size)
        raise


def atomic_write_json(path: str | Path, value: Any) -> None:
    """:func:`atomic_write_bytes` for a JSON value, indented, with a line break at the end."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(place: str | Path) -> None:
    """Hand a file, or the names in a folder, to the disk. Where a system knows no such thing of folders, nothing."""
    flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) if Path(place).is_dir() else os.O_RDONLY
    try:
        handle = os.open(place, flags)
    except PermissionError:
        if not Path(place).is_dir():
            raise
        return  # a folder that may not be listed, or one on a system that opens none
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS):
            raise
    finally:
        os.close(handle)


def allocate(path: str | Path, size: int) -> None:
    """Make a file of ``size`` bytes whose room is taken on the disk. Raises ``UserError`` when there is none."""
    with _writing(Path(path)), open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def require_free_space(folder: str | Path, needed: int) -> None:
    """Raise ``UserError`` when the disk that holds ``folder`` (which need not exist) has fewer bytes free."""
    free = free_bytes(folder)
    if free < needed + SLACK_BYTES:
        raise UserError(
            f"no room on the disk for {folder}: {(needed + SLACK_BYTES) / 1e6:.1f} MB are needed and "
            f"{free / 1e6:.1f} MB are free; free some or choose another folder"
        )


@contextmanager
def atomic_folder(
    folder: str | Path, needed: int, replaceable: Iterable[str], check: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Yield an empty sibling folder to fill; it takes the place of ``folder`` when the block ends without an error.

    ``needed`` is the number of bytes that will be written. An existing ``folder`` is replaced only when it holds
    nothing but the ``replaceable`` file names, so that no slip in a path deletes other work. Where it holds some,
    ``check`` looks at them, and raises ``UserError`` for what those names alone do not tell from other work. Raises
    ``UserError``.
    """
    folder = Path(folder).absolute()
    settle(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    there = {entry.name for entry in folder.iterdir()} if folder.exists() else set[str]()
    if strangers := sorted(there - set(replaceable)):
        raise UserError(f"{folder} holds other files ({', '.join(strangers[:3])}); name a new or empty folder")
    if there and check is not None:
        check(folder)
    require_free_space(folder, needed)
    new, old = _unfinished(folder), _old(folder)
    try:
        with _writing(folder):
            shutil.rmtree(new, ignore_errors=True)
            _clean_once(folder)
            new.mkdir(parents=True)
            yield new
            for file in (*new.iterdir(), new):
                sync(file)
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
            sync(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def settle(folder: str | Path) -> None:
    """Finish a replacement that was killed between its two renames: bring the old folder back."""
    folder = Path(folder).absolute()
    if folder.name and os.path.exists(_old(folder)):  # false for a name that is too long, where Path.exists raises
        if folder.exists():
            shutil.rmtree(_old(folder), ignore_errors=True)
        else:
            os.replace(_old(folder), folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.redraft-old")


def _settle_once(folder: Path) -> None:
    """:func:`settle` for what an older version was killed in."""
    old = folder.with_name(f".{folder.name}.old")
    if not os.path.lexists(folder) and any((old / name).is_file() for name in ("redraft.json", "config.json")):
        os.replace(old, folder)


@contextmanager
def scratch_folder(folder: str | Path, name: str) -> Iterator[Path]:
    """An empty folder inside ``folder`` for the block; a process that is killed in it leaves it as all else that is
    half-written. Raises ``UserError`` where it cannot be made."""
    use_folder(folder)
    place = _unfinished(Path(folder, f"{name}-{next(_NUMBERS)}"))
    _remove(place)
    use_folder(place)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


_NUMBERS = itertools.count()


# -- what a process that has died leaves -----------------------------------------------------------------------------
def clean(folder: str | Path) -> None:
    """Remove what processes that have died left half-written anywhere below ``folder``, and finish their replacements.

    What belongs to a living process is left alone, but for this one's own: to be called before it writes there.
    """
    ours = any(os.path.isfile(os.path.join(folder, name)) for name in OUR_FOLDERS)
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            if name in folders and (old := REPLACED.fullmatch(name)):
                settle(Path(place, old["name"]))
            elif ours and name in folders and (old := REPLACED_ONCE.fullmatch(name)):
                _settle_once(Path(place, old["name"]))
            elif _is_left(name):
                _remove(Path(place, name))
        folders[:] = [name for name in folders if not name.startswith(".")]


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.redraft-new")


def _is_left(name: str, of: str | None = None) -> bool:
    """Whether a file of this name is what a process left that has died; ``of`` names what it was to become."""
    found = UNFINISHED.fullmatch(name)
    if found is None or (of is not None and found["name"] != of):
        return False
    return int(found["pid"]) == os.getpid() or not alive(int(found["pid"]))


def alive(pid: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return isinstance(pid, int) and pid < 1 << 31
    return True


_CLEANED: set[Path] = set()


def _clean_once(path: Path) -> None:
    """Remove what dead processes left of this very file or folder; looked for once in the life of this process."""
    key = Path(os.path.abspath(path))
    if key not in _CLEANED:
        _CLEANED.add(key)
        with suppress(OSError):
            for entry in list(os.scandir(path.parent)):
                if _is_left(entry.name, path.name):
                    _remove(Path(entry.path))


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            place.unlink()
