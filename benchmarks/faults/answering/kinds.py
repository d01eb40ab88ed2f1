"""What a server may say wrongly: kinds of fault, each of which spoils one answer, page of counters or list of models.

``said`` changes the text of an answer (of a stream: of one event); ``raw`` writes to the connection itself. A fault of
``counts`` is in the usage, which a stream sends at its end. ``whole`` kinds need an answer in one piece. All are
harmless to other software: the texts are short-lived and go to a client on the loopback.
"""

from __future__ import annotations

import gzip
import json
import random
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Said = Callable[[str, random.Random], bytes]
Raw = Callable[[Any, bytes], None]
DRIP_SECONDS, ENDLESS_BYTES = 6.0, 1 << 30


@dataclass(frozen=True)
class Kind:
    name: str
    door: str = "answer"
    said: Said | None = None
    raw: Raw | None = None
    counts: bool = False
    whole: bool = False
    scored: bool = False


# -- what an answer says ---------------------------------------------------------------------------------------------
def of_choice(**changes: Any) -> Said:
    """An answer whose choice says otherwise; a function gets the choice and the numbers."""

    def said(text: str, numbers: random.Random) -> bytes:
        value = json.loads(text)
        for choice in value["choices"]:
            told = {name: new(choice, numbers) if callable(new) else new for name, new in changes.items()}
            choice.update(told)
        return json.dumps(value).encode()

    return said


def of_value(**changes: Any) -> Said:
    """An answer that says otherwise."""

    def said(text: str, numbers: random.Random) -> bytes:
        value = json.loads(text)
        return json.dumps(value | {k: new(value) if callable(new) else new for k, new in changes.items()}).encode()

    return said


def of_usage(**changes: Any) -> Said:
    """An answer whose counts are others."""
    return of_value(usage=lambda v: v["usage"] | {k: new(v["usage"][k]) for k, new in changes.items()})


def behind(more: str) -> Said:
    """A key more at the end of the object."""
    return lambda text, _: f'{text[:-1]}, "more": {more}}}'.encode()


def _one(choice: dict[str, Any], numbers: random.Random, new: Any) -> list[Any]:
    ids = list(choice["token_ids"])
    ids[numbers.randrange(len(ids))] = new
    return ids


def _lost(choice: dict[str, Any], numbers: random.Random) -> list[int]:
    place = numbers.randrange(len(choice["token_ids"]))
    return [token for n, token in enumerate(choice["token_ids"]) if n != place]


def _doubled(choice: dict[str, Any], numbers: random.Random) -> list[int]:
    return [choice["token_ids"][0], *choice["token_ids"]]


