"""SIGTERM ends a command as a key press does: one line, its own exit code, nothing half-written."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.cli.signals import Terminated, terminable
from redraft.data.selfprompts import self_prompts
from redraft.data.server import ServerEngine
from redraft.data.store import RowWriter, read_rows
from redraft.errors import UserError
from redraft.files import append_text, atomic_write_text

LINE = "redraft: {}; the same command goes on where it can\n"


def fail_with(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    monkeypatch.setattr("redraft.api.runs.build_report", lambda *_, **__: call())


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)  # the signal comes between two instructions


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A key press is heard, also where the tests were started in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_both_signals_are_one_line(number: int, code: int, word: str, redraft: Any, monkeypatch: Any) -> None:
    fail_with(monkeypatch, lambda: (os.kill(os.getpid(), number), time.sleep(5)))
    found, _, err = redraft(["report", __file__])
    assert found == code and err == LINE.format(word)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("step", ["Command.parse_args", "Application.parse_args", "read"])
def test_while_the_words_of_a_command_are_read(step: str, redraft: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(f"redraft.cli.generate.{step}", lambda *_: terminate())
    found, _, err = redraft(["report", __file__])
    assert found == 143 and err == LINE.format("terminated")


def test_while_a_worker_thread_is_waited_for(redraft: Any, monkeypatch: Any) -> None:
    done = threading.Event()

    def wait() -> None:
        pool = ThreadPoolExecutor(1)
        busy = pool.submit(done.wait, 20)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        try:
            busy.result()
        finally:
            done.set()
            pool.shutdown()

    fail_with(monkeypatch, wait)
    found, _, err = redraft(["report", __file__])
    assert found == 143 and err == LINE.format("terminated")


def test_during_a_write_nothing_of_it_stays(tmp_path: Path, monkeypatch: Any) -> None:
    path, log = tmp_path / "a.json", tmp_path / "curve.jsonl"
    atomic_write_text(path, "old")
    append_text(log, "one\n")
    monkeypatch.setattr("redraft.files.os.fsync", lambda _: terminate())
    for write in (lambda: atomic_write_text(path, "new"), lambda: append_text(log, "two\n")):
        with pytest.raises(Terminated), terminable():
            write()
    assert path.read_text() == "old" and log.read_text() == "one\n" and len(list(tmp_path.iterdir())) == 2


def test_draws_that_were_being_written_are_neither_lost_twice_nor_doubled(tiny_target: Any, tmp_path: Path) -> None:
    """The batch that was being stored is not stored again on the way out, over its own remains."""
    target, path = tiny_target("llama"), tmp_path / "draws.jsonl"
    append, calls = RowWriter.append, []

    def dying(self: RowWriter, rows: Any) -> None:
        calls.append(len(rows))
        if len(calls) == 2:
            raise Terminated
        append(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowWriter, "append", dying)
        with pytest.raises(Terminated):
            self_prompts(target, 4, 0, path, batch_size=2, max_new_tokens=4)
    kept = read_rows(path)
    assert len({row.key for row in kept}) == len(kept)


def test_a_wait_for_a_server_ends_at_once(fake_server: Any) -> None:
    """Requests that are under way are left to themselves."""
    server, asked, release, answered = fake_server(), threading.Event(), threading.Event(), threading.Event()

    def attempt(_: Any, server: Any) -> Any:
        asked.set()
        release.wait(60)
        answered.set()
        return SimpleNamespace()

    def press() -> None:
        asked.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)

    engine, presser = ServerEngine(server.url, "m", concurrency=1, timeout=60), threading.Thread(target=press)
    presser.start()
    try:
        with pytest.raises(Terminated), terminable():
            list(engine.ask([("a", 1)], attempt))
        assert not answered.is_set()
    finally:
        release.set()
        presser.join()
        server.stop()


def test_a_second_signal_ends_the_process_at_once() -> None:
    child = os.fork()
    if not child:
        try:
            with terminable():
                terminate()
        except Terminated:
            terminate()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def test_a_place_that_the_system_refuses_is_no_defect(redraft: Any, monkeypatch: Any) -> None:
    def refuse() -> None:
        raise OSError(errno.EROFS, "Read-only file system", "run/train")

    fail_with(monkeypatch, refuse)
    code, _, err = redraft(["report", __file__])
    assert (code, err) == (
        2,
        "redraft: error: cannot use run/train: Read-only file system; whatever was finished is kept\n",
    )


def test_an_error_of_a_users_is_told_also_with_threads_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        append_text(tmp_path / "absent" / "x", "y")
