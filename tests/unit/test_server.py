"""The server engine against a server on the loopback that refuses, hangs, talks nonsense or dies half-way."""

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
from redraft.data.prompts import Conversation
from redraft.data.regenerate import ServerEngine, regenerate
from redraft.data.server import read_completion
from redraft.data.store import Failure, read_failures, read_rows
from redraft.errors import UserError
from redraft.sampling import Sampler

pytest.importorskip("httpx")
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


# -- a server in good health -----------------------------------------------------------------------------------------
def test_ids_go_in_and_ids_come_out(loopback: Loopback, tiny_tokenizer: Any) -> None:
    asked = requests(10, Sampler(0.7, 5, 0.9))
    found = answers(loopback.engine(api_key="secret"), asked, tiny_tokenizer)
    assert found.keys() == {request.key for request in asked}
    for request in asked:
        outcome = found[request.key]
        assert isinstance(outcome, Completion) and outcome.finish_reason == "stop"
        assert outcome.response_ids == reply_ids(list(request.prompt_ids))
    assert len(loopback.bodies) == 10 and set(loopback.headers) == {"Bearer secret"}
    body = loopback.bodies[0]
    wanted = {"model": "tiny", "max_tokens": 8, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.0}
    assert {key: body[key] for key in wanted} == wanted and body["return_token_ids"] is True
    assert len({b["seed"] for b in loopback.bodies}) == 10, "every prompt has a seed of its own"


def test_no_more_requests_at_a_time_than_allowed(loopback: Loopback, tiny_tokenizer: Any) -> None:
    lock, now, most = threading.Lock(), 0, 0
    full = threading.Event()

    def rule(body: dict[str, Any]) -> Reply:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == 3:
                full.set()
        full.wait(10)  # the first ones wait for each other, so that three are under way for certain
        with lock:
            now -= 1
        return good(body)

    loopback.rule = rule
    assert len(answers(loopback.engine(), requests(12), tiny_tokenizer)) == 12
    assert most == 3


def test_addresses_and_served_models(loopback: Loopback, tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="is no address"):
        ServerEngine("localhost:8000")
    assert ServerEngine("http://h:1/v1/").url == "http://h:1"
    loopback.models = (200, {"data": [{"id": "one"}, {"id": "two"}]})
    with pytest.raises(UserError, match="serves one, two; name one"):
        answers(loopback.engine(), requests(1), tiny_tokenizer)
    answers(loopback.engine(model="two"), requests(1), tiny_tokenizer)
    assert loopback.bodies[-1]["model"] == "two"
    loopback.models = (200, {"hello": 1})
    with pytest.raises(UserError, match="does not list its models"):
        answers(loopback.engine(), requests(1), tiny_tokenizer)


# -- faults that pass ------------------------------------------------------------------------------------------------
def choices(**changes: Any) -> Reply:
    return 200, {"choices": [{"text": "a", "finish_reason": "stop", "token_ids": [5, EOS]} | changes]}


