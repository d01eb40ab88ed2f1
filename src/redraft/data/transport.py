"""HTTP to an OpenAI-compatible server: addresses, requests, streams, and which faults may pass.

Shared by regeneration (which tries again) and the server benchmark (which never does: a retry would hide in the time).
"""

from __future__ import annotations

import functools
import hashlib
import json
import ssl
from collections.abc import Iterator
from typing import Any

from redraft.data.generate import Request
from redraft.errors import UserError

RETRIED_STATUS = frozenset({408, 425, 429})
FATAL_STATUS = frozenset({401, 403, 404, 405, 501})
STREAM_END = "[DONE]"


class Passing(Exception):
    """A fault that the next attempt may not meet."""


class Refused(Exception):
    """This request cannot be answered, however often it is asked."""


@functools.cache
def _certificates() -> ssl.SSLContext:
    """What httpx checks certificates against, read once: it takes longer than many a request."""
    import httpx

    return httpx.create_ssl_context()


class Connection:
    """A server at ``url`` (with or without ``/v1``), used by up to ``connections`` threads at a time.

    A request fails after ``timeout`` seconds without a byte. ``api_key`` is sent as a bearer token. Raises
    ``UserError`` for an address that is none.
    """

    def __init__(self, url: str, connections: int = 1, timeout: float = 300.0, api_key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"server {url!r} is no address; write it like http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.connections, self.timeout = connections, timeout
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client: Any = None

    def open(self) -> None:
        """Make the client. Raises ``UserError`` where the package for it is missing."""
        try:
            import httpx
        except ImportError as error:
            raise UserError("talking to a server needs the package httpx: pip install redraft[vllm-client]") from error
        limits = httpx.Limits(max_connections=self.connections, max_keepalive_connections=self.connections)
        timeout = httpx.Timeout(self.timeout, connect=min(10.0, self.timeout))
        self._client = httpx.Client(
            base_url=self.url,
            headers=self._headers,
            limits=limits,
            timeout=timeout,
            follow_redirects=True,
            verify=_certificates(),
        )

    def close(self) -> None:
        """Close the client; requests under way in other threads end with ``Passing``."""
        if self._client is not None:
            self._client.close()

    def text(self, method: str, path: str, body: dict[str, Any] | None = None) -> str:
        """The answer's text. Raises ``Passing``, ``Refused``, and ``UserError`` where no request can ever succeed."""
        import httpx

        try:
            response = self._client.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise Passing(f"no answer within {self.timeout:g} s") from error
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed under this thread
            raise Passing(f"no connection: {error or type(error).__name__}") from error
        self._check(response.status_code, path, response.text)
        return response.text

    def json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer's JSON object; raises as :meth:`text` does."""
        return _object(self.text(method, path, body))

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The JSON objects of a server-sent event stream, as they arrive, up to its end mark.

        Raises as :meth:`text` does, and ``Passing`` when the stream breaks off before its end mark.
        """
        import httpx

        try:
            with self._client.stream("POST", path, json=body) as response:
                if response.status_code >= 300:
                    response.read()
                    self._check(response.status_code, path, response.text)
                for line in response.iter_lines():
                    # other fields of the format (event, id, comments) carry nothing here
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if data == STREAM_END:
                        return
                    if data:
                        yield _object(data)
        except httpx.TimeoutException as error:
            raise Passing(f"no answer within {self.timeout:g} s") from error
        except (httpx.HTTPError, httpx.StreamError, RuntimeError) as error:
            raise Passing(f"the connection broke: {error or type(error).__name__}") from error
        raise Passing("the stream broke off before its end")

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
            raise Passing(f"status {status}")
        if status in FATAL_STATUS:
            raise UserError(f"the server at {self.url} answers {path} with status {status}: {excerpt(text)}")
        if status >= 300:
            raise Refused(f"status {status}: {excerpt(text)}")


def completion_body(request: Request, model: str | None, max_new_tokens: int) -> dict[str, Any]:
    """The body for ``/v1/completions``; every sampling value is named, since servers fill gaps with their own."""
    sampler = request.sampler
    seed = hashlib.sha256(f"{request.key}|{request.seed}".encode()).digest()
    return {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": max_new_tokens,
        "temperature": sampler.temperature,
        "top_p": sampler.top_p,
        "top_k": sampler.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": int.from_bytes(seed[:4], "big") >> 1,
        "stream": False,
        "return_token_ids": True,
        "skip_special_tokens": False,
    }


def completion_tokens(value: dict[str, Any]) -> int | None:
    """The server's own count of output tokens, where the answer has one."""
    usage = value.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) else None


def excerpt(text: str, length: int = 120) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[:length] + "..."


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Passing(f"an answer that is not JSON: {excerpt(text)!r}") from error
    if not isinstance(value, dict):
        raise Passing(f"an answer that is no JSON object: {excerpt(text)!r}")
    return value
