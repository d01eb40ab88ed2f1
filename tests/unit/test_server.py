"""The server engine against a server on the loopback that refuses, hangs, talks nonsense or dies half-way."""

from __future__ import annotations

import json
import runpy
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from redraft.data.generate import Completion
from redraft.data.regenerate import ServerEngine, regenerate
from redraft.data.shapes import Conversation
from redraft.data.store import Failure, failures_path, read_rows
from redraft.errors import UserError
from redraft.settings.sampler import Sampler
from redraft.target import Facts

pytest.importorskip("httpx")
RIG = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("engine_rig.py"))))
EOS, Reply, Loopback = RIG.EOS, RIG.Reply, Any
good, reply_ids, choices = RIG.good, RIG.reply_ids, RIG.choices
loopback, requests, answers = RIG.loopback, RIG.requests, RIG.answers


def listed_failures(path: Path) -> list[Failure]:
    """What the file beside the response file ``path`` lists; nothing where there is none."""
    place = failures_path(path)
    return [Failure(**json.loads(line)) for line in place.read_text().splitlines()] if place.exists() else []


# -- a server in good health -----------------------------------------------------------------------------------------
def test_ids_go_in_and_ids_come_out(loopback: Loopback, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDRAFT_API_KEY", "secret")
    asked = requests(10, Sampler(0.7, 5, 0.9))
    found = answers(loopback.engine(), asked, tiny_tokenizer)
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
    "an id beyond the vocabulary": choices(token_ids=[5, 128, EOS]),
    "an end token beyond the vocabulary": choices(token_ids=[5], stop_reason=10**30),
    "an id that is true": choices(token_ids=[True, EOS]),
    "an id that is a fraction": choices(token_ids=[5.0, EOS]),
    "an object for a choice": (200, {"choices": {"0": 1}}),
    "a finish reason that is a list": choices(finish_reason=["stop"]),
    "an error with status 200": (200, {"error": {"message": "out of memory"}}),
    "JSON of great depth": (200, b"[" * 100_000),
    "a number of ten thousand digits": (200, b'{"choices": ' + b"9" * 10_000 + b"}"),
    "text that is no UTF-8": (200, b"\xff\xfe\xfd"),
    "a count of tokens that cannot be": (
        200,
        {"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"completion_tokens": -3}},
    ),
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


RAW: dict[str, bytes] = {
    "a charset that is no encoding of text": b"200 OK\r\nContent-Type: text/html; charset=base64\r\n\r\n<html>",
    "a charset that the body is not in": b"200 OK\r\nContent-Type: text/html; charset=utf-16\r\n\r\n<html>",
    "compressed nonsense": b"200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
    "a body that breaks off": b'200 OK\r\nContent-Length: 999\r\n\r\n{"choices": [',
    "a chunk that is none": b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
}


@pytest.mark.parametrize("reply", RAW.values(), ids=RAW.keys())
def test_answers_that_are_hardly_http(loopback: Loopback, tiny_tokenizer: Any, reply: bytes) -> None:
    loopback.raw = b"HTTP/1.1 " + reply
    (found,) = answers(loopback.engine(model="tiny", attempts=2, concurrency=2), requests(1), tiny_tokenizer).values()
    assert isinstance(found, Failure) and not found.permanent and "2 attempts" in found.reason


@pytest.mark.parametrize("place", ["http://a..b/", "file:///x", "/v1/completions", "https://other.example/v1", ""])
def test_nobody_is_sent_on(loopback: Loopback, tiny_tokenizer: Any, place: str) -> None:
    loopback.raw = f"HTTP/1.1 307 X\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode()
    with pytest.raises(UserError, match="sends /v1/completions on to .* not given"):
        answers(loopback.engine(model="tiny", attempts=2, concurrency=2), requests(1), tiny_tokenizer)
    assert len(loopback.bodies) == 2


# -- faults that stay ------------------------------------------------------------------------------------------------
def test_nobody_listens(loopback: Loopback, tiny_tokenizer: Any) -> None:
    loopback.stop()
    with pytest.raises(UserError, match="cannot be used: no connection.*is it up"):
        answers(loopback.engine(), requests(2), tiny_tokenizer)


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_will_never_do_is_left_soon(loopback: Loopback, tiny_tokenizer: Any, status: int) -> None:
    loopback.rule = lambda body: (status, {"error": "no such thing"})
    with pytest.raises(UserError, match=f"status {status}: .*no such thing"):
        answers(loopback.engine(concurrency=1), requests(50), tiny_tokenizer)
    assert len(loopback.bodies) <= 4 * 3, "three requests, and none that was begun meanwhile"


OTHER: Reply = 200, choices()[1] | {"model": "other"}


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("fault", [(401, b"who"), (404, b"no"), choices(prompt_token_ids=[1]), OTHER])
def test_what_would_end_a_run_is_one_failure_where_it_is_said_once(
    loopback: Loopback, tiny_tokenizer: Any, fault: Reply, concurrency: int
) -> None:
    loopback.rule = lambda body: fault if body["prompt"][1] == 10 else good(body)
    found = answers(loopback.engine(concurrency=concurrency), requests(6), tiny_tokenizer)
    lost = found.pop("r0@T0")
    assert isinstance(lost, Failure) and not lost.permanent and lost.reason.endswith("3 attempts")
    assert all(isinstance(outcome, Completion) for outcome in found.values())


def test_a_prompt_that_is_refused_fails_alone(loopback: Loopback, tiny_tokenizer: Any) -> None:
    loopback.rule = lambda body: (400, b"too long") if body["prompt"][1] == 12 else good(body)
    found = answers(loopback.engine(), requests(5), tiny_tokenizer)
    assert found.pop("r2@T0") == Failure("r2@T0", "status 400: too long")
    assert all(isinstance(outcome, Completion) for outcome in found.values())
    assert len(loopback.bodies) == 5


@pytest.mark.parametrize("echo", [7, "abc", [1], {"0": 1}])
def test_an_echo_that_is_no_list_of_ids(loopback: Loopback, tiny_tokenizer: Any, echo: Any) -> None:
    loopback.rule = lambda body: choices(prompt_token_ids=echo)
    with pytest.raises(UserError, match="changed the prompt's token ids"):
        answers(loopback.engine(), requests(2), tiny_tokenizer)


def test_a_prompt_that_the_server_counts_otherwise_fails(loopback: Loopback, tiny_tokenizer: Any) -> None:
    def rule(body: dict[str, Any]) -> Reply:
        return 200, good(body)[1] | {"usage": {"prompt_tokens": 4 if body["prompt"][1] == 10 else 3}}

    loopback.rule = rule
    found = answers(loopback.engine(), requests(3), tiny_tokenizer)
    lost = found.pop("r0@T0")
    assert isinstance(lost, Failure) and lost.permanent and "counted 4 tokens of a prompt of 3" in lost.reason
    assert all(isinstance(outcome, Completion) for outcome in found.values())


def test_a_server_that_changes_the_prompt_is_refused(loopback: Loopback, tiny_tokenizer: Any) -> None:
    loopback.rule = lambda body: choices(prompt_token_ids=[1, *body["prompt"]])
    with pytest.raises(UserError, match="changed the prompt's token ids"):
        answers(loopback.engine(), requests(2), tiny_tokenizer)


# -- a whole run -----------------------------------------------------------------------------------------------------
TALKS = [Conversation(f"t{i}", [{"role": "user", "content": f"question {i}"}]) for i in range(20)]


def known(tokenizer: Any) -> Facts:
    return Facts("served", LlamaConfig(max_position_embeddings=512, eos_token_id=2), tokenizer)


def run(loopback: Loopback, tokenizer: Any, path: Path, **settings: Any) -> Any:
    return regenerate(loopback.engine(**settings), TALKS, known(tokenizer), [Sampler()], path, 8)


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
    assert {f.key for f in listed_failures(path)} == {f"{t.id}@T0" for t in TALKS} - {row.key for row in kept}
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
    assert listed_failures(path) == []


def test_a_server_that_is_never_well(loopback: Loopback, tiny_tokenizer: Any, tmp_path: Path) -> None:
    loopback.rule = lambda body: (500, b"")
    with pytest.raises(UserError, match="stopped answering"):
        run(loopback, tiny_tokenizer, tmp_path / "r.jsonl")
    assert len(loopback.bodies) < 3 * len(TALKS), "the run went on asking a dead server"
    loopback.rule = lambda body: (422, b"no")
    with pytest.raises(UserError, match="none of the prompts could be answered; the first: status 422"):
        run(loopback, tiny_tokenizer, tmp_path / "r.jsonl")


def test_ids_beyond_the_vocabulary_are_failures_and_no_rows(
    loopback: Loopback, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"

    def rule(body: dict[str, Any]) -> Reply:
        return choices(token_ids=[5, 100, EOS]) if sum(body["prompt"]) % 2 else good(body)

    loopback.rule = rule
    report = run(loopback, tiny_tokenizer, path, attempts=2, vocab_size=100, concurrency=20)
    assert report.new + len(report.failures) == len(TALKS) and report.failures and report.new
    reasons = {failure.reason for failure in report.failures}
    assert reasons == {"an answer with token id 100, and the target's vocabulary has 100, 2 attempts"}
    assert listed_failures(path) == report.failures
    assert max(i for row in read_rows(path) for i in row.response_ids) < 100


def test_rows_that_a_full_context_cut_are_kept(loopback: Loopback, tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    loopback.rule = lambda body: choices(finish_reason="length", token_ids=[5, 6, 7])
    report = run(loopback, tiny_tokenizer, path)
    assert (report.new, report.cut) == (20, 20) and "20 of them cut short by the server's context" in report.summary()
    rows = read_rows(path)
    assert {(row.finish_reason, len(row.response_ids)) for row in rows} == {("context", 3)}
    asked = len(loopback.bodies)
    again = run(loopback, tiny_tokenizer, path)
    assert (again.kept, again.new, len(loopback.bodies)) == (20, 0, asked) and read_rows(path) == rows
    with pytest.raises(UserError, match="another number of new tokens"):
        regenerate(loopback.engine(), TALKS, known(tiny_tokenizer), [Sampler()], path, 2)
