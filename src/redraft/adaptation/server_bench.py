"""``redraft bench --server``: prompts from a file, servers that run or that are started here, a result file.

A server is given by its address, or by the command that starts it, with ``{port}`` where the port belongs. Servers
given by command run one at a time, each on the whole machine, and are stopped again however the run ends.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.adaptation.bench import Questions
from redraft.adaptation.models import TargetSpec, check_output
from redraft.artifact import atomic_write_json
from redraft.data.template import template_record
from redraft.data.transport import Connection, Refused, Transient, Unusable, excerpt, server_key
from redraft.errors import UserError
from redraft.evaluate.load import ServerConfig
from redraft.evaluate.server import Server, bench_servers
from redraft.files import replacing
from redraft.places import LEAST_SECRET, OPTION, without_secrets
from redraft.progress import progress_bar
from redraft.settings.steps import BenchSettings
from redraft.settings.texts import PORT
from redraft.target import Facts

START_SECONDS = 900.0
STOP_SECONDS = 30.0
LOG_LINES = 12


def bench_servers_on(s: BenchSettings, spec: TargetSpec) -> dict[str, Any]:
    """Measure the servers of these settings, at their levels; writes the result to ``s.out`` and returns it.

    Of the target only tokenizer and config are read, but for suites with later turns, which stand behind its own
    replies. What a server that is started here prints goes to ``STEM-NAME.log`` beside the result. Raises
    ``UserError``.
    """
    check_output(s.out, ".json")
    # A wrong level is refused before anything is loaded.
    config = ServerConfig(
        sampler=s.sampler,
        max_new_tokens=s.max_new_tokens,
        seed=s.seed,
        concurrencies=s.concurrency or (1,),
        model=s.server_model,
    )
    questions = Questions(s)
    known: Facts = spec.open() if questions.replies else spec.known()
    asked = questions.read(known)
    contestants: dict[str, Server] = {
        name: partial(launched, place, log_of(s.out, name, list(s.servers))) if PORT in place else place
        for name, place in s.servers.items()
    }
    record = provenance.collect(s.seed, "as the servers run", template_record(known.tokenizer))
    requests = len(asked) * len(s.servers) * len(config.concurrencies)
    with progress_bar("bench", requests, "requests") as progress:
        config = replace(config, eos_ids=known.eos_ids, vocab_size=known.vocab_size)
        result = bench_servers(
            contestants, asked, config, spec.name, record, lambda done, what: progress.update(done, now=what)
        )
    atomic_write_json(s.out, result)
    return result


def log_of(out: Path, name: str, names: Sequence[str]) -> Path:
    """``STEM-NAME.log`` beside the result ``out``, whatever the server of ``names`` is called."""
    plain = [re.sub(r"[^\w.-]+", "_", one)[:64] for one in names]
    place = list(names).index(name)
    number = f"-{place}" if plain.count(plain[place]) > 1 else ""
    return out.with_name(f"{out.stem}-{plain[place]}{number}.log")


# -- servers that are started here -----------------------------------------------------------------------------------
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
            stream.flush()
            _hide(log, [*_secrets(command)])


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    connection = Connection(url, timeout=10.0)
    connection.open()
    deadline = time.monotonic() + seconds
    with closing(connection):
        while True:
            try:
                connection.served_models()
                return
            except Unusable as error:
                raise UserError(str(error)) from None
            except (Transient, Refused):
                if process.poll() is not None:
                    raise UserError(f"the server ended with exit code {process.returncode}; {_tail(log)}") from None
                if time.monotonic() > deadline:
                    raise UserError(f"the server did not answer within {seconds:g} s; {_tail(log)}") from None
            time.sleep(0.2)


def _tail(log: Path) -> str:
    lines = [excerpt(line, 300) for line in log.read_text(errors="replace").splitlines() if line.strip()]
    shown = without_secrets(" | ".join(lines[-LOG_LINES:]))
    return f"the end of {log}: {shown}" if lines else f"{log} is empty"


def _secrets(command: str) -> Iterator[str]:
    """The keys of a server: those of its command line, which engines write into their logs, and the environment's."""
    for match in OPTION.finditer(command):
        yield match[0].removeprefix(match[1]).strip("'\"")
    yield from filter(None, [server_key()])


def _hide(log: Path, secrets: Sequence[str]) -> None:
    """Put ``***`` in the place of keys in a log that nobody writes to any more."""
    found = [secret for secret in secrets if len(secret) >= LEAST_SECRET]
    with suppress(OSError):
        if not any(any(secret in line for secret in found) for line in log.open(errors="surrogateescape")):
            return
        with replacing(log) as new, log.open(errors="surrogateescape") as old:
            with new.open("w", errors="surrogateescape") as clean:
                for line in old:
                    for secret in found:
                        line = line.replace(secret, "***")
                    clean.write(line)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server's whole process group, politely first. Members may outlive its leader."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
            deadline = time.monotonic() + STOP_SECONDS
            while time.monotonic() < deadline:
                process.poll()  # a leader that has ended is there until it is waited for
                os.killpg(process.pid, 0)
                time.sleep(0.05)
    process.wait()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds the stack, as Ctrl-C does, instead of leaving the server behind."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # as the command line already sees to
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
