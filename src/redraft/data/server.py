"""Regeneration through an OpenAI-compatible server: token ids in, token ids out.

Prompts go to ``/v1/completions`` as token ids, so that the server's chat template plays no part. vLLM gives token
ids back (``return_token_ids``). From a server that does not, text is encoded again only where that is exact.

An end token is never guessed. It is the last id, or the one that the server names (``stop_reason``, SGLang's
``matched_stop``), or the target's only one. Where none of that holds the response ends with its last known token and
keeps its finish reason: all it says is the target's, and the draft learns nothing of its end.

Transient faults (refused connections, time-outs, status 429 and 5xx, answers that make no sense) are tried again with
exponential backoff. Once a whole row of requests has used up its attempts, the server counts as gone: the run stops.

Top log-probabilities of stored responses: the server scores prompt and response as one prompt (``prompt_logprobs``), so
the figures are those of the stored tokens, whoever wrote them. They are kept beside the response file as JSON lines,
``{"key": ..., "top": [[ids], [log-probabilities]]}``, with an entry for every response token after the first, that
token always among them.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from redraft.data import transport
from redraft.data.generate import Completion, Request
from redraft.data.store import FINISH_REASONS, Failure, Row
from redraft.data.transport import Connection, Refused, Transient, excerpt
from redraft.errors import UserError
from redraft.inputs import json_lines, there

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

LONGEST_PAUSE = 30.0
# A server's text against its ids: characters that are compared, those that a comparison needs, and the share alike.
COMPARED, TELLING, ALIKE = 200, 12, 0.5
# Rounding may lift the logarithm of a certain token a little above zero.
MOST_LOGPROB = 1e-2

Top = tuple[list[list[int]], list[list[float]]]
"""Token ids and log-probabilities for every response token after the first."""


@dataclass
class ServerEngine:
    """Answers requests through a server at ``url`` (with or without ``/v1``).

    ``model`` is the served name; without it the server is asked and must serve exactly one. ``concurrency`` requests
    are under way at a time; each has ``timeout`` seconds an attempt and ``attempts`` attempts, with pauses of
    ``backoff`` seconds, doubled every time. Ids from ``vocab_size`` on are no answer; without it those that the
    tokenizer does not know.
    """

    url: str
    model: str | None = None
    concurrency: int = 32
    timeout: float = 300.0
    attempts: int = 5
    backoff: float = 0.5
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        self._connection = Connection(self.url, self.concurrency, self.timeout)
        self.url, self._stop = self._connection.url, threading.Event()

    def answer(
        self, requests: Sequence[Request], max_new_tokens: int, tokenizer: Any, eos_ids: Sequence[int], **_: Any
    ) -> Iterator[Completion | Failure]:
        """Answer the requests as the server finishes them; a request that fails for good comes as a ``Failure``.

        What else an engine is told plays no part: batches are the server's own affair, and features it gives none.
        Raises ``UserError`` when the server cannot be reached at all, knows no such model, or stops answering.
        """

        def attempt(request: Request) -> Completion:
            value = self.complete(transport.completion_body(request, self.model, max_new_tokens))
            # all that a draft learns of such a response is right; of its end it learns nothing
            limits = (max_new_tokens, tokenizer, eos_ids, self.vocab_size)
            return read_completion(value, request, *limits, open_end=True)

        yield from self.ask([(request.key, request) for request in requests], attempt)

    def ask(self, items: Sequence[tuple[str, Item]], attempt: Callable[[Item], Outcome]) -> Iterator[Outcome | Failure]:
        """What ``attempt`` makes of every (key, item), or a failure, ``concurrency`` at a time, as they finish.

        Raises ``UserError`` as :meth:`answer` does: as many given up in a row as are under way mean that the server is
        gone.
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
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the server makes of a body for ``/v1/completions``. Raises as :meth:`Connection.json`."""
        return self._connection.json("POST", "/v1/completions", {"model": self.model, **body})

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
    choice = transport.first_choice(value)
    if choice is None:
        raise Transient(f"an answer without choices: {excerpt(str(value))!r}")
    reason = choice.get("finish_reason")
    if reason not in FINISH_REASONS:
        raise Transient(f"an answer with the finish reason {excerpt(repr(reason))}")
    transport.check_prompt(choice, value, request)
    ids = transport.answer_ids(choice)
    if ids is None:
        if isinstance(_stopped_at(choice), str):
            raise Refused("the server cut the text at a stop string, so its last tokens are lost; start it without any")
        ids = exact_ids(
            choice.get("text"), transport.counted(value, "completion_tokens", max_new_tokens + 1), reason, tokenizer
        )
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
    """The ids with the response's end, as far as it is known, and the finish reason. See the module's text. What a
    server writes behind one of the target's end tokens is no part of the response."""
    found = next((n for n, i in enumerate(ids, 1) if i in eos_ids), None)
    if found is not None:
        return ids[:found], "stop"
    if reason == "stop":
        end = _stopped_at(choice)
        if end is None and len(eos_ids) == 1:
            end = int(eos_ids[0])
        if isinstance(end, int) and ids[-1:] != [end]:
            ids = [*ids, end]
        if not ids:
            raise Refused(
                "an empty answer, and the server does not say which end token it is; use one that gives token ids"
            )
    if not ids:
        raise Transient("an answer of 0 tokens")
    return ids, reason


