"""``redraft bench --server``: prompts from a file, servers that run or that are started here, a result file.

A server is given by its address, or by the command that starts it, with ``{port}`` where the port belongs. Servers
given by command run one at a time, each on the whole machine, and are stopped again however the run ends.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.adaptation.bench import How
from redraft.adaptation.models import TargetSpec, check_output, settle_template
from redraft.adaptation.questions import Questions
from redraft.artifact import atomic_write_json
from redraft.data.template import template_record
from redraft.data.transport import Connection, Refused, Transient
from redraft.errors import UserError
from redraft.evaluate.load import ServerConfig
from redraft.evaluate.server import Server, bench_servers
from redraft.loading import read_facts
from redraft.progress import progress_bar
from redraft.settings.texts import PORT, check_address
from redraft.target import Facts

START_SECONDS = 900.0
STOP_SECONDS = 30.0
LOG_LINES = 12


def bench_servers_on(
    spec: TargetSpec,
    servers: Mapping[str, str],
    questions: Questions,
    out: Path,
    how: How,
    levels: Sequence[int] = (1,),
    model: str | None = None,
) -> dict[str, Any]:
    """Measure ``servers`` (:func:`named_servers`) at these concurrencies; writes the result to ``out`` and returns it.

    Of the target only tokenizer and config are read, but for suites, whose later turns stand behind its own replies.
    ``model`` is the served name where a server has several; the shape of ``how`` is the servers' own affair. What a
    server that is started here prints goes to ``STEM-NAME.log`` beside ``out``. Raises ``UserError``.
    """
    check_output(out, ".json")
    for place in servers.values():
        if PORT not in place:
            check_address(place)
    # A wrong level is refused before anything is loaded.
    config = ServerConfig(
        sampler=how.sampler,
        max_new_tokens=how.max_new_tokens,
        seed=how.seed,
        concurrencies=tuple(levels),
        models={name: model for name in servers} if model else {},
    )
    known: Facts = spec.open() if questions.suites else read_facts(spec.name)
    settle_template(known.tokenizer, spec.template_args)
    asked = questions.read(known, how.max_new_tokens, how.seed)
    contestants: dict[str, Server] = {
        name: _starter(place, out.with_name(f"{out.stem}-{name}.log")) if PORT in place else place
        for name, place in servers.items()
    }
    record = provenance.collect(how.seed, "as the servers run", template_record(known.tokenizer))
    requests = len(asked) * len(servers) * len(levels)
    with progress_bar("bench", requests, "requests") as progress:
        config = replace(config, eos_ids=known.eos_ids)
        result = bench_servers(
            contestants, asked, config, spec.name, record, lambda done, what: progress.update(done, now=what)
        )
    atomic_write_json(out, result)
    return result


# -- servers that are started here -----------------------------------------------------------------------------------
def _starter(command: str, log: Path) -> Server:
    return lambda: launched(command, log)


@contextmanager
def launched(command: str, log: Path, start_seconds: float = START_SECONDS) -> Iterator[str]:
    """Start a server, wait until it answers, give its address; stop it, and all it started, at the end.

    ``{port}`` in the command becomes a free port. A signal to end this process stops the server too. Raises
    ``UserError`` with the end of its output when it does not come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [part.replace(PORT, str(port)) for part in shlex.split(command)]
    with log.open("wb") as stream, _terminable():
        try:
            # a session of its own, so that what it starts in turn can be stopped with it
            process = subprocess.Popen(arguments, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            raise UserError(f"the server command {arguments[0]} cannot be run: {error.strerror or error}") from error
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log, start_seconds)
            yield url
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    connection = Connection(url, timeout=10.0)
    connection.open()
    deadline = time.monotonic() + seconds
    try:
        while True:
            try:
                connection.served_models()
                return
            except (Transient, Refused):
                if process.poll() is not None:
                    raise UserError(f"the server ended with exit code {process.returncode}; {_tail(log)}") from None
                if time.monotonic() > deadline:
                    raise UserError(f"the server did not answer within {seconds:g} s; {_tail(log)}") from None
            time.sleep(0.2)
    finally:
        connection.close()


def _tail(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"the end of {log}: " + " | ".join(lines[-LOG_LINES:]) if lines else f"{log} is empty"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server's whole process group, politely first. Members may outlive its leader."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and (process.poll() is None or _group_lives(process.pid)):
            time.sleep(0.05)
    process.wait()


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds the stack, as Ctrl-C does, instead of leaving the server behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