PASSING: dict[str, Reply | None] = {
    "status 500": (500, {"error": "x"}),
    "status 503": (503, b"busy"),
    "status 429": (429, b"slow down"),
    "dropped connection": None,
    "not JSON": (200, b"<html>gateway</html>"),
    "JSON that is no object": (200, [1, 2]),
    "no choices": (200, {"id": 1}),
    "empty choices": (200, {"choices": []}),
    "aborted": choices(finish_reason="abort"),
    "no finish reason": choices(finish_reason=None),
    "ids that are no numbers": choices(token_ids=["a"]),
    "negative ids": choices(token_ids=[-1, EOS]),
    "too many ids": choices(token_ids=[5] * 20),
    "neither ids nor text": choices(token_ids=None, text=None),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_a_fault_that_passes_is_tried_again(loopback: Loopback, tiny_tokenizer: Any, fault: Reply | None) -> None:
    lock, seen = threading.Lock(), dict[int, int]()

    def rule(body: dict[str, Any]) -> Reply | None:
        with lock:
            seen[body["seed"]] = seen.get(body["seed"], 0) + 1
            return good(body) if seen[body["seed"]] > 2 else fault

    loopback.rule = rule
    found = answers(loopback.engine(attempts=3), requests(4), tiny_tokenizer)
    assert all(isinstance(outcome, Completion) for outcome in found.values())
    assert list(seen.values()) == [3] * 4
    lasting = loopback.engine(attempts=2, concurrency=9)
    seen.clear()
    found = answers(lasting, requests(4), tiny_tokenizer)
    assert all(isinstance(o, Failure) and not o.permanent and "2 attempts" in o.reason for o in found.values())


def test_a_server_that_hangs(loopback: Loopback, tiny_tokenizer: Any) -> None:
    def rule(body: dict[str, Any]) -> Reply:
        if body["prompt"][1] == 11:
            loopback.release.wait(60)
        return good(body)

    loopback.rule = rule
    found = answers(loopback.engine(timeout=0.3, attempts=2), requests(4), tiny_tokenizer)
    hung = found.pop("r1@T0")
    assert isinstance(hung, Failure) and hung.reason == "no answer within 0.3 s, 2 attempts" and not hung.permanent
    assert all(isinstance(outcome, Completion) for outcome in found.values())


# -- faults that stay ------------------------------------------------------------------------------------------------
def test_nobody_listens(loopback: Loopback, tiny_tokenizer: Any) -> None:
    loopback.stop()
    with pytest.raises(UserError, match="cannot be used: no connection.*is it up"):
        answers(loopback.engine(), requests(2), tiny_tokenizer)


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_will_never_do_is_asked_once(loopback: Loopback, tiny_tokenizer: Any, status: int) -> None:
    loopback.rule = lambda body: (status, {"error": "no such thing"})
    with pytest.raises(UserError, match=f"status {status}: .*no such thing"):
        answers(loopback.engine(concurrency=1), requests(5), tiny_tokenizer)
    assert len(loopback.bodies) == 1


def test_a_prompt_that_is_refused_fails_alone(loopback: Loopback, tiny_tokenizer: Any) -> None:
    loopback.rule = lambda body: (400, b"too long") if body["prompt"][1] == 12 else good(body)
    found = answers(loopback.engine(), requests(5), tiny_tokenizer)
    assert found.pop("r2@T0") == Failure("r2@T0", "status 400: too long")
    assert all(isinstance(outcome, Completion) for outcome in found.values())
    assert len(loopback.bodies) == 5


def test_a_server_that_changes_the_prompt_is_refused(loopback: Loopback, tiny_tokenizer: Any) -> None:
    loopback.rule = lambda body: choices(prompt_token_ids=[1, *body["prompt"]])
    with pytest.raises(UserError, match="changed the prompt's token ids"):
        answers(loopback.engine(), requests(2), tiny_tokenizer)


# -- a whole run -----------------------------------------------------------------------------------------------------
TALKS = [Conversation(f"t{i}", [{"role": "user", "content": f"question {i}"}]) for i in range(20)]


def run(loopback: Loopback, tokenizer: Any, path: Path, **settings: Any) -> Any:
    return regenerate(loopback.engine(**settings), TALKS, tokenizer, [Sampler()], path, 8, 0, "cafe")


def test_a_server_that_dies_half_way(loopback: Loopback, tiny_tokenizer: Any, tmp_path: Path) -> None:
    path, lock, left = tmp_path / "r.jsonl", threading.Lock(), 7

    def dying(body: dict[str, Any]) -> Reply | None:
        nonlocal left
        with lock:
            left -= 1
            return good(body) if left >= 0 else None

    loopback.rule = dying
    with pytest.raises(UserError, match="stopped answering .*7 responses are kept, the same command goes on"):
        run(loopback, tiny_tokenizer, path)
    kept = read_rows(path)
    assert len(kept) == 7
    assert {f.key for f in read_failures(path)} == {f"{t.id}@T0" for t in TALKS} - {row.key for row in kept}
    loopback.stop()
    with pytest.raises(UserError, match="no connection.*7 responses are kept"):
        run(loopback, tiny_tokenizer, path)
    assert read_rows(path) == kept
    loopback.rule = good
    loopback.start()
    asked = len(loopback.bodies)
    report = run(loopback, tiny_tokenizer, path)
    assert (report.kept, report.new, len(loopback.bodies) - asked) == (7, 13, 13)
    rows = read_rows(path)
    assert rows[:7] == kept and {row.id for row in rows} == {talk.id for talk in TALKS}
    assert all(row.response_ids == reply_ids(row.prompt_ids) for row in rows)
    assert read_failures(path) == []


def test_a_server_that_is_never_well(loopback: Loopback, tiny_tokenizer: Any, tmp_path: Path) -> None:
    loopback.rule = lambda body: (500, b"")
    with pytest.raises(UserError, match="stopped answering"):
        run(loopback, tiny_tokenizer, tmp_path / "r.jsonl")
    assert len(loopback.bodies) < 3 * len(TALKS), "the run went on asking a dead server"
    loopback.rule = lambda body: (422, b"no")
    with pytest.raises(UserError, match="none of the prompts could be answered; the first: status 422"):
        run(loopback, tiny_tokenizer, tmp_path / "r.jsonl")


# -- servers without token ids ---------------------------------------------------------------------------------------
REQUEST = Request("k", [1, 5], Sampler())


def text_answer(tokenizer: Any, text: str, reason: str = "stop", tokens: int | None = None) -> Completion:
    value: dict[str, Any] = {"choices": [{"text": text, "finish_reason": reason}]}
    if tokens is not None:
        value["usage"] = {"completion_tokens": tokens}
    return read_completion(value, REQUEST, 16, tokenizer, (EOS,))


def test_text_is_encoded_again_where_that_is_exact(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer.encode("the hat", add_special_tokens=False)
    assert len(ids) < len("the hat")
    for tokens in (None, len(ids), len(ids) + 1):
        assert text_answer(tiny_tokenizer, "the hat", "stop", tokens).response_ids == [*ids, EOS]
    assert text_answer(tiny_tokenizer, "the hat", "length", len(ids)).response_ids == ids
    assert text_answer(tiny_tokenizer, "").response_ids == [EOS]


@pytest.mark.parametrize(
    "text,reason,tokens",
    [
        ("the hat", "stop", 7),  # the model wrote "t" and "h" apart
        ("the hat", "length", 6),
        ("caf\u00e9", "stop", None),  # no such token: encoding loses it
        ("abc\ufffd", "length", None),  # half a character
    ],
)
def test_text_that_does_not_lead_back_is_refused(
    tiny_tokenizer: Any, text: str, reason: str, tokens: int | None
) -> None:
    with pytest.raises(Exception, match="does not lead back to them exactly.*return_token_ids"):
        text_answer(tiny_tokenizer, text, reason, tokens)


def test_inexact_text_is_a_listed_failure(loopback: Loopback, tiny_tokenizer: Any) -> None:
    loopback.rule = lambda body: choices(token_ids=None, text="caf\u00e9" if body["prompt"][1] == 10 else "cafe")
    found = answers(loopback.engine(), requests(3), tiny_tokenizer)
    assert isinstance(found["r0@T0"], Failure) and found["r0@T0"].permanent
    assert isinstance(found["r1@T0"], Completion)


def test_end_tokens_that_the_server_leaves_out(tiny_tokenizer: Any) -> None:
    def read(ids: list[int], reason: str, limit: int = 4, ends: tuple[int, ...] = (EOS,), **more: Any) -> Completion:
        choice = {"finish_reason": reason, "token_ids": ids} | more
        return read_completion({"choices": [choice]}, REQUEST, limit, tiny_tokenizer, ends)

    assert read([5, EOS], "stop").response_ids == [5, EOS]
    assert read([5], "stop").response_ids == [5, EOS]
    assert read([5], "stop", ends=(2, 9), stop_reason=9).response_ids == [5, 9]
    assert read([5], "stop", ends=(2, 9)).response_ids == [5, tiny_tokenizer.eos_token_id]
    full = read([5, 6, 7, 8], "stop")
    assert (full.response_ids, full.finish_reason) == ([5, 6, 7, 8], "length")
