"""What the tests of the server engine share: a server whose answers a rule makes, and how it is asked.

Test files load it with ``runpy`` and take what they need by name, fixtures included.
"""

from __future__ import annotations

import json
import runpy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.data.generate import Completion, Request
from redraft.data.regenerate import ServerEngine
from redraft.data.store import Failure
from redraft.sampling import Sampler

LOOPBACK = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("loopback.py"))))
EOS = 2
Reply = tuple[int, Any]  # status and body; bytes go out as they are


def reply_ids(prompt: list[int]) -> list[int]:
    return [4 + (sum(prompt) + 7 * i) % 90 for i in range(3)] + [EOS]


def good(body: dict[str, Any]) -> Reply:
    choice = {
        "text": "...",
        "finish_reason": "stop",
        "token_ids": reply_ids(body["prompt"]),
        "prompt_token_ids": body["prompt"],
    }
    return 200, {"choices": [choice]}


class Loopback:
    """A server whose ``rule`` answers completions; ``None`` from it drops the connection without a word."""

    def __init__(self) -> None:
        self.rule: Callable[[dict[str, Any]], Reply | None] = good
        self.models: Reply = (200, {"data": [{"id": "tiny"}]})
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.raw = b""  # sent instead of any answer
        self.release = threading.Event()
        self.server: Any = None
        self.port = 0
        self.start()

    def start(self) -> None:
        loopback = self

        class Handler(LOOPBACK.Handler):
            def do_GET(self) -> None:
                self.reply(loopback.models)

            def do_POST(self) -> None:
                body = self.body()
                loopback.bodies.append(body)
                loopback.headers.append(self.headers.get("Authorization"))
                if loopback.raw:
                    self.wfile.write(loopback.raw)
                    self.close_connection = True
                    return
                self.reply(loopback.rule(body))

            def reply(self, reply: Reply | None) -> None:
                if reply is None:
                    self.connection.close()
                    return
                self.out(reply[0], reply[1] if isinstance(reply[1], bytes) else json.dumps(reply[1]).encode())

        # Started again it is at the same port, as a server that comes back.
        self.server = LOOPBACK.Server(Handler, self.port)
        self.port = self.server.port

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server = None

    def engine(self, **settings: Any) -> ServerEngine:
        given = {"concurrency": 3, "timeout": 10.0, "attempts": 3, "backoff": 0.001}
        return ServerEngine(f"http://127.0.0.1:{self.port}", **(given | settings))


@pytest.fixture
def loopback() -> Iterator[Loopback]:
    server = Loopback()
    yield server
    server.release.set()
    server.stop()


def requests(count: int, sampler: Sampler | None = None) -> list[Request]:
    return [Request(f"r{i}@T0", [1, 10 + i, 4], sampler or Sampler(), 3) for i in range(count)]


def answers(engine: ServerEngine, asked: list[Request], tokenizer: Any) -> dict[str, Completion | Failure]:
    found = list(engine.answer(asked, 8, tokenizer, (EOS,)))
    keyed = {o.key if isinstance(o, Failure) else o.request.key: o for o in found}
    assert len(keyed) == len(found)
    return keyed


def choices(**changes: Any) -> Reply:
    return 200, {"choices": [{"text": "a", "finish_reason": "stop", "token_ids": [5, EOS]} | changes]}