SAID: dict[str, Said] = {
    "no choices": of_value(choices=None),
    "choices that are empty, with an answer's counts": lambda t, _: json.dumps(
        json.loads(t) | {"choices": [], "detail": "busy"}
    ).encode(),
    "choices that are no list": of_value(choices={"0": 1}),
    "two choices": of_value(choices=lambda v: v["choices"] * 2),
    "a choice of another number": of_choice(index=1),
    "no finish reason": of_choice(finish_reason=None),
    "finish reason abort": of_choice(finish_reason="abort"),
    "a finish reason that is a list": of_choice(finish_reason=["stop"]),
    "ids that are texts": of_choice(token_ids=lambda c, _: [str(i) for i in c["token_ids"]]),
    "an id below zero": of_choice(token_ids=lambda c, r: _one(c, r, -1)),
    "an id beyond the vocabulary": of_choice(token_ids=lambda c, r: _one(c, r, 128)),
    "an id of thirty digits": of_choice(token_ids=lambda c, r: _one(c, r, 10**30)),
    "an id that is a fraction": of_choice(token_ids=lambda c, r: _one(c, r, 5.5)),
    "an id that is true": of_choice(token_ids=lambda c, r: _one(c, r, True)),
    "ids that are an object": of_choice(token_ids={"0": 5}),
    "a token that is lost": of_choice(token_ids=_lost),
    "a token that is there twice": of_choice(token_ids=_doubled),
    "no ids left": of_choice(token_ids=[]),
    "more tokens than were asked for": of_choice(token_ids=lambda c, _: c["token_ids"] + [5] * 40),
    "a prompt that was changed": of_choice(prompt_token_ids=[1, 2, 3]),
    "a text that is a number": of_choice(text=7),
    "another model": of_value(model="other"),
    "a model that is a number": of_value(model=3.5),
    "an error with status 200": of_value(error={"message": "out of memory"}),
    "JSON of great depth": lambda t, _: b"[" * 100_000,
    "depth inside of an answer": behind("[" * 50_000 + "]" * 50_000),
    "a number of ten thousand digits": behind("9" * 10_000),
    "NaN": behind("NaN"),
    "infinity": behind("-Infinity"),
    "a number too large for a float": behind("1e999"),
    "a key that is there twice": lambda t, _: ('{"choices": [], ' + t[1:]).encode(),
    "bytes that are no UTF-8": lambda t, _: t.encode().replace(b'"text": "', b'"text": "\xff\xfe', 1),
    "UTF-16": lambda t, _: t.encode("utf-16"),
    "half an answer, as if it were all": lambda t, _: t[: len(t) // 2].encode(),
    "more behind the answer": lambda t, _: t.encode() + b"}{",
    "a list around it": lambda t, _: f"[{t}]".encode(),
    "a text around it": lambda t, _: json.dumps(t).encode(),
    "a page of HTML": lambda t, _: b"<html>gateway</html>",
    "nothing at all": lambda t, _: b"",
}
COUNTS: dict[str, Said] = {
    "a prompt of other length": of_usage(prompt_tokens=lambda n: n + 1),
    "a count below zero": of_usage(completion_tokens=lambda n: -n),
    "a count of one less": of_usage(completion_tokens=lambda n: n - 1),
    "a count of a million": of_usage(completion_tokens=lambda n: 10**6),
    "a count that is a text": of_usage(completion_tokens=str),
    "a count that is a fraction": of_usage(completion_tokens=lambda n: n + 0.5),
}
WHOLE: dict[str, Said] = {
    "the prompt before the answer": lambda t, _: json.dumps(_echo(json.loads(t))).encode(),
    "a text of another vocabulary": of_choice(text=lambda c, _: "qzxjkw" * 9),
    "no ids, and half the text": of_choice(token_ids=None, text=lambda c, _: c["text"][:3]),
    "no ids, and a stop string": of_choice(token_ids=None, stop_reason="###", finish_reason="stop"),
}


def _echo(value: dict[str, Any]) -> dict[str, Any]:
    choice = value["choices"][0]
    choice["token_ids"] = choice["prompt_token_ids"] + choice["token_ids"]
    return value


def of_scores(change: Callable[[dict[str, Any]], Any]) -> Said:
    """Log-probabilities whose last entry is another."""

    def said(text: str, numbers: random.Random) -> bytes:
        value = json.loads(text)
        for choice in value["choices"]:
            found = choice.get("prompt_logprobs") or [{}]
            choice["prompt_logprobs"] = [*found[:-1], change(found[-1] or {})]
        return json.dumps(value).encode()

    return said


SCORES: dict[str, Said] = {
    "no log-probabilities": of_choice(prompt_logprobs=None),
    "a log-probability above zero": of_scores(lambda e: {k: {"logprob": 1.5} for k in e}),
    "log-probabilities of more than one in all": of_scores(lambda e: {k: {"logprob": -0.1} for k in e}),
    "log-probabilities that are texts": of_scores(lambda e: {k: {"logprob": str(v["logprob"])} for k, v in e.items()}),
    "log-probabilities of other tokens": of_scores(lambda e: {"3": {"logprob": -0.5}}),
    "log-probabilities of one token less": of_choice(prompt_logprobs=lambda c, _: c["prompt_logprobs"][:-1]),
    "log-probabilities of an id beyond the vocabulary": of_scores(lambda e: e | {"128": {"logprob": -9.0}}),
}


# -- what a connection does ------------------------------------------------------------------------------------------
def status(number: int, body: bytes = b'{"detail": "no"}', **headers: str) -> Raw:
    """An answer of another status."""
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return sent(f"HTTP/1.1 {number} X\r\n{fields}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def sent(data: bytes) -> Raw:
    """These bytes, and the end."""
    return lambda handler, honest: _write(handler, data)


def framed(head: str, tail: Callable[[bytes], bytes]) -> Raw:
    """A header of one's own, and what is made of the honest body."""
    return lambda handler, honest: _write(handler, f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + tail(honest))


def _write(handler: Any, data: bytes) -> None:
    handler.wfile.write(data)
    handler.wfile.flush()


def _drip(handler: Any, data: bytes) -> None:
    ends = time.monotonic() + DRIP_SECONDS
    for place in range(len(data)):
        if time.monotonic() > ends:
            return
        _write(handler, data[place : place + 1])
        handler.server_of.gone.wait(0.05)


def _dripping_body(handler: Any, honest: bytes) -> None:
    _write(handler, f"HTTP/1.1 200 OK\r\nContent-Length: {len(honest) + 900}\r\n\r\n".encode())
    _drip(handler, b" " * 900 + honest)


def _endless(handler: Any, honest: bytes) -> None:
    _write(handler, b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(ENDLESS_BYTES >> 16):
        _write(handler, b" " * (1 << 16))


def _comments(handler: Any, honest: bytes) -> None:
    _write(handler, b"HTTP/1.1 200 OK\r\n\r\n")
    ends = time.monotonic() + DRIP_SECONDS
    while time.monotonic() < ends:
        _write(handler, b": still there\n\n")
        handler.server_of.gone.wait(0.05)


def _reset(handler: Any, honest: bytes) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


RAW: dict[str, Raw] = {
    "status 500": status(500),
    "status 502 with a page": status(502, b"<html>" * 100),
    "status 429": status(429, **{"Retry-After": "100000"}),
    "status 400": status(400),
    "status 401": status(401),
    "status 404": status(404),
    "status 204": sent(b"HTTP/1.1 204 X\r\n\r\n"),
    "status 101": sent(b"HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"),
    "status 999": status(999),
    "sent on to another host": status(307, **{"Location": "https://localhost:1/v1/completions"}),
    "sent on with status 302": status(302, **{"Location": "/v1/models"}),
    "a connection that ends at once": sent(b""),
    "a connection that is reset": _reset,
    "no byte": lambda handler, honest: handler.server_of.gone.wait(DRIP_SECONDS),
    "a byte now and then": _dripping_body,
    "a byte of the header now and then": lambda handler, honest: _drip(handler, b"HTTP/1.1 200 OK\r\nX: " + b"x" * 900),
    "comments and no answer": _comments,
    "a body without end": _endless,
    "a header without end": lambda handler, honest: _write(handler, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000),
    "status 100 without end": lambda handler, honest: _write(handler, b"HTTP/1.1 100 Continue\r\n\r\n" * 50_000),
    "a body that breaks off": framed("Content-Length: 99999\r\n", lambda b: b[: len(b) // 2]),
    "a body cut at a length that says so": framed("Content-Length: 40\r\n", lambda b: b[:40]),
    "chunks that are none": framed("Transfer-Encoding: chunked\r\n", lambda b: b"ZZ\r\n" + b),
    "a chunk of absurd size": framed("Transfer-Encoding: chunked\r\n", lambda b: b"ffffffffffff\r\n" + b),
    "packed though nobody asked": lambda handler, honest: _write(
        handler,
        f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(gzip.compress(honest))}\r\n\r\n".encode()
        + gzip.compress(honest),
    ),
    "two lengths": framed("Content-Length: 5\r\nContent-Length: 7\r\n", lambda b: b),
    "no HTTP": sent(b"hello there\r\n\r\n"),
    "a second answer behind the first": lambda handler, honest: _twice(handler, honest),
    "a content type of its own, and a good answer": framed("Content-Type: image/png\r\n", lambda b: b),
}


def _twice(handler: Any, honest: bytes) -> None:
    """The answer, and on the same connection one that nobody asked for and the next request may take for its own."""
    said = f"HTTP/1.1 200 OK\r\nContent-Length: {len(honest)}\r\n\r\n".encode() + honest
    _write(handler, said + said)
    handler.server_of.gone.wait(0.2)


# -- counters and models ---------------------------------------------------------------------------------------------
def counters(change: Callable[[list[str]], list[str]]) -> Said:
    """A page whose lines are others."""
    return lambda text, _: "\n".join(change(text.splitlines())).encode() + b"\n"


def _values(new: Callable[[float], Any]) -> Callable[[list[str]], list[str]]:
    def change(lines: list[str]) -> list[str]:
        told = [line.rpartition(" ") for line in lines]
        return [
            line if line.startswith(("#", "process")) else f"{name} {new(float(value))}"
            for line, (name, _, value) in zip(lines, told, strict=True)
        ]

    return change


METRICS: dict[str, Said | Raw] = {
    "counters below zero": counters(_values(lambda x: -1 - x)),
    "counters that are NaN": counters(_values(lambda x: "NaN")),
    "counters that go backwards": counters(_values(lambda x: x // 2)),
    "counters far too high": counters(_values(lambda x: x + 10**7)),
    "counters beyond any": counters(_values(lambda x: 1e300)),
    "counters without those of rounds": counters(lambda lines: [x for x in lines if "spec_decode" not in x]),
    "a page of counters that is empty": lambda t, _: b"",
    "a page of counters that is HTML": lambda t, _: b"<html>vllm:generation_tokens_total</html>",
    "every counter twice": lambda t, _: (t + t).encode(),
    "a position that is a word": lambda t, _: t.replace('position="1"', 'position="x"').encode(),
    "a position of a billion": lambda t, _: t.replace('position="1"', 'position="1000000000"').encode(),
    "another process": lambda t, _: t.replace(
        "process_start_time_seconds 1000.0", "process_start_time_seconds 7"
    ).encode(),
    "half a page of counters": lambda t, _: t[: len(t) // 2].encode(),
}
METRICS_RAW = {f"counters: {name}": RAW[name] for name in ("status 500", "status 404", "no byte", "a body without end")}
LIST: dict[str, Said] = {
    "a list of models that is none": lambda t, _: b'{"data": 7}',
    "a list of no models": lambda t, _: b'{"data": []}',
    "models that are numbers": lambda t, _: b'{"data": [{"id": 7}]}',
    "a list of models that is HTML": lambda t, _: b"<html>",
}
LIST_RAW = {f"models: {name}": RAW[name] for name in ("status 500", "status 404", "sent on to another host", "no byte")}


def every_kind() -> list[Kind]:
    """All kinds, those of answers first."""
    return [
        *(Kind(name, said=said) for name, said in SAID.items()),
        *(Kind(name, said=said, counts=True) for name, said in COUNTS.items()),
        *(Kind(name, said=said, whole=True) for name, said in WHOLE.items()),
        *(Kind(name, said=said, whole=True, scored=True) for name, said in SCORES.items()),
        *(Kind(name, raw=raw) for name, raw in RAW.items()),
        *(Kind(name, "metrics", said=said) for name, said in METRICS.items()),
        *(Kind(name, "metrics", raw=raw) for name, raw in METRICS_RAW.items()),
        *(Kind(name, "models", said=said) for name, said in LIST.items()),
        *(Kind(name, "models", raw=raw) for name, raw in LIST_RAW.items()),
    ]
