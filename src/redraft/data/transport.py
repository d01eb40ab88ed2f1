"""HTTP to an OpenAI-compatible server: addresses, requests, streams, what is an answer, and which faults are transient.

Shared by regeneration (which tries again) and the server benchmark (which never does while it measures: a retry would
hide in the time).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import reprlib
import ssl
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from redraft.data.generate import Request
from redraft.errors import UserError
from redraft.places import without_secrets
from redraft.settings.texts import KEY_VARIABLE, check_address

RETRIED_STATUS = frozenset({408, 425, 429})
FATAL_STATUS = frozenset({401, 403, 404, 405, 501})
STREAM_END = b"[DONE]"
# Bytes of a body that are read: this much, and for every token that a request has or asks for.
ROOM, ROOM_A_TOKEN, SAID = 8 << 20, 4096, 1 << 16
# A stream has the time limit of an answer for every so many tokens that it was asked for.
PACE_TOKENS = 128
# An event of a stream without a token is a comment or a count; so many more of them than tokens are no stream.
IDLE_EVENTS = 1024
# A signal that comes right before a wait begins is heard at its end: no wait of the main thread is longer.
HEARD_SECONDS = 0.5
SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = SHOWN.maxlong = 300

Outcome = TypeVar("Outcome")


class Transient(Exception):
    """A fault that the next attempt may not meet."""


class Unusable(Transient):
    """A fault that ends a run where a server says nothing else: a wrong key, address or model. From a server that has
    given a good answer it is a fault like others."""


class Late(Transient):
    """No answer in time."""


class Refused(Exception):
    """This request cannot be answered, however often it is asked."""


def persist(
    attempt: Callable[[], Outcome], attempts: int, pause: float, longest: float, stopped: Callable[[float], Any]
) -> Outcome:
    """The attempt's result; it is repeated with growing pauses (in seconds, ``longest`` at most) while it raises
    ``Transient``. ``stopped`` waits so long and says whether to give up."""
    for number in range(attempts):
        try:
            return attempt()
        except Transient as error:
            wait = pause if isinstance(error, Unusable) else min(longest, pause * 2**number)
            if number + 1 == attempts or stopped(wait):
                raise
    raise AssertionError("at least one attempt is needed")


@functools.cache
def _certificates() -> ssl.SSLContext:
    """What certificates are checked against, read once: it takes longer than many a request."""
    import httpx

    return httpx.create_ssl_context()


def server_key() -> str | None:
    """The bearer key of the environment, its one place: a command line or a file would keep it. None where it is unset;
    raises ``UserError`` for one that cannot be sent."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{KEY_VARIABLE} holds characters that no key has; set it to the server's key alone")
    return key or None


