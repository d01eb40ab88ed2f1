"""Served traffic in place of generation: responses that the target has already given, read from a log.

A log is a file of JSON lines or one JSON array (``.gz`` too), one served response a record, in one of three shapes:

- ``prompt_ids`` and ``response_ids``, or vLLM's names ``prompt_token_ids`` and ``token_ids``: token ids as the engine
  had them. The best there is: nothing is tokenised again. A ``choices`` or ``outputs`` list of one entry, as vLLM's
  server and its offline engine give them, may hold the response.
- ``messages`` that end with the assistant's answer, or with a user turn (or a tool's result) and the answer as
  ``completion`` (or ``response``): through the target's chat template. Only the last answer counts as served; what
  stands before it is its prompt. A log of whole conversations needs one record an answer.
- ``prompt`` and ``completion``: raw text as the engine had it, chat markup included.

In the two last, a ``choices`` list of one entry with ``message`` or ``text``, as OpenAI-compatible servers answer, does
for the completion. Tools and template arguments of the request stand beside the messages (docs/text.md).

Beside them, all optional: ``id``; ``finish_reason`` (``length`` for an answer that was cut off, so that no end token is
put behind it); ``stop_reason`` (vLLM's: the token, or the text, that ended it); ``usage``, whose token counts must
agree with ours; ``created``, the time of serving, which a template that writes the date needs; ``temperature``,
``top_k``, ``top_p`` as sampled with; ``target_hash``. Text is used only where it comes through the tokenizer
unchanged: text that does not was written by other tokens than we would train on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from redraft.data.answers import answer_ids, continuation_ids
from redraft.data.prompts import file_items, stem_of
from redraft.data.shapes import TURN_KEYS, id_of, parse_conversation
from redraft.data.store import TRAFFIC, UNKNOWN, Row, Rows, spooled
from redraft.data.template import at_moment, date_matters
from redraft.data.turns import ASSISTANT, RESULTS, THOUGHTS, USER, excerpt, keys_of, parse_turn
from redraft.errors import UserError
from redraft.settings.sampler import Sampler

PROMPT_KEYS, RESPONSE_KEYS = ("prompt_ids", "prompt_token_ids"), ("response_ids", "token_ids")
TEXT_KEYS = ("completion", "response")
NESTED = ("choices", "outputs")
# How servers call the end of a response: None is an end that is not the end token's.
REASONS: dict[str, str | None] = {
    **dict.fromkeys(("stop", "eos_token", "tool_calls", "function_call"), "stop"),
    "length": "length",
    "stop_sequence": None,
}
# A raw prompt of this many records without a single special token looks like bare user text.
SUSPICIOUS = 0.5
EARLIEST = 2018  # no year of serving lies before it


@dataclass(frozen=True)
class _Reader:
    """What a record is checked against."""

    tokenizer: Any
    target_hash: str
    eos_ids: tuple[int, ...]
    vocab_size: int
    max_new_tokens: int | None
    context: int | None


def read_traces(
    path: str | Path,
    tokenizer: Any,
    target_hash: str,
    *,
    eos_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    max_new_tokens: int | None = None,
    context: int | None = None,
    warn: Callable[[str], None] | None = None,
) -> Rows:
    """Every response of a log as a row of ``source`` ``traffic``, in file order; the same exchange twice counts once.

    ``eos_ids`` are the target's end tokens (the tokenizer's own where none are given), ``vocab_size`` and ``context``
    its limits. Longer answers are cut at ``max_new_tokens``. ``warn`` is told in one line about repeated exchanges,
    and about raw prompts that look as if they had not been through a chat template.

    Raises ``UserError`` with file and line for whatever cannot be what this target served, and for an id that is there
    twice.
    """
    path = Path(path)
    ends = tuple(int(i) for i in eos_ids) or (int(tokenizer.eos_token_id),)
    reader = _Reader(tokenizer, target_hash, ends, vocab_size or len(tokenizer), max_new_tokens, context)
    places: dict[str, str] = {}
    exchanges = set[bytes]()
    records = bare = 0

    def found() -> Iterator[Row]:
        nonlocal records, bare
        for number, place, item in file_items(path):
            records += 1
            try:
                row, looks_bare = _row(reader, item, f"{stem_of(path)}/{number}")
            except (ValueError, UserError) as error:
                raise UserError(f"{place}: {error}") from error
            if row.id in places:
                raise UserError(f"{place}: id {row.id!r} is already at {places[row.id]}; ids must differ")
            places[row.id] = place
            bare += looks_bare
            exchange = hashlib.sha256(repr((row.prompt_ids, row.response_ids)).encode()).digest()
            if exchange not in exchanges:
                exchanges.add(exchange)
                yield row

    rows = spooled(found())
    if not rows:
        raise UserError(f"{path} is empty; it must hold at least one served response")
    if warn and len(rows) < records:
        warn(f"{path}: {records - len(rows)} of {records} records repeat an exchange and are counted once")
    if warn and bare > SUSPICIOUS * records:
        warn(
            f"{path}: {bare} of {records} raw prompts hold no special token; if a chat template stood around them "
            "when they were served, give messages or token ids instead"
        )
    return rows


# -- one record ------------------------------------------------------------------------------------------------------
def _row(reader: _Reader, item: Any, default_id: str) -> tuple[Row, bool]:
    """The row of a record, and whether its prompt is raw text without markup. Raises ``ValueError``, ``UserError``."""
    if not isinstance(item, dict):
        raise ValueError("a record must be a JSON object")
    record = _flat(item)
    if record.get("target_hash") not in (None, reader.target_hash):
        raise ValueError(
            f"served by another target ({record['target_hash']}, this one is {reader.target_hash}); give its own log"
        )
    reason, ended = _reason(record)
    prompt, response, bare = _ids(reader, record, default_id, ended)
    _check_usage(reader, record, prompt, response, ended)
    finish = reason or ("stop" if response[-1] in reader.eos_ids else "length")
    if reader.max_new_tokens is not None and len(response) > reader.max_new_tokens:
        response, finish = response[: reader.max_new_tokens], "length"
    if reader.context is not None and len(prompt) + len(response) > reader.context:
        raise ValueError(
            f"{len(prompt) + len(response)} tokens do not fit into the target's context of {reader.context}, so it "
            "cannot have served them; is this the log of another model?"
        )
    sampler, name = _sampler(record), id_of(record.get(_first(record, "id", "request_id")), default_id)
    return Row.of(name, prompt, response, sampler, finish, reader.target_hash, source=TRAFFIC), bare


def _first(record: dict[str, Any], *keys: str) -> str:
    """The first of the keys under which the record has something; empty where it has none."""
    return next((key for key in keys if record.get(key) is not None), "")


def _flat(item: dict[str, Any]) -> dict[str, Any]:
    """The record with the one entry of its ``choices`` or ``outputs`` list laid over it, and before that a request and
    the server's whole answer, which may stand in keys of their own, as proxies log them."""
    for name in ("request", "response"):
        inner = item.get(name)
        body = inner.get("body", inner) if isinstance(inner, dict) else None
        if isinstance(body, dict) and body.keys() & {"messages", "prompt", *NESTED}:
            item = {key: value for key, value in item.items() if key != name} | body
    if not (name := _first(item, *NESTED)):
        return item
    entries = item[name]
    if not isinstance(entries, list) or len(entries) != 1 or not isinstance(entries[0], dict):
        raise ValueError(f'"{name}" must be a list of one response; write one record a response')
    entry = {key: value for key, value in entries[0].items() if value is not None}
    said = entry.pop("message") if isinstance(entry.get("message"), dict) else entry.get("text")
    return item | entry | ({"completion": said} if isinstance(said, str | dict) else {})


