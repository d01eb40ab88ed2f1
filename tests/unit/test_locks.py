"""One process at a time: who has a lock, who is told, and when it is gone."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from redraft import locks
from redraft.data.store import RowWriter
from redraft.errors import UserError
from redraft.features import FeatureStore
from redraft.files import settle
from redraft.locks import LOCK_FILE, contents, held, lock


def in_child(call: Callable[[], None]) -> str:
    """What another process comes to: ``ok``, or the message that it was refused with."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        said = "ok"
        try:
            call()
        except UserError as error:
            said = str(error)
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


def use(folder: Path) -> None:
    with held(folder):
        pass


def test_a_second_process_is_told_who_has_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(folder):
        said = in_child(lambda: use(folder))
        assert f"run directory {folder} is in use by process {os.getpid()} on {socket.gethostname()} since 20" in said
        assert "\n" not in said and said.endswith("then give the command again")
        assert contents(folder) == []
    assert list(folder.iterdir()) == [] and in_child(lambda: use(folder)) == "ok"


def test_the_same_thread_may_take_it_again_and_another_may_not(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        with pytest.raises(UserError) as caught:
            use(tmp_path)
        refused.append(str(caught.value))

    with held(tmp_path):
        with held(tmp_path):
            pass
        assert in_child(lambda: use(tmp_path)) != "ok", "the inner one has not let go for the outer one"
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another thread of this process" in refused[0]


def test_a_process_that_is_killed_lets_go(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with held(tmp_path):
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    with pytest.raises(UserError, match=f"in use by process {child} on"):
        use(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK_FILE).exists()
    use(tmp_path)
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_forked_child_that_lives_longer_holds_nothing(tmp_path: Path) -> None:
    with held(tmp_path):
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
    try:
        use(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_damaged_lock_file_names_nobody(tmp_path: Path) -> None:
    for text in ("", "[1]", '{"pid": 1}', "\x00\xff"):
        with held(tmp_path):
            (tmp_path / LOCK_FILE).write_text(text)
            assert "in use by another process;" in in_child(lambda: use(tmp_path))


def test_waiting_for_a_lock(tmp_path: Path) -> None:
    path, said = tmp_path / "lock", list[str]()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        taken = lock(path, "the cache")
        os.write(writing, b"x")
        threading.Event().wait(0.5)
        taken.release()
        os._exit(0)
    os.read(reading, 1)
    lock(path, "the cache", 30, said.append).release()
    os.waitpid(child, 0)
    assert len(said) == 1 and said[0].startswith(f"waiting for the cache, which is in use by process {child} on")


def test_a_file_system_without_locks_says_so_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    said: list[str] = []
    with held(tmp_path, say=said.append), held(tmp_path, say=said.append):
        pass
    assert said == [f"note: no locks work where run directory {tmp_path} is: let no second process use it"]
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use .*file as run directory"):
        use(tmp_path / "file")


def test_workers_of_one_training_share_the_lock_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert in_child(lambda: use(tmp_path)) == "ok"


def test_what_dead_processes_left_goes_at_the_next_start(tmp_path: Path) -> None:
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    inside = tmp_path / "features"
    inside.mkdir()
    (inside / f".shard-00000.safetensors.{dead}.redraft-new").write_bytes(b"half")
    (inside / f".other.{os.getppid()}.redraft-new").write_bytes(b"of a living process")
    (tmp_path / f".merged.{dead}.redraft-new").mkdir()
    (tmp_path / f".merged.{dead}.redraft-new" / "x").write_bytes(b"half")
    (tmp_path / ".private.redraft-old").mkdir()
    (tmp_path / ".private.redraft-old" / "kept").write_bytes(b"whole")
    (tmp_path / ".gone.redraft-old").write_bytes(b"somebody's file")
    use(tmp_path)
    there = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert there == [".gone.redraft-old", f"features/.other.{os.getppid()}.redraft-new", "private/kept"]


def test_hidden_files_of_others_stay_whatever_a_run_is_told_to_use_their_folder_for(tmp_path: Path) -> None:
    names = [".notes.old/kept", ".film.partial", ".draft.99999999.new", "sub/.notes.old/kept", "notes/kept"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    use(tmp_path)
    settle(tmp_path / "notes")
    (tmp_path / "ledger.json").write_text("{}")
    use(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in names)


def test_what_an_older_version_was_killed_in_is_brought_back_in_a_run_directory(tmp_path: Path) -> None:
    (tmp_path / ".merged.old").mkdir()
    (tmp_path / ".merged.old" / "redraft.json").write_text("{}")
    use(tmp_path)
    assert not (tmp_path / "merged").exists()
    (tmp_path / "ledger.json").write_text("{}")
    use(tmp_path)
    assert (tmp_path / "merged" / "redraft.json").exists()


def test_a_response_file_and_a_store_of_features_have_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with RowWriter(path):
        said = in_child(lambda: RowWriter(path).__exit__())
        assert f"response file {path} is in use by process {os.getpid()}" in said
    assert list(tmp_path.iterdir()) == [path] and in_child(lambda: RowWriter(path).__exit__()) == "ok"

    first = FeatureStore(tmp_path / "features", {"a": 1})
    assert first.wants(0)
    second = FeatureStore(tmp_path / "features", {"a": 1})
    assert second.known.kept and "in use by process" in in_child(lambda: second._take())
    del first
    assert in_child(lambda: second._take()) == "ok"


def test_the_holder_is_in_the_file_for_whoever_looks(tmp_path: Path) -> None:
    with held(tmp_path):
        about = json.loads((tmp_path / LOCK_FILE).read_text())
    assert about["pid"] == os.getpid() and about["host"] == socket.gethostname()
