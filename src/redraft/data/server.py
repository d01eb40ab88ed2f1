"""Regeneration through an OpenAI-compatible server: token ids in, token ids out.

Prompts go to ``/v1/completions`` as token ids, so that the server's chat template plays no part. vLLM gives token
ids back (``return_token_ids``). From a server that does not, text is encoded again only where that is exact.

An end token is never guessed. It is the last id, or the one that the server names (``stop_reason``, SGLang's
``matched_stop``), or the target's only one. Where none of that holds the response ends with its last known token and
keeps its finish reason: all it says is the target's, and the draft learns nothing of its end.

Transient faults (refused connections, time-outs, status 429 and 5xx, answers that make no sense) are tried again with
exponential backoff. A request that has used up its attempts is asked of another server, or listed as failed, and the
others go on; once a whole row of them has, and never one answer alone, the server counts as gone (``pool.py``).

Top log-probabilities of stored responses: the server scores prompt and response as one prompt (``prompt_logprobs``), so
the figures are those of the stored tokens, whoever wrote them. They are kept beside the response file as JSON lines,
``{"key": ..., "top": [[ids], [log-probabilities]]}``, with an entry for every response token after the first, that
token always among them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from redraft.data import transport
from redraft.data.generate import Completion, Request
from redraft.data.pool import Pool, Server
from redraft.data.store import FINISH_REASONS, Failure, Row
from redraft.data.transport import Refused, Transient, Unusable, excerpt, shown
from redraft.errors import UserError
from redraft.files import append_text, atomic_write_text, use_folder
from redraft.inputs import json_lines, there
from redraft.locks import is_helper, lock
from redraft.rows import anchors
from redraft.seals import digest, sealed, unsealed

# A prompt of so many tokens is not what an answer begins with, unless a server put it there.
ECHOED = 8
# A server's text against its ids: characters that are compared, those that a comparison needs, and the share alike.
COMPARED, TELLING, ALIKE = 200, 12, 0.5
# Rounding may lift the logarithm of a certain token a little above zero.
MOST_LOGPROB = 1e-2
TOPS = "redraft.tops/1"

Top = tuple[list[list[int]], list[list[float]]]
"""Token ids and log-probabilities for every response token after the first."""


class ServerEngine(Pool):
    """Answers requests through the server at ``url``, or those at several (:class:`~redraft.data.pool.Pool`, whose
    settings it takes). Ids from ``vocab_size`` on are no answer; without it those that the tokenizer does not know.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        model: str | None = None,
        concurrency: int = 32,
        vocab_size: int | None = None,
        **how: Any,
    ) -> None:
        super().__init__([url] if isinstance(url, str) else url, model, concurrency, **how)
        self.vocab_size = vocab_size

    def answer(
        self, requests: Sequence[Request], max_new_tokens: int, tokenizer: Any, eos_ids: Sequence[int], **_: Any
    ) -> Iterator[Completion | Failure]:
        """Answer the requests as servers finish them; a request that fails for good comes as a ``Failure``.

        What else an engine is told plays no part: batches are a server's own affair, and features it gives none.
        Raises ``UserError`` when no server can be reached at all, one knows no such model, or all stop answering.
        """

        def attempt(request: Request, server: Server) -> Completion:
            value = server.complete(transport.completion_body(request, server.model, max_new_tokens))
            # all that a draft learns of such a response is right; of its end it learns nothing
            limits = (max_new_tokens, tokenizer, eos_ids, self.vocab_size)
            return read_completion(value, request, *limits, open_end=True)

        yield from self.ask([(request.key, request) for request in requests], attempt)


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
        raise Transient(f"an answer without choices: {shown(value)!r}")
    reason = choice.get("finish_reason")
    if reason not in FINISH_REASONS:
        raise Transient(f"an answer with the finish reason {shown(reason)}")
    transport.check_prompt(choice, value, request)
    ids, text = transport.answer_ids(choice), transport.answer_text(choice)
    count = transport.counted(value, "completion_tokens", max_new_tokens + 1)
    if ids is not None:
        transport.check_count(count, ids, reason == "stop", eos_ids)
    else:
        if isinstance(_stopped_at(choice), str):
            raise Refused("the server cut the text at a stop string, so its last tokens are lost; start it without any")
        ids = exact_ids(choice.get("text"), count, reason, tokenizer)
    if len(ids) > max_new_tokens + 1:
        raise Transient(f"an answer of {len(ids)} tokens where at most {max_new_tokens} were asked for")
    if len(request.prompt_ids) >= ECHOED and ids[: len(request.prompt_ids)] == list(request.prompt_ids):
        raise Transient("an answer that begins with its prompt")
    ids, reason = _ended(ids, reason, choice, eos_ids)
    if reason == "stop" and ids[-1] not in (*eos_ids, _stopped_at(choice)) and not open_end:
        raise Refused(f"the server does not say at which of the end tokens {', '.join(map(str, eos_ids))} it stopped")
    size = len(tokenizer) if vocab_size is None else vocab_size
    wrong = next((i for i in ids if not 0 <= i < size), None)
    if wrong is not None:
        raise Transient(f"an answer with token id {shown(wrong)}, and the target's vocabulary has {size}")
    _check_vocabulary(text, ids, tokenizer)
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


