"""Regeneration through an OpenAI-compatible server: token ids in, token ids out.

Prompts go to ``/v1/completions`` as token ids, so that the server's chat template plays no part. vLLM gives token
ids back (``return_token_ids``). From a server that does not, text is encoded again only where that is exact.

Faults that may pass (refused connections, time-outs, status 429 and 5xx, answers that make no sense) are tried again
with exponential backoff. Once a whole row of requests has used up its attempts, the server counts as gone: the run
stops with what it has, and the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from redraft.data.generate import Completion, Request
from redraft.data.store import FINISH_REASONS, Failure
from redraft.errors import UserError

RETRIED_STATUS = frozenset({408, 425, 429})
FATAL_STATUS = frozenset({401, 403, 404, 405, 501})
LONGEST_PAUSE = 30.0


class _Passing(Exception):
    """A fault that the next attempt may not meet."""


class _Refused(Exception):
    """This request cannot be answered, however often it is asked."""


class ServerEngine:
    """Answers requests through a server at ``url`` (with or without ``/v1``).

    ``model`` is the served name; without it the server is asked and must serve exactly one. ``concurrency`` requests
    are under way at a time; each has ``timeout`` seconds an attempt and ``attempts`` attempts, with pauses of
    ``backoff`` seconds, doubled every time. ``api_key`` is sent as a bearer token.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        concurrency: int = 32,
        timeout: float = 300.0,
        attempts: int = 5,
        backoff: float = 0.5,
        api_key: str | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"server {url!r} is no address; write it like http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model, self.concurrency, self.timeout = model, concurrency, timeout
        self.attempts, self.backoff = attempts, backoff
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._stop = threading.Event()
        self._client: Any = None

    def answer(
        self, requests: Sequence[Request], max_new_tokens: int, tokenizer: Any, eos_ids: Sequence[int]
    ) -> Iterator[Completion | Failure]:
        """Answer the requests as the server finishes them; a request that fails for good comes as a ``Failure``.

        Raises ``UserError`` when the server cannot be reached at all, knows no such model, or stops answering.
        """
        if not requests:
            return
        self._stop.clear()
        self._client = self._connect()
        try:
            if self.model is None:
                self.model = self._served_model()

            def job(request: Request) -> Completion | Failure:
                return self._answer(request, max_new_tokens, tokenizer, eos_ids)

            yield from self._all(requests, job)
        finally:
            self._stop.set()
            self._client.close()

    def _all(
        self, requests: Sequence[Request], job: Callable[[Request], Completion | Failure]
    ) -> Iterator[Completion | Failure]:
        """Run the jobs, ``concurrency`` at a time. As many given up in a row mean that the server is gone."""
        waiting, running = iter(requests), set[Future[Completion | Failure]]()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="redraft-server")
        given_up = 0
        try:
            while True:
                while len(running) < self.concurrency and (request := next(waiting, None)) is not None:
                    running.add(pool.submit(job, request))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    outcome = future.result()
                    gone = isinstance(outcome, Failure) and not outcome.permanent
                    given_up = given_up + 1 if gone else 0
                    yield outcome
                    if given_up >= self.concurrency and isinstance(outcome, Failure):
                        raise UserError(f"the server at {self.url} stopped answering ({outcome.reason})")
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    # -- one request -------------------------------------------------------------------------------------------------
    def _answer(
        self, request: Request, max_new_tokens: int, tokenizer: Any, eos_ids: Sequence[int]
    ) -> Completion | Failure:
        body = self._body(request, max_new_tokens)

        def attempt() -> Completion:
            value = self._send("POST", "/v1/completions", body)
            return read_completion(value, request, max_new_tokens, tokenizer, eos_ids)

        try:
            return self._persist(attempt)
        except _Refused as error:
            return Failure(request.key, str(error))
        except _Passing as error:
            return Failure(request.key, f"{error}, {self.attempts} attempts", permanent=False)

    def _persist(self, attempt: Callable[[], Any]) -> Any:
        """The attempt's result; it is repeated with growing pauses while it raises ``_Passing``."""
        for number in range(self.attempts):
            try:
                return attempt()
            except _Passing:
                pause = min(LONGEST_PAUSE, self.backoff * 2**number)
                if number + 1 == self.attempts or self._stop.wait(pause):
                    raise
        raise AssertionError("a server engine needs at least one attempt")

    def _body(self, request: Request, max_new_tokens: int) -> dict[str, Any]:
        """Every sampling value is named, since servers fill gaps with defaults of their own or of the model."""
        sampler = request.sampler
        seed = hashlib.sha256(f"{request.key}|{request.seed}".encode()).digest()
        return {
            "model": self.model,
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

    # -- transport ---------------------------------------------------------------------------------------------------
    def _connect(self) -> Any:
        try:
            import httpx
        except ImportError as error:
            raise UserError("talking to a server needs the package httpx: pip install redraft[vllm-client]") from error
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        timeout = httpx.Timeout(self.timeout, connect=min(10.0, self.timeout))
        return httpx.Client(base_url=self.url, headers=self._headers, limits=limits, timeout=timeout)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        import httpx

        try:
            response = self._client.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise _Passing(f"no answer within {self.timeout:g} s") from error
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed under this thread
            raise _Passing(f"no connection: {error or type(error).__name__}") from error
        status = response.status_code
        if status >= 500 and status not in FATAL_STATUS or status in RETRIED_STATUS:
            raise _Passing(f"status {status}")
        if status in FATAL_STATUS:
            raise UserError(f"the server at {self.url} answers {path} with status {status}: {_excerpt(response.text)}")
        if status >= 300:
            raise _Refused(f"status {status}: {_excerpt(response.text)}")
        try:
            value = response.json()
        except ValueError as error:
            raise _Passing(f"an answer that is not JSON: {_excerpt(response.text)!r}") from error
        if not isinstance(value, dict):
            raise _Passing(f"an answer that is no JSON object: {_excerpt(response.text)!r}")
        return value

    def _served_model(self) -> str:
        try:
            value = self._persist(lambda: self._send("GET", "/v1/models"))
            names = [str(entry["id"]) for entry in value["data"]]
        except (_Passing, _Refused) as error:
            raise UserError(f"the server at {self.url} cannot be used: {error}; is it up?") from error
        except (KeyError, TypeError) as error:
            raise UserError(f"the server at {self.url} does not list its models; name the model") from error
        if len(names) != 1:
            raise UserError(f"the server at {self.url} serves {', '.join(names) or 'no model'}; name one of them")
        return names[0]


# -- answers ---------------------------------------------------------------------------------------------------------
def read_completion(
    value: dict[str, Any], request: Request, max_new_tokens: int, tokenizer: Any, eos_ids: Sequence[int]
) -> Completion:
    """The completion in a server's answer.

    Raises ``_Passing`` for an answer that makes no sense, ``_Refused`` when text cannot be turned back into exact
    token ids, ``UserError`` when the server did not take the prompt as it was sent.
    """
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise _Passing(f"an answer without choices: {_excerpt(str(value))!r}")
    reason = choice.get("finish_reason")
    if reason not in FINISH_REASONS:
        raise _Passing(f"an answer with the finish reason {reason!r}")
    echoed = choice.get("prompt_token_ids", value.get("prompt_token_ids"))
    if echoed is not None and list(echoed) != list(request.prompt_ids):
        raise UserError("the server changed the prompt's token ids; turn off whatever adds tokens to prompts there")
    ids = choice.get("token_ids")
    if ids is None:
        ids = exact_ids(choice.get("text"), _completion_tokens(value), reason, tokenizer)
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise _Passing("an answer whose token ids are no list of numbers")
    if reason == "stop" and not (ids and ids[-1] in eos_ids):
        ids = [*ids, _end_token(choice, tokenizer, eos_ids)]
    if not ids or len(ids) > max_new_tokens + 1:
        raise _Passing(f"an answer of {len(ids)} tokens where at most {max_new_tokens} were asked for")
    # A response that ends exactly at the limit may come without its end token; the limit is what ended it then.
    return Completion(request, ids[:max_new_tokens], reason if len(ids) <= max_new_tokens else "length")


def exact_ids(text: Any, completion_tokens: int | None, reason: str, tokenizer: Any) -> list[int]:
    """Token ids of a response that came as text, where they can be had exactly.

    The text must survive encoding and decoding, and where the server counted its tokens the count must agree (with
    or without the end token). Raises ``_Refused`` otherwise.
    """
    if not isinstance(text, str):
        raise _Passing("an answer with neither token ids nor text")
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    counts = {len(ids), len(ids) + 1} if reason == "stop" else {len(ids)}
    # U+FFFD stands for bytes that did not make a character: what they were is lost
    exact = "\ufffd" not in text and tokenizer.decode(ids, skip_special_tokens=False) == text
    if not exact or (completion_tokens is not None and completion_tokens not in counts):
        raise _Refused(
            "the server gives no token ids and its text does not lead back to them exactly; "
            "use a server with return_token_ids, such as vLLM"
        )
    return ids


def _completion_tokens(value: dict[str, Any]) -> int | None:
    usage = value.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def _end_token(choice: dict[str, Any], tokenizer: Any, eos_ids: Sequence[int]) -> int:
    """The end token that the server left out of the ids."""
    named = choice.get("stop_reason")
    if isinstance(named, int) and not isinstance(named, bool):
        return named
    if len(eos_ids) == 1:
        return int(eos_ids[0])
    return int(tokenizer.eos_token_id)


def _excerpt(text: str, length: int = 120) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[:length] + "..."