def _reason(record: dict[str, Any]) -> tuple[str | None, bool]:
    """(finish reason as recorded, whether an end token ended the response; true where nobody says, false where a stop
    string did: the model wrote no end token then)."""
    value = record.get("finish_reason")
    value = value.get("type") if isinstance(value, dict) else value  # as SGLang's own interface writes it
    if value is not None and (not isinstance(value, str) or value not in REASONS):
        raise ValueError(f"the finish reason must be one of {', '.join(REASONS)}, not {value!r}")
    reason = "stop" if value is None else REASONS[value]
    if reason is None or any(isinstance(stop, str) and stop for stop in _stops(record)):
        return "length", False
    return (None if value is None else reason), reason == "stop"


def _stops(record: dict[str, Any]) -> list[Any]:
    """What the server says the response stopped at: a token id or a stop string. The names are vLLM's and SGLang's."""
    reason = record.get("finish_reason")
    matched = reason.get("matched") if isinstance(reason, dict) else None
    return [record.get("stop_reason"), record.get("matched_stop"), matched]


def _ids(reader: _Reader, record: dict[str, Any], default_id: str, ended: bool) -> tuple[list[int], list[int], bool]:
    """(prompt ids, response ids, whether the prompt is raw text without markup) of a record of any shape."""
    prompt_key, response_key = _first(record, *PROMPT_KEYS), _first(record, *RESPONSE_KEYS)
    given = [record[key] for key in TEXT_KEYS if isinstance(record.get(key), str | dict)]
    if len(given) > 1 and given[0] != given[1]:
        raise ValueError(f"two answers, in {' and '.join(TEXT_KEYS)}; keep the one that was served")
    said = given[0] if given else None
    if prompt_key and response_key:
        prompt = _checked_ids(record[prompt_key], prompt_key, reader)
        response = _checked_ids(record[response_key], response_key, reader)
        if said is not None:
            _check_spelling(reader, response, said)
        return prompt, response, False
    if prompt_key or response_key:
        have, lack = (prompt_key, RESPONSE_KEYS) if prompt_key else (response_key, PROMPT_KEYS)
        raise ValueError(f'"{have}" without {" or ".join(lack)}; give the token ids of prompt and response')
    if _first(record, *TURN_KEYS) or isinstance(record.get("prompt"), list):
        return *_from_messages(reader, record, default_id, said, ended), False
    if isinstance(record.get("prompt"), str) and isinstance(said, str):
        prompt, response = _from_text(reader, record, said, ended)
        # The first token may be one that the tokenizer puts in front of every text.
        return prompt, response, not set(reader.tokenizer.all_special_ids).intersection(prompt[1:])
    raise ValueError(
        "no prompt_ids and response_ids, no messages that end with an answer, no prompt and completion among its keys: "
        + keys_of(record)
    )


