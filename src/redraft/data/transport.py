"""HTTP to an OpenAI-compatible server: addresses, requests, streams, and which faults are transient.

Shared by regeneration (which tries again) and the server benchmark (which never does: a retry would hide in the time).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redraft.data.generate import Request
from redraft.errors import UserError
from redraft.settings.texts import KEY_VARIABLE, check_address

RETRIED_STATUS = frozenset({408, 425, 429})
FATAL_STATUS = frozenset({401, 403, 404, 405, 501})
STREAM_END = "[DONE]"
# JSON's own. What an answer's header names may be no encoding of text at all, and decoding then raises anything.
ENCODING = "utf-8"


class Transient(Exception):
    """A fault that the next attempt may not meet."""


class Refused(Exception):
    """This request cannot be answered, however often it is asked."""


@functools.cache
def _certificates() -> ssl.SSLContext:
    """What httpx checks certificates against, read once: it takes longer than many a request."""
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

    A request fails after ``timeout`` seconds without a byte. The key of the environment (:func:`server_key`) is sent as
    a bearer token and stands in no message. Raises ``UserError`` for an address that is none, or that holds a secret.
    """

    def __init__(self, url: str, connections: int = 1, timeout: float = 300.0) -> None:
        self.url = check_address(url)
        self.connections, self.timeout = connections, timeout
        self._key = server_key()
        self._client: Any = None

    def shown(self, text: str, length: int = 120) -> str:
        """The beginning of what a server said, in one line and without the key, should it repeat that."""
        return excerpt(text.replace(self._key, "***") if self._key else text, length)

    def open(self) -> None:
        """Make the client. Raises ``UserError`` where the package for it is missing."""
        try:
            import httpx
        except ImportError as error:
            raise UserError("talking to a server needs the package httpx: pip install redraft[vllm-client]") from error
        limits = httpx.Limits(max_connections=self.connections, max_keepalive_connections=self.connections)
        timeout = httpx.Timeout(self.timeout, connect=min(10.0, self.timeout))
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        how: dict[str, Any] = {"limits": limits, "timeout": timeout, "headers": headers, "follow_redirects": True}
        try:
            self._client = httpx.Client(base_url=self.url, verify=_certificates(), **how)
        except httpx.InvalidURL as error:
            raise UserError(
                f"server {self.url!r} is no address ({error}); write it like http://127.0.0.1:8000"
            ) from None

    def close(self) -> None:
        """Close the client; requests under way in other threads end with ``Transient``."""
        if self._client is not None:
            self._client.close()

    def text(self, method: str, path: str, body: dict[str, Any] | None = None) -> str:
        """The answer's text. Raises ``Transient``, ``Refused``, and ``UserError`` where no request can ever succeed."""
        with self._reaching("no connection"):
            response = self._client.request(method, path, json=body)
        response.encoding = ENCODING
        self._check(response.status_code, path, response.text)
        return response.text

    def json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer's JSON object; raises as :meth:`text` does."""
        return self._object(self.text(method, path, body))

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The JSON objects of a stream of server-sent events, as they arrive; raises as :meth:`text` does."""
        with self._reaching("the connection broke"), self._client.stream("POST", path, json=body) as response:
            response.encoding = ENCODING
            if response.status_code >= 300:
                response.read()
                self._check(response.status_code, path, response.text)
            for line in response.iter_lines():
                # other fields of the format (event, id, comments) carry nothing here
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == STREAM_END:
                    return
                if data:
                    yield self._object(data)
        raise Transient("the stream broke off before its end")

    @contextmanager
    def _reaching(self, fault: str) -> Iterator[None]:
        """``Transient`` for what the network does; ``fault`` is what it is called but for a time-out."""
        import httpx

        try:
            yield
        except httpx.TimeoutException as error:
            raise Transient(f"no answer within {self.timeout:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, RuntimeError) as error:
            # RuntimeError: the client was closed under this thread; UnicodeError: sent on to a host that is none
            raise Transient(f"{fault}: {error or type(error).__name__}") from error

    def served_models(self) -> list[str]:
        """Names of the models the server lists. Raises as :meth:`text`, and ``UserError`` for a list that is none."""
        value = self.json("GET", "/v1/models")
        try:
            return [str(entry["id"]) for entry in value["data"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"the server at {self.url} does not list its models; name the model") from error

    def the_model(self, names: list[str]) -> str:
        """The one model of ``names``. Raises ``UserError`` when there are none or several."""
        if len(names) != 1:
            raise UserError(f"the server at {self.url} serves {', '.join(names) or 'no model'}; name one of them")
        return names[0]

    def _check(self, status: int, path: str, text: str) -> None:
        if status >= 500 and status not in FATAL_STATUS or status in RETRIED_STATUS:
            raise Transient(f"status {status}")
        said = self.shown(text)
        if status in (401, 403):
            place = f"the server's key in the environment variable {KEY_VARIABLE}"
            said += f"; is {place} the right one?" if self._key else f"; set {place}"
        if status in FATAL_STATUS:
            raise UserError(f"the server at {self.url} answers {path} with status {status}: {said}")
        if status >= 300:
            raise Refused(f"status {status}: {said}")

    def _object(self, text: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Transient(f"an answer that is not JSON: {self.shown(text)!r}") from error
        if not isinstance(value, dict):
            raise Transient(f"an answer that is no JSON object: {self.shown(text)!r}")
        if value.get("error"):
            raise Transient(f"the server reports {self.shown(str(value['error']))!r}")
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
    if not isinstance(count, int) or isinstance(count, bool) or count < 0 or (most is not None and count > most):
        raise Transient(f"an answer whose {name} is {excerpt(str(count))}")
    return count


def first_choice(value: dict[str, Any]) -> dict[str, Any] | None:
    """The first choice of an answer or event; None in one without."""
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    return choice if isinstance(choice, dict) else None


def answer_text(choice: dict[str, Any]) -> str:
    """The text of a choice; empty in one without. Raises ``Transient`` where it is no text."""
    text = choice.get("text")
    if text is not None and not isinstance(text, str):
        raise Transient(f"an answer whose text is {excerpt(repr(text))}")
    return text or ""


def answer_ids(choice: dict[str, Any]) -> list[int] | None:
    """The token ids of a choice; None in one without. Raises ``Transient`` where they are no ids."""
    ids = choice.get("token_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)):
        raise Transient("an answer whose token ids are no list of numbers")
    return ids


def check_prompt(choice: dict[str, Any], value: dict[str, Any], request: Request) -> None:
    """Raise ``UserError`` where the server changed the prompt's token ids, ``Refused`` where it counted others."""
    echoed = choice.get("prompt_token_ids", value.get("prompt_token_ids"))
    if echoed is not None and echoed != list(request.prompt_ids):
        raise UserError("the server changed the prompt's token ids; turn off whatever adds tokens to prompts there")
    found = counted(value, "prompt_tokens")
    if found and found != len(request.prompt_ids):
        raise Refused(
            f"the server counted {found} tokens of a prompt of {len(request.prompt_ids)}; "
            "turn off whatever adds tokens to prompts there or cuts them"
        )


def excerpt(text: str, length: int = 120) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[:length] + "..."
