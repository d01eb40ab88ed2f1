"""Regeneration through an OpenAI-compatible server: token ids in, token ids out.

Prompts go to ``/v1/completions`` as token ids, so that the server's chat template plays no part. vLLM gives token
ids back (``return_token_ids``). From a server that does not, text is encoded again only where that is exact.

An end token is never guessed. It is the last id, or the one that the server names (``stop_reason``, SGLang's
``matched_stop``), or the target's only one. Where none of that holds the response ends with its last known token and
keeps its finish reason: all it says is the target's, and the draft learns nothing of its end.

Transient faults (refused connections, time-outs, status 429 and 5xx, answers that make no sense) are tried again
with exponential backoff. Once a whole row of requests has used up its attempts, the server counts as gone: the run
stops with what it has, and the same command goes on from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from difflib import SequenceMatcher
from itertools import islice
from typing import Any, TypeVar

from redraft.data.generate import Completion, Request
from redraft.data.store import FINISH_REASONS, Failure
from redraft.data.transport import (
    Connection,
    Refused,
    Transient,
    answer_ids,
    check_prompt,
    completion_body,
    counted,
    excerpt,
    first_choice,
)
from redraft.errors import UserError

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

LONGEST_PAUSE = 30.0
# A server's text against its ids: characters that are compared, those that a comparison needs, and the share alike.
COMPARED, TELLING, ALIKE = 200, 12, 0.5


class ServerEngine:
    """Answers requests through a server at ``url`` (with or without ``/v1``).

    ``model`` is the served name; without it the server is asked and must serve exactly one. ``concurrency`` requests
    are under way at a time; each has ``timeout`` seconds an attempt and ``attempts`` attempts, with pauses of
    ``backoff`` seconds, doubled every time. Ids from ``vocab_size`` on are no answer; without it those that the
    tokenizer does not know.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        concurrency: int = 32,
        timeout: float = 300.0,
        attempts: int = 5,
        backoff: float = 0.5,
        vocab_size: int | None = None,
    ) -> None:
        self._connection = Connection(url, concurrency, timeout)
        self.url = self._connection.url
        self.model, self.concurrency = model, concurrency
        self.attempts, self.backoff, self.vocab_size = attempts, backoff, vocab_size
        self._stop = threading.Event()

    def answer(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        tokenizer: Any,
        eos_ids: Sequence[int],
        among: Sequence[Request] = (),
        features: bool = False,
    ) -> Iterator[Completion | Failure]:
        """Answer the requests as the server finishes them; a request that fails for good comes as a ``Failure``.

        ``among`` plays no part: how requests are batched is the server's own affair. Neither does ``features``: a
        server gives none.
        Raises ``UserError`` when the server cannot be reached at all, knows no such model, or stops answering.
        """

        def attempt(request: Request) -> Completion:
            body = completion_body(request, self.model, max_new_tokens)
            value = self._connection.json("POST", "/v1/completions", body)
            # all that a draft learns of such a response is right; of its end it learns nothing
            limits = (max_new_tokens, tokenizer, eos_ids, self.vocab_size)
            return read_completion(value, request, *limits, open_end=True)

        yield from self.ask([(request.key, request) for request in requests], attempt)

    def ask(self, items: Sequence[tuple[str, Item]], attempt: Callable[[Item], Outcome]) -> Iterator[Outcome | Failure]:
        """What ``attempt`` makes of every (key, item), or a failure, ``concurrency`` at a time, as they finish.

        Raises ``UserError`` as :meth:`answer` does: as many given up in a row as are under way at a time mean that the
        server is gone.
        """
        if not items:
            return
        self._stop.clear()
        self._connection.open()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="redraft-server")
        waiting, running = iter(items), set[Future[Outcome | Failure]]()
        given_up = 0
        try:
            self.model = self.model or self._served_model()
            while True:
                for key, item in islice(waiting, self.concurrency - len(running)):
                    running.add(pool.submit(self._try, key, item, attempt))
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
            self._connection.close()

    # -- one request -------------------------------------------------------------------------------------------------
    def _try(self, key: str, item: Item, attempt: Callable[[Item], Outcome]) -> Outcome | Failure:
        try:
            return self._persist(lambda: attempt(item))
        except Refused as error:
            return Failure(key, str(error))
        except Transient as error:
            return Failure(key, f"{error}, {self.attempts} attempts", permanent=False)

    def _persist(self, attempt: Callable[[], Outcome]) -> Outcome:
        """The attempt's result; it is repeated with growing pauses while it raises ``Transient``."""
        for number in range(self.attempts):
            try:
                return attempt()
            except Transient:
                pause = min(LONGEST_PAUSE, self.backoff * 2**number)
                if number + 1 == self.attempts or self._stop.wait(pause):
                    raise
        raise AssertionError("a server engine needs at least one attempt")

    def _served_model(self) -> str:
        try:
            names = self._persist(self._connection.served_models)
        except (Transient, Refused) as error:
            raise UserError(f"the server at {self.url} cannot be used: {error}; is it up?") from error
        return self._connection.the_model(names)