def _from_messages(
    reader: _Reader, record: dict[str, Any], default_id: str, said: str | dict[str, Any] | None, ended: bool
) -> tuple[list[int], list[int]]:
    for turn in next((record[key] for key in TURN_KEYS if isinstance(record.get(key), list)), []):
        if isinstance(turn, dict) and isinstance(turn.get("content"), list) and len(turn["content"]) > 1:
            raise ValueError("a turn's content has several text parts, which engines join differently; log token ids")
    apart = {"id": None} | (dict.fromkeys(TEXT_KEYS) if said is not None else {})
    conversation = parse_conversation(record | apart, default_id)
    messages = conversation.messages
    if said is not None:
        turn = {"content": said} if isinstance(said, str) else said
        thoughts = {key: record[key] for key in THOUGHTS if isinstance(record.get(key), str)}
        messages = [*messages, parse_turn(thoughts | turn | {"role": ASSISTANT})]
    if messages[-1]["role"] != ASSISTANT:
        raise ValueError("the messages end with no answer of the assistant, and there is no completion")
    if len(messages) < 2 or messages[-2]["role"] not in (USER, *RESULTS):
        raise ValueError("the last answer does not stand behind a user turn")
    asked, answer = conversation.turns(messages[:-1]), messages[-1]
    thoughts = answer.get("reasoning_content", "")
    if not answer["content"].strip() and "tool_calls" not in answer and (ended or not thoughts):
        raise ValueError("the last answer is empty")
    _check_round_trip(reader, "answer", answer["content"])
    _check_round_trip(reader, "thoughts of the answer", thoughts)
    dated = date_matters(reader.tokenizer, default_id, asked)
    with at_moment(reader.tokenizer, _served_at(record.get("created")) if dated else None):
        count = _usage(record, "completion_tokens")
        how: dict[str, Any] = {"cut": not ended, "served": True, "counts": [count] if count else []}
        prompt, response, _ = answer_ids(reader.tokenizer, default_id, asked, answer, reader.eos_ids, **how)
    return prompt, _with_named_end(reader, record, response, ended)


def _served_at(created: Any) -> datetime:
    """Unix seconds or an ISO text as the local time. Raises ``ValueError``, also for a time before there were LLMs."""
    if created is None:
        raise ValueError(
            'the chat template writes the date, and this record does not say when it was served; give "created" '
            "(Unix seconds), or log token ids"
        )
    try:
        if isinstance(created, str):
            found = datetime.fromisoformat(created).astimezone().replace(tzinfo=None)
        elif isinstance(created, int | float) and not isinstance(created, bool):
            found = datetime.fromtimestamp(created)
        else:
            raise ValueError("neither a number nor a text")
        if found.year < EARLIEST:
            raise ValueError(f"a time in {found.year}")  # 0 where a server fills in nothing; digits read as a date
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(
            f'"created" is no time of serving, neither Unix seconds nor ISO: {excerpt(created)} ({error}); give the '
            "time, or log token ids"
        ) from error
    return found


def _with_named_end(reader: _Reader, record: dict[str, Any], response: list[int], ended: bool) -> list[int]:
    """The response with the end token that the record names in place of the template's."""
    named = next((stop for stop in _stops(record) if type(stop) is int), None)
    if not ended or named is None:
        return response
    _checked_ids([named], "stop_reason", reader)
    return [*(response[:-1] if response[-1] in reader.eos_ids else response), named]