def _check_vocabulary(text: str, ids: list[int], tokenizer: Any) -> None:
    """Raise ``Refused`` where a server's text is not what its ids say: they are of another model's vocabulary. Servers
    differ in blanks, special tokens and the text of the end, so letters are compared, and loosely."""
    said = _letters(text)[:COMPARED]
    if len(said) < TELLING:
        return
    for skipped in (True, False):
        read = _letters(tokenizer.decode(ids, skip_special_tokens=skipped))[: len(said)]
        if read == said or SequenceMatcher(None, said, read, autojunk=False).ratio() >= ALIKE:
            return
    raise Refused(
        f"the server's text {excerpt(text, 40)!r} is not what its token ids say with the target's tokenizer "
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
    """The figures in a server's answer. Raises ``Unusable`` where it has none, ``Transient`` where they do not fit."""
    choice = transport.first_choice(value)
    if choice is None:
        raise Transient("an answer without choices")
    found = choice.get("prompt_logprobs")
    if found is None:
        raise Unusable(
            f"the server at {url} gives no log-probabilities of a prompt; use one that does (vLLM), or train on its "
            "answers alone with --teacher tokens"
        )
    begin, end = len(row.prompt_ids) + 1, len(row.prompt_ids) + len(row.response_ids)
    try:
        entries = [{int(i): _number(entry["logprob"]) for i, entry in place.items()} for place in found[begin:end]]
        if any(i < 0 or x > MOST_LOGPROB for entry in entries for i, x in entry.items()):
            raise ValueError
    except (TypeError, ValueError, OverflowError, AttributeError, KeyError):
        raise Transient("log-probabilities in no known form") from None
    # JSON has no infinity: a token that cannot be comes as the least number there is, or not at all.
    likely = [{i: x for i, x in entry.items() if math.isfinite(x)} for entry in entries]
    if len(likely) != len(row.response_ids) - 1 or not all(likely):
        raise Transient(f"log-probabilities of {len(likely)} tokens where {len(row.response_ids) - 1} were asked for")
    if any(token not in entry for token, entry in zip(row.response_ids[1:], likely, strict=True)):
        raise Transient("log-probabilities without those of the tokens that were sent: they are of another text")
    if any(sum(map(math.exp, entry.values())) > 1 + MOST_LOGPROB for entry in likely):
        raise Transient("log-probabilities of more than one in all")
    return [list(entry) for entry in likely], [list(entry.values()) for entry in likely]


def _number(value: Any) -> float:
    """A log-probability; JSON's null stands for one that is minus infinity. Raises ``TypeError`` for no number."""
    if value is None:
        return -math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)


def read_top_file(path: Path, rows: Sequence[Row]) -> dict[str, Top]:
    """The figures stored for ``rows``; a torn last line is left out. Raises ``UserError`` for any other damage."""
    counts = {row.key: anchors(row) for row in rows}
    marks = {row.key: row_mark(row) for row in rows}
    found: dict[str, Top] = {}
    mend = "delete the file and run the same command again"
    for number, value in json_lines(path, torn=True) if there(path) else ():
        try:
            if not isinstance(value, dict):
                raise ValueError("no JSON object")
            value = unsealed(value, f"{path}:{number}", mend, TOPS, marks.get(value.get("key", "")))
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
    gives no log-probabilities, as :meth:`Pool.ask` does, and when any row has none after it was asked for
    again; what came is kept.
    """
    size = math.inf if engine.vocab_size is None else engine.vocab_size

    def attempt(row: Row, server: Server) -> tuple[str, Top]:
        prompt = {"prompt": [*row.prompt_ids, *row.response_ids], "prompt_logprobs": count}
        found = read_tops(server.complete({"max_tokens": 1, "temperature": 0.0, **prompt}), row, server.url)
        if (highest := max(map(max, found[0]))) >= size:
            raise Transient(f"log-probabilities of token id {highest}, and the target's vocabulary has {size}")
        return row.key, found

    wanted = {row.key: row for row in rows if anchors(row)}
    use_folder(path.parent)
    taken = None if is_helper() else lock(path.with_name(f".{path.name}.lock"), f"file of log-probabilities {path}")
    try:
        stored = read_top_file(path, list(wanted.values()))
        # figures of ids that the target does not have are asked for again
        found = {key: top for key, top in stored.items() if max(map(max, top[0])) < size}
        whole = "".join(top_line(wanted[key], top) for key, top in found.items())
        if not path.exists() or path.read_text() != whole:
            atomic_write_text(path, whole)
        failures: list[Failure] = []
        for _ in range(2):  # what was refused once is asked for again at the end: all of it is needed
            failures = []
            for outcome in engine.ask([item for item in wanted.items() if item[0] not in found], attempt):
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                    continue
                key, found[outcome[0]] = outcome
                append_text(path, top_line(wanted[key], found[key]))
                if progress:
                    progress(len(found))
    finally:
        if taken is not None:
            taken.release()
    if failures:
        raise UserError(
            f"{len(failures)} of {len(wanted)} responses got no log-probabilities, first {failures[0].key}: "
            f"{failures[0].reason}; the same command asks again"
        )
    return found


def top_line(row: Row, top: Top) -> str:
    """The line of a row's figures, sealed for the tokens that they belong to."""
    return json.dumps(sealed({"key": row.key, "top": top}, TOPS, row_mark(row))) + "\n"


def row_mark(row: Row) -> str:
    """What a row's figures belong to: its tokens."""
    return digest([row.prompt_ids, row.response_ids])


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