# -- answers ---------------------------------------------------------------------------------------------------------
def read_completion(
    value: dict[str, Any],
    request: Request,
    max_new_tokens: int,
    tokenizer: Any,
    eos_ids: Sequence[int],
    vocab_size: int | None = None,
    open_end: bool = False,
) -> Completion:
    """The completion in a server's answer; ids must lie below ``vocab_size`` (by default the tokenizer's).

    With ``open_end`` a response whose end token nobody names comes without one; else it is refused. Raises
    ``Transient`` for an answer that makes no sense, ``Refused`` when text cannot be turned back into exact token ids,
    ``UserError`` when the server did not take the prompt as it was sent.
    """
    choice = first_choice(value)
    if choice is None:
        raise Transient(f"an answer without choices: {excerpt(str(value))!r}")
    reason = choice.get("finish_reason")
    if reason not in FINISH_REASONS:
        raise Transient(f"an answer with the finish reason {excerpt(repr(reason))}")
    check_prompt(choice, value, request)
    ids = answer_ids(choice)
    if ids is None:
        if isinstance(_stopped_at(choice), str):
            raise Refused("the server cut the text at a stop string, so its last tokens are lost; start it without any")
        ids = exact_ids(choice.get("text"), counted(value, "completion_tokens", max_new_tokens + 1), reason, tokenizer)
    if len(ids) > max_new_tokens + 1:
        raise Transient(f"an answer of {len(ids)} tokens where at most {max_new_tokens} were asked for")
    ids, reason = _ended(ids, reason, choice, eos_ids)
    if reason == "stop" and ids[-1] not in (*eos_ids, _stopped_at(choice)) and not open_end:
        raise Refused(f"the server does not say at which of the end tokens {', '.join(map(str, eos_ids))} it stopped")
    size = len(tokenizer) if vocab_size is None else vocab_size
    wrong = next((i for i in ids if not 0 <= i < size), None)
    if wrong is not None:
        raise Transient(f"an answer with token id {excerpt(str(wrong))}, and the target's vocabulary has {size}")
    _check_vocabulary(choice.get("text"), ids, tokenizer)
    # A response that ends exactly at the limit may come without its end token; the limit is what ended it then.
    return Completion(request, ids[:max_new_tokens], reason if len(ids) <= max_new_tokens else "length")


def _ended(ids: list[int], reason: str, choice: dict[str, Any], eos_ids: Sequence[int]) -> tuple[list[int], str]:
    """The ids with the response's end, as far as it is known, and the finish reason. See the module's text.

    What a server writes behind one of the target's end tokens is no part of the response.
    """
    found = next((n for n, i in enumerate(ids) if i in eos_ids), None)
    if found is not None:
        return ids[: found + 1], "stop"
    if reason == "stop":
        end = _stopped_at(choice)
        if end is None and len(eos_ids) == 1:
            end = int(eos_ids[0])
        if isinstance(end, int) and ids[-1:] != [end]:
            ids = [*ids, end]
    if not ids and reason == "stop":
        raise Refused(
            "an empty answer, and the server does not say which end token it is; use one that gives token ids"
        )
    if not ids:
        raise Transient("an answer of 0 tokens")
    return ids, reason


def exact_ids(text: Any, completion_tokens: int | None, reason: str, tokenizer: Any) -> list[int]:
    """Token ids of a response that came as text, where they can be had exactly.

    The text must survive encoding and decoding, and where the server counted its tokens the count must agree (with
    or without the end token). Raises ``Refused`` otherwise.
    """
    if not isinstance(text, str):
        raise Transient("an answer with neither token ids nor text")
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    counts = {len(ids), len(ids) + 1} if reason == "stop" else {len(ids)}
    # U+FFFD stands for bytes that did not make a character: what they were is lost
    exact = "\ufffd" not in text and tokenizer.decode(ids, skip_special_tokens=False) == text
    if not exact or (completion_tokens is not None and completion_tokens not in counts):
        raise Refused(
            "the server gives no token ids and its text does not lead back to them exactly; "
            "use a server with return_token_ids, such as vLLM"
        )
    return ids


def _check_vocabulary(text: Any, ids: list[int], tokenizer: Any) -> None:
    """Raise ``Refused`` where a server's text is not what its ids say: they are of another model's vocabulary.

    Servers differ in blanks, special tokens and the text of the end, so letters are compared, and loosely.
    """
    said = _letters(text)[:COMPARED] if isinstance(text, str) else ""
    if len(said) < TELLING:
        return
    for skipped in (True, False):
        read = _letters(tokenizer.decode(ids, skip_special_tokens=skipped))[: len(said)]
        if read == said or SequenceMatcher(None, said, read, autojunk=False).ratio() >= ALIKE:
            return
    raise Refused(
        f"the server's text {excerpt(str(text), 40)!r} is not what its token ids say with the target's tokenizer "
        f"({excerpt(tokenizer.decode(ids), 40)!r}): its model has another vocabulary; serve the target"
    )


def _letters(text: str) -> str:
    return "".join(character for character in text if character.isalpha())


def _stopped_at(choice: dict[str, Any]) -> int | str | None:
    """The token id or the stop string that the server says it stopped at; None where it says nothing."""
    for name in ("stop_reason", "matched_stop"):  # vLLM and TensorRT-LLM, SGLang
        found = choice.get(name)
        if isinstance(found, int | str) and not isinstance(found, bool):
            return found
    return None
