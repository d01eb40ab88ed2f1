"""Files that are replaced whole or not at all, and what is said when a disk is full."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from redraft.errors import UserError
from redraft.files import atomic_folder, atomic_write_text, disk_is_full, replacing


def no_space(path: Path) -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write_text(path, "old")
    with pytest.raises(UserError, match=rf"no room on the disk for {path}: [\d.]+ MB are free"), replacing(path) as new:
        new.write_text("ne")
        raise no_space(new)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_other_reasons_are_the_systems_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write .*a: Permission denied"), replacing(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_defect_keeps_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), replacing(tmp_path / "a") as new:
        new.write_text("half")
        raise KeyError("x")
    assert not list(tmp_path.iterdir())


def test_a_folder_on_a_full_disk_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no room on the disk"), atomic_folder(tmp_path / "out", 0, ()) as new:
        (new / "half").write_text("x")
        raise no_space(new)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_what_the_system_says_of_a_full_disk() -> None:
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert disk_is_full(caught.value) and not disk_is_full(PermissionError(errno.EACCES, "no"))