class Connection:
    """A server at ``url`` (with or without ``/v1``), used by up to ``connections`` threads at a time.

    A request fails when its answer is not there whole after ``timeout`` seconds; a stream, when it is silent for so
    long, or slower than ``PACE_TOKENS`` tokens in that time. Answers larger than what was asked for are not read to
    their end, and redirects not followed. The key of the environment (:func:`server_key`) is sent as a bearer token
    and stands in no message. Raises ``UserError`` for an address that is none, or that holds a secret.
    """

    def __init__(self, url: str, connections: int = 1, timeout: float = 300.0) -> None:
        self.url = check_address(url)
        self.connections, self.timeout = connections, timeout
        self._key = server_key()
        self._wire: Any = None
        self._names: list[str] | None = None

    def open(self) -> None:
        """Make ready to ask. Raises ``UserError`` where the package for it is missing."""
        try:
            from redraft.data.wire import Wire
        except ImportError as error:
            raise UserError("talking to a server needs the package httpx: pip install redraft[vllm-client]") from error
        try:
            self._wire = Wire(self.url, self.connections, _certificates())
        except ValueError as error:
            raise UserError(
                f"server {self.url!r} cannot be used ({error}); write its address like http://127.0.0.1:8000"
            ) from None

    def close(self) -> None:
        """Close it; requests under way in other threads end with ``Transient``."""
        if self._wire is not None:
            self._wire.close()

    def text(self, method: str, path: str, body: dict[str, Any] | None = None) -> str:
        """The answer's text. Raises ``Transient`` (``Unusable`` where no request may ever succeed) and ``Refused``."""
        with self._asking(method, path, body, "no connection", self.timeout) as reply:
            return _decoded(_whole(reply.chunks, _room(body)))

    def json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer's JSON object; raises as :meth:`text` does."""
        return parse_object(self.text(method, path, body))

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The JSON objects of a stream of server-sent events, as they arrive; raises as :meth:`text` does."""
        tokens = int(body.get("max_tokens", 0))
        ends = time.monotonic() + self.timeout * max(1.0, tokens / PACE_TOKENS)
        most, number = 2 * tokens + IDLE_EVENTS, 0
        with self._asking("POST", path, body, "the connection broke", self.timeout) as reply:
            for line in _lines(reply.chunks, _room(body)):
                # other fields of the format (event, id, comments) carry nothing here
                data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                if data == STREAM_END:
                    return
                if not data:
                    continue
                number += 1
                if number > most:
                    raise Transient(f"a stream of more than {most} events where {tokens} tokens were asked for")
                self._wire.hurry(min(self.timeout, ends - time.monotonic()))
                yield parse_object(_decoded(data))
        raise Transient("the stream broke off before its end")

    @contextmanager
    def _asking(self, method: str, path: str, body: dict[str, Any] | None, fault: str, seconds: float) -> Iterator[Any]:
        """A good answer, still to be read; ``Transient`` for what the network does, which is called ``fault`` but for a
        time-out, and what :meth:`_check` raises for an answer of another status."""
        from redraft.data.wire import FAULTS, TIMEOUTS

        headers = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "redraft"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        headers |= {"Content-Type": "application/json"} if body is not None else {}
        try:
            content = None if body is None else json.dumps(body).encode()
            with self._wire.ask(method, path, headers, content, seconds) as reply:
                if not 200 <= reply.status < 300:
                    said = _whole(reply.chunks, SAID, cut=True).decode(errors="replace")
                    self._check(reply.status, path, said, reply.headers.get("location", ""))
                yield reply
        except TIMEOUTS as error:
            raise Late(f"no answer within {seconds:g} s") from error
        except UserError:
            raise
        except FAULTS as error:
            raise Transient(f"{fault}: {excerpt(str(error)) or type(error).__name__}") from error

    def served_models(self) -> list[str]:
        """Names of the models the server lists. Raises as :meth:`text`; a list that is none is ``Unusable``."""
        value = self.json("GET", "/v1/models")
        try:
            names = [entry["id"] for entry in value["data"]]
        except (KeyError, TypeError):
            names = [None]
        if not names:
            raise Unusable(f"the server at {self.url} serves no model")
        if not all(isinstance(name, str) and 0 < len(name) <= 4096 for name in names):
            raise Unusable(f"the server at {self.url} does not list its models; name the model")
        self._names = names
        return names

    def the_model(self, names: list[str]) -> str:
        """The one model of ``names``. Raises ``UserError`` when there are none or several."""
        if len(names) != 1:
            raise UserError(f"the server at {self.url} serves {listed(names)}; name one of them")
        return names[0]

    def check_model(self, value: dict[str, Any], wanted: str | None) -> None:
        """Raise ``Unusable`` for an answer of another model than was asked; of the several names that a server has for
        one it may say any."""
        said = value.get("model")
        if said is None or wanted is None or said == wanted:
            return
        names = self._names if self._names is not None else self.served_models()
        if not isinstance(said, str) or said not in names:
            raise Unusable(
                f"the server at {self.url} answers as the model {shown(said)} where {excerpt(wanted)} was asked; "
                "serve the target, and name it as the server does"
            )

    def _check(self, status: int, path: str, text: str, location: str) -> None:
        if 300 <= status < 400:
            to = excerpt(without_secrets(location)) or "another address"
            raise Unusable(
                f"the server at {self.url} sends {path} on to {to} (status {status}), and neither prompts nor keys are "
                "sent to an address that was not given; give that one if it is right"
            )
        if status < 200 or (status >= 500 and status not in FATAL_STATUS) or status in RETRIED_STATUS:
            raise Transient(f"status {status}")
        said = excerpt(text)
        if status in (401, 403):
            place = f"the server's key in the environment variable {KEY_VARIABLE}"
            said += f"; is {place} the right one?" if self._key else f"; set {place}"
        if status in FATAL_STATUS:
            raise Unusable(f"the server at {self.url} answers {path} with status {status}: {said}")
        raise Refused(f"status {status}: {said}")


# -- bodies ----------------------------------------------------------------------------------------------------------
def _room(body: dict[str, Any] | None) -> int:
    """Bytes that an answer may have: a token takes its id, its text, an event's frame and, where they were asked for,
    its log-probabilities."""
    body = body or {}
    prompt, beside = body.get("prompt", ()), int(body.get("prompt_logprobs") or 0)
    return ROOM + (len(prompt) + int(body.get("max_tokens", 0))) * (ROOM_A_TOKEN + 256 * beside)


def _whole(chunks: Iterator[bytes], room: int, cut: bool = False) -> bytes:
    """All bytes of a body. Raises ``Transient`` for more than ``room`` of them, or gives the first with ``cut``."""
    found = bytearray()
    for chunk in chunks:
        found += chunk
        if len(found) > room:
            if cut:
                break
            raise Transient(f"an answer of more than {room:,} bytes, far more than was asked for")
    return bytes(found)


def _lines(chunks: Iterator[bytes], room: int) -> Iterator[bytes]:
    """The lines of a stream without their ends, one that nothing ended left out. Raises ``Transient`` for more than
    ``room`` bytes."""
    rest, read = bytearray(), 0
    for chunk in chunks:
        read += len(chunk)
        if read > room:
            raise Transient(f"a stream of more than {room:,} bytes, far more than was asked for")
        # a text may hold any other mark that ends lines
        *whole, last = chunk.split(b"\n")
        for line in whole:
            rest += line
            yield bytes(rest).rstrip(b"\r")
            rest.clear()
        rest += last


def _decoded(data: bytes) -> str:
    try:
        # What an answer's header names may be no encoding of text at all; JSON's own is this.
        return data.decode()
    except UnicodeDecodeError:
        raise Transient(f"an answer that is no UTF-8: {excerpt(data[:400].decode(errors='replace'))!r}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key that is there twice")
    return found


def _finite(text: str) -> float:
    """A number of JSON. Raises ``ValueError`` for NaN, infinity, and what is too large for a float."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]}")
    return value


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object, strictly: keys once, numbers finite. Raises ``Transient`` for anything else and for an error that
    the server reports."""
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Transient(f"an answer that is not JSON: {excerpt(text)!r}") from error
    if not isinstance(value, dict):
        raise Transient(f"an answer that is no JSON object: {excerpt(text)!r}")
    if value.get("error"):
        raise Transient(f"the server reports {shown(value['error'])!r}")
    return value


def completion_body(request: Request, model: str | None, max_new_tokens: int) -> dict[str, Any]:
    """The body for ``/v1/completions``. What a request leaves out servers fill with defaults of their own (the
    checkpoint's generation config, a top-k of 40), so filters that are off are named too where tokens are drawn; a
    greedy choice has none. Top-k is off at -1, which every server takes: SGLang refuses 0."""
    sampler = request.sampler
    seed = hashlib.sha256(f"{request.key}|{request.seed}".encode()).digest()
    filters = {"top_p": sampler.top_p, "top_k": sampler.top_k or -1, "min_p": 0.0}
    return {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": max_new_tokens,
        "temperature": sampler.temperature,
        **({} if sampler.greedy else filters),
        "repetition_penalty": 1.0,
        "seed": int.from_bytes(seed[:4], "big") >> 1,
        "stream": False,
        "return_token_ids": True,
        "skip_special_tokens": False,
    }


def counted(value: dict[str, Any], name: str, most: int | None = None) -> int | None:
    """A count of the server's ``usage``, if it has one. Raises ``Transient`` for one that cannot be, as above
    ``most``."""
    usage = value.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    if count is None:
        return None
    if type(count) is not int or count < 0 or (most is not None and count > most):
        raise Transient(f"an answer whose {name} is {shown(count)}")
    return count


def first_choice(value: dict[str, Any]) -> dict[str, Any] | None:
    """The one choice of an answer or event; None in one without. Raises ``Transient`` where there are several."""
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choice := choices[0], dict):
        return None
    if len(choices) > 1 or choice.get("index") not in (None, 0):
        raise Transient("an answer with several choices where one was asked for")
    return choice


def answer_text(choice: dict[str, Any]) -> str:
    """The text of a choice; empty in one without. Raises ``Transient`` where it is no text."""
    text = choice.get("text")
    if text is not None and not isinstance(text, str):
        raise Transient(f"an answer whose text is {shown(text)}")
    return text or ""


def answer_ids(choice: dict[str, Any]) -> list[int] | None:
    """The token ids of a choice; None in one without. Raises ``Transient`` where they are no ids."""
    ids = choice.get("token_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)):
        raise Transient("an answer whose token ids are no list of numbers")
    return ids


def check_prompt(choice: dict[str, Any], value: dict[str, Any], request: Request) -> None:
    """Raise ``Unusable`` where the server changed the prompt's token ids, ``Refused`` where it counted others."""
    echoed = choice.get("prompt_token_ids", value.get("prompt_token_ids"))
    if echoed is not None and echoed != list(request.prompt_ids):
        raise Unusable("the server changed the prompt's token ids; turn off whatever adds tokens to prompts there")
    found = counted(value, "prompt_tokens")
    if found and found != len(request.prompt_ids):
        raise Refused(
            f"the server counted {found} tokens of a prompt of {len(request.prompt_ids)}; "
            "turn off whatever adds tokens to prompts there or cuts them"
        )


def check_count(count: int | None, ids: list[int], stopped: bool, ends: Container[int]) -> None:
    """Raise ``Transient`` where a server counted another number of tokens than it gave ids. An end token that it did
    not give may be in its count."""
    more = stopped and not (ids and ids[-1] in ends)
    if count is not None and count not in (len(ids), len(ids) + more):
        raise Transient(f"an answer of {len(ids)} token ids, and the server counted {count}")


# -- words -----------------------------------------------------------------------------------------------------------
def excerpt(text: str, length: int = 120) -> str:
    """The beginning of a text, in one line of characters that can be seen, and without the server's key."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    text = text.replace(key, "***") if key else text
    line = " ".join(text[: 50 * length].split())
    line = line if len(line) <= length else line[:length] + "..."
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def shown(value: Any) -> str:
    """What a server said where something else was expected; of long and deep things the beginning."""
    return excerpt(value if isinstance(value, str) else SHOWN.repr(value))


def listed(names: list[str]) -> str:
    """The models that a server serves, for a message."""
    return excerpt(", ".join(names[:50])) or "no model"
