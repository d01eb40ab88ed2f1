"""Connections that are kept for the next request, and servers that close one just as it is sent."""

from __future__ import annotations

import json
import runpy
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("httpx")
from redraft.data.transport import Connection, Transient

LOOPBACK = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("loopback.py"))))
PATH, BODY = "/v1/completions", {"prompt": [1, 2], "max_tokens": 3}


class Keeping:
    """A server whose connections carry ``kept`` answers each; what comes then is read, and answered with ``last``
    before the connection ends. ``seen`` counts what was read."""

    def __init__(self) -> None:
        self.kept, self.last, self.seen = 1, b"", 0
        self.together: threading.Barrier | None = None
        front, lock = self, threading.Lock()

        class Handler(LOOPBACK.Handler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            carried = 0

            def do_POST(self) -> None:
                body = self.body()
                with lock:
                    front.seen += 1
                if self.carried >= front.kept:
                    self.wfile.write(front.last)
                    self.close_connection = True
                    return
                self.carried += 1
                if front.together is not None:
                    front.together.wait(10)
                said = json.dumps({"prompt": body["prompt"]})
                self.out(200, (f"data: {said}\n\ndata: [DONE]\n\n" if body.get("stream") else said).encode())

        self.server = LOOPBACK.Server(Handler)


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    server = Keeping()
    yield server
    server.server.stop()


@pytest.fixture
def connection(keeping: Keeping) -> Iterator[Connection]:
    found = Connection(keeping.server.url, connections=3, timeout=10.0)
    found.open()
    yield found
    found.close()


def test_a_kept_connection_that_ends_is_no_fault(keeping: Keeping, connection: Connection) -> None:
    for number in range(4):
        prompt = [number, 7]
        if number == 3:  # a stream's own connection is not kept: it is left at the mark of its end
            (found,) = connection.events(PATH, BODY | {"prompt": prompt, "stream": True})
        else:
            found = connection.json("POST", PATH, BODY | {"prompt": prompt})
        assert found == {"prompt": prompt}
    assert keeping.seen == 1 + 2 * 3, "the first on a new connection, each other one on a kept and on a new one"


def test_a_new_connection_that_ends_is_a_fault_at_once(keeping: Keeping, connection: Connection) -> None:
    keeping.kept = 0
    with pytest.raises(Transient, match="no connection: .*disconnected"):
        connection.json("POST", PATH, BODY)
    assert keeping.seen == 1


def test_a_server_that_ends_kept_and_new_ones_is_at_fault(keeping: Keeping, connection: Connection) -> None:
    connection.json("POST", PATH, BODY)
    keeping.kept = 0
    with pytest.raises(Transient, match="no connection: .*disconnected"):
        connection.json("POST", PATH, BODY)
    assert keeping.seen == 1 + 2, "once on the kept connection and once on a new one"


@pytest.mark.parametrize("last", [b"H", b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n{"])
def test_what_was_answered_in_part_is_not_sent_again(keeping: Keeping, connection: Connection, last: bytes) -> None:
    connection.json("POST", PATH, BODY)
    keeping.last = last
    with pytest.raises(Transient, match="no connection"):
        connection.json("POST", PATH, BODY)
    assert keeping.seen == 1 + 1


def test_who_waits_for_an_answer_is_woken_by_the_end(keeping: Keeping) -> None:
    """However often: the number of a socket that is closed under its reader may be another's when the wait begins."""
    for _ in range(20):
        connection, raised = Connection(keeping.server.url, connections=3, timeout=30.0), list[BaseException]()
        connection.open()

        def ask(connection: Connection = connection, raised: list[BaseException] = raised) -> None:
            try:
                while True:
                    connection.served_models()
            except Transient as error:
                raised.append(error)

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.005)
        connection.close()
        for thread in threads:
            thread.join(10)
        assert len(raised) == 3, "a request outlived its connection"


def test_all_kept_connections_may_have_ended(keeping: Keeping, connection: Connection) -> None:
    keeping.together = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: connection.json("POST", PATH, BODY), range(3)))
    keeping.together = None
    assert connection.json("POST", PATH, BODY) == {"prompt": [1, 2]}
    assert keeping.seen == 3 + 3 + 1