def _from_text(reader: _Reader, record: dict[str, Any], completion: str, ended: bool) -> tuple[list[int], list[int]]:
    prompt = record["prompt"]
    if apart := next((key for key in (*THOUGHTS, "tool_calls") if record.get(key)), None):
        raise ValueError(
            f'"{apart}" stands apart from a completion of raw text, so the text that the model wrote cannot be told; '
            "give messages or token ids"
        )
    if not prompt or not completion:
        raise ValueError("an empty prompt or completion")
    _check_round_trip(reader, "completion", completion)
    # An engine adds what the tokenizer puts around a prompt, unless the text begins with it already.
    plain, whole = (list(reader.tokenizer(prompt, add_special_tokens=b).input_ids) for b in (False, True))
    prompt_ids = plain if plain and whole and plain[0] == whole[0] else whole
    response = continuation_ids(reader.tokenizer, plain, prompt, completion)
    if ended and response[-1] not in reader.eos_ids and len(reader.eos_ids) == 1:
        # Of several end tokens nobody knows which one it was: none is put there then.
        response.append(reader.eos_ids[0])
    return prompt_ids, _with_named_end(reader, record, response, ended)


# -- checks ----------------------------------------------------------------------------------------------------------
def _checked_ids(value: Any, name: str, reader: _Reader) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(i) is int for i in value):
        raise ValueError(f'"{name}" must be a list of token ids with at least one')
    wrong = next((i for i in value if not 0 <= i < reader.vocab_size), None)
    if wrong is not None:
        raise ValueError(
            f'"{name}" holds the id {wrong}, but the target has {reader.vocab_size} tokens; is this the log of another '
            "model?"
        )
    return value


def _usage(record: dict[str, Any], name: str) -> int | None:
    """A count of the server's; None where it says nothing, or 0 as servers do that do not count."""
    usage = record.get("usage")
    value = usage.get(name) if isinstance(usage, dict) else None
    if not isinstance(usage, dict | None) or type(value) not in (int, type(None)):
        shown = usage if value is None else value
        raise ValueError(f'"usage" must be an object of whole numbers as servers give it, not {excerpt(shown)}')
    return value or None


def _check_usage(reader: _Reader, record: dict[str, Any], prompt: list[int], response: list[int], ended: bool) -> None:
    """The server's own counts must agree: tools, system turns or arguments that it added are not in the record."""
    asked = _usage(record, "prompt_tokens")
    if asked not in (None, len(prompt)):
        raise ValueError(
            f"usage says that the prompt had {asked} tokens, but the target's chat template makes {len(prompt)}: the "
            "engine was sent something else (tools, a system turn, template arguments); log token ids instead"
        )
    # The end token may be counted and not given, or given and not counted.
    body, count = len(response) - (response[-1] in reader.eos_ids), _usage(record, "completion_tokens")
    if count not in ((None, body, body + 1) if ended else (None, len(response))):
        raise ValueError(f"usage says {count} tokens, but the response has {len(response)}; log token ids instead")


def _check_spelling(reader: _Reader, response: list[int], said: str | dict[str, Any]) -> None:
    """Ids beside text must spell it: another tokenizer's ids are numbers like any other."""
    plain, marked = (reader.tokenizer.decode(response, skip_special_tokens=skip) for skip in (True, False))
    turn = parse_turn(said | {"role": ASSISTANT}) if isinstance(said, dict) else {"content": said}
    text, thoughts = turn["content"], turn.get("reasoning_content", "")
    # Engines differ in the blanks they write, and in half a character at the end of a cut-off answer.
    bare, *spelt = ("".join(part.split()) for part in (text, plain, marked))
    # What a server splits off, thoughts and calls, stands beside the text in the ids.
    split = bool(thoughts or "tool_calls" in turn)
    same = bare in spelt or split and all("".join(part.split()) in spelt[1] for part in (text, thoughts))
    if not same and "\ufffd" not in plain + text:
        raise ValueError(
            f"the token ids of the response spell {plain.strip()[:40]!r}, but its text is {text.strip()[:40]!r}; "
            "are they another tokenizer's?"
        )


def _check_round_trip(reader: _Reader, name: str, text: str) -> None:
    ids = list(reader.tokenizer(text, add_special_tokens=False).input_ids)
    back = reader.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if back != text or "\ufffd" in text:
        at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
        raise ValueError(
            f"the {name} does not come back from the target's tokenizer unchanged (from character {at + 1} on, "
            f"{text[at : at + 20]!r}), so these are not the tokens that were served; log token ids instead"
        )


def _sampler(record: dict[str, Any]) -> Sampler:
    """As recorded; a temperature of 1 where none is."""
    found = []
    ranges = (("temperature", UNKNOWN.temperature, 0.0, math.inf), ("top_k", 0, -1, math.inf), ("top_p", 1.0, 0.0, 1))
    for name, default, least, most in ranges:
        value = default if record.get(name) is None else record[name]
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not least <= value <= most or (name == "top_k" and value != int(value)):
            upto = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
            raise ValueError(f"{name} must be a {'whole ' if name == 'top_k' else ''}number of {upto}, not {value!r}")
        found.append(value)
    # Engines write "no limit" as -1 or 0.
    return Sampler(float(found[0]), max(0, int(found[1])), float(found[2]) or 1.0)