def exact_ids(text: Any, completion_tokens: int | None, reason: str, tokenizer: Any) -> list[int]:
    """Token ids of a response that came as text, where they can be had exactly; ``Refused`` otherwise.

    The text must survive encoding and decoding, and a count of the server's must agree (with or without the end token).
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
    """Raise ``Refused`` where a server's text is not what its ids say: they are of another model's vocabulary. Servers
    differ in blanks, special tokens and the text of the end, so letters are compared, and loosely."""
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
    return "".join(filter(str.isalpha, text))


def _stopped_at(choice: dict[str, Any]) -> int | str | None:
    """The token id or the stop string that the server says it stopped at; None where it says nothing."""
    said = (choice.get(name) for name in ("stop_reason", "matched_stop"))  # vLLM and TensorRT-LLM, SGLang
    return next((stop for stop in said if isinstance(stop, int | str) and not isinstance(stop, bool)), None)


# -- log-probabilities -----------------------------------------------------------------------------------------------
def read_tops(value: dict[str, Any], row: Row, url: str) -> Top:
    """The figures in a server's answer. Raises ``UserError`` where it has none, ``Transient`` where they do not fit."""
    choice = transport.first_choice(value)
    if choice is None:
        raise Transient("an answer without choices")
    found = choice.get("prompt_logprobs")
    if found is None:
        raise UserError(
            f"the server at {url} gives no log-probabilities of a prompt; use one that does (vLLM), or train on its "
            "answers alone with --teacher tokens"
        )
    begin, end = len(row.prompt_ids) + 1, len(row.prompt_ids) + len(row.response_ids)
    try:
        entries = [{int(i): float(entry["logprob"]) for i, entry in place.items()} for place in found[begin:end]]
        if any(i < 0 or x > MOST_LOGPROB for entry in entries for i, x in entry.items()):
            raise ValueError
    except (TypeError, ValueError, OverflowError, AttributeError, KeyError):
        raise Transient("log-probabilities in no known form") from None
    # JSON has no infinity: a token that cannot be comes as the least number there is, or not at all.
    likely = [{i: x for i, x in entry.items() if math.isfinite(x)} for entry in entries]
    if len(likely) != len(row.response_ids) - 1 or not all(likely):
        raise Transient(f"log-probabilities of {len(likely)} tokens where {len(row.response_ids) - 1} were asked for")
    return [list(entry) for entry in likely], [list(entry.values()) for entry in likely]


def read_top_file(path: Path, rows: Sequence[Row]) -> dict[str, Top]:
    """The figures stored for ``rows``; a torn last line is left out. Raises ``UserError`` for any other damage."""
    counts = {row.key: len(row.response_ids) - 1 for row in rows}
    found: dict[str, Top] = {}
    for number, value in json_lines(path, torn=True) if there(path) else ():
        try:
            if value["key"] in counts:
                found[value["key"]] = parse_top(value["top"], counts[value["key"]])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: {error}; delete the file and run the same command again") from None
    return found


def ask_tops(
    engine: ServerEngine, count: int, rows: Sequence[Row], path: Path, progress: Callable[..., None] | None = None
) -> dict[str, Top]:
    """The ``count`` likeliest tokens at every token of every row, asked for where ``path`` does not have them yet.

    A stopped run goes on. Figures of an id beyond the vocabulary are no answer. Raises ``UserError`` when the server
    gives no log-probabilities, as :meth:`ServerEngine.ask` does, and when any row has none in the end; what came is
    kept.
    """
    size = math.inf if engine.vocab_size is None else engine.vocab_size

    def attempt(row: Row) -> tuple[str, Top]:
        prompt = {"prompt": [*row.prompt_ids, *row.response_ids], "prompt_logprobs": count}
        found = read_tops(engine.complete({"max_tokens": 1, "temperature": 0.0, **prompt}), row, engine.url)
        if (highest := max(map(max, found[0]))) >= size:
            raise Transient(f"log-probabilities of token id {highest}, and the target's vocabulary has {size}")
        return row.key, found

    wanted = {row.key: row for row in rows if len(row.response_ids) > 1}
    stored = read_top_file(path, list(wanted.values()))
    # figures of ids that the target does not have are asked for again
    found = {key: top for key, top in stored.items() if max(map(max, top[0])) < size}
    failures: list[Failure] = []
    with open(path, "w") as file:
        file.writelines(json.dumps({"key": key, "top": top}) + "\n" for key, top in found.items())
        for outcome in engine.ask([item for item in wanted.items() if item[0] not in found], attempt):
            if isinstance(outcome, Failure):
                failures.append(outcome)
                continue
            key, found[outcome[0]] = outcome
            file.write(json.dumps({"key": key, "top": found[key]}) + "\n")
            file.flush()
            if progress:
                progress(len(found))
    if failures:
        raise UserError(
            f"{len(failures)} of {len(wanted)} responses got no log-probabilities, first {failures[0].key}: "
            f"{failures[0].reason}; the same command asks again"
        )
    return found


def parse_top(value: Any, count: int) -> Top:
    """A stored entry ``[[ids], [log-probabilities]]`` of ``count`` positions. Raises ``ValueError``."""
    try:
        ids, values = ([list(row) for row in part] for part in value)
        kinds = {type(i) for row in ids for i in row}, {type(x) for row in values for x in row}
    except (TypeError, ValueError):
        raise ValueError("no lists of ids and log-probabilities") from None
    if not (kinds[0] <= {int} and kinds[1] <= {int, float}):
        raise ValueError("ids that are no whole numbers, or log-probabilities that are no numbers")
    values = [[float(x) for x in row] for row in values]
    whole = len(ids) == len(values) == count and all(len(a) == len(b) > 0 for a, b in zip(ids, values, strict=True))
    if not whole or not all(math.isfinite(x) for row in values for x in row) or any(i < 0 for r in ids for i in r):
        raise ValueError(f"not {count} positions of ids with finite log-probabilities")
    return ids, values
