"""Served traffic in place of generation: responses that the target has already given, read from a log.

A log is a file of JSON lines or one JSON array (``.gz`` too), one served response a record, in one of four shapes:

- ``prompt_ids`` and ``response_ids``, or vLLM's names ``prompt_token_ids`` and ``token_ids``: token ids as the engine
  had them. The best there is: nothing is tokenised again. A ``choices`` or ``outputs`` list of one entry, as vLLM's
  server and its offline engine give them, may hold the response.
- ``messages`` that end with the assistant's answer: through the target's chat template. Only the last answer counts
  as served; what stands before it is its prompt. A log of whole conversations needs one record an answer.
- ``messages`` that end with a user turn, and ``completion`` (or ``response``): the same.
- ``prompt`` and ``completion``: raw text as the engine had it, chat markup included.

In the two last, a ``choices`` list of one entry with ``message`` or ``text``, as OpenAI-compatible servers answer, does
for the completion.

Beside them, all optional: ``id``; ``finish_reason`` (``length`` for an answer that was cut off, so that no end token is
put behind it); ``temperature``, ``top_k``, ``top_p`` as sampled with; ``target_hash``. Text is used only where it
comes through the tokenizer unchanged: text that does not was written by other tokens than we would train on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redraft.data.prompts import Message, file_items, parse_conversation, stem_of
from redraft.data.references import UNKNOWN_TEMPERATURE, answer_ids, continuation_ids
from redraft.data.store import FINISH_REASONS, TRAFFIC, Row
from redraft.errors import UserError

__all__ = ["read_traces"]

PROMPT_KEYS, RESPONSE_KEYS = ("prompt_ids", "prompt_token_ids"), ("response_ids", "token_ids")
TEXT_KEYS = ("completion", "response")
NESTED = ("choices", "outputs")
# A raw prompt of this many records without a single special token looks like bare user text.
SUSPICIOUS = 0.5


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
) -> list[Row]:
    """Every response of a log as a row of ``source`` ``traffic``, in file order; the same exchange twice counts once.

    ``eos_ids`` are the target's end tokens (the tokenizer's own where none are given), ``vocab_size`` and ``context``
    its limits. Longer answers are cut at ``max_new_tokens``. ``warn`` is told in one line about repeated exchanges,
    and about raw prompts that look as if they had not been through a chat template.

    Raises ``UserError`` with file and line for: a missing or empty file, broken JSON, a record of no known shape,
    token ids that are none or not this model's, ids that do not spell the text beside them, text that does not come
    through the tokenizer unchanged, the hash of another target, a record that is longer than the target's context,
    an id that is there twice.
    """
    path = Path(path)
    ends = tuple(int(i) for i in eos_ids) or (int(tokenizer.eos_token_id),)
    reader = _Reader(tokenizer, target_hash, ends, vocab_size or len(tokenizer), max_new_tokens, context)
    rows: dict[tuple[tuple[int, ...], tuple[int, ...]], Row] = {}
    places: dict[str, str] = {}
    records = bare = 0
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
        rows.setdefault((tuple(row.prompt_ids), tuple(row.response_ids)), row)
    if not rows:
        raise UserError(f"{path} is empty; it must hold at least one served response")
    if warn and len(rows) < records:
        warn(f"{path}: {records - len(rows)} of {records} records repeat an exchange and are counted once")
    if warn and bare > SUSPICIOUS * records:
        warn(
            f"{path}: {bare} of {records} raw prompts hold no special token; if a chat template stood around them "
            "when they were served, give messages or token ids instead"
        )
    return list(rows.values())


# -- one record ------------------------------------------------------------------------------------------------------
def _row(reader: _Reader, item: Any, default_id: str) -> tuple[Row, bool]:
    """The row of a record, and whether its prompt is raw text without markup. Raises ``ValueError``, ``UserError``."""
    if not isinstance(item, dict):
        raise ValueError("a record must be a JSON object")
    record = _flat(item)
    if record.get("target_hash", reader.target_hash) != reader.target_hash:
        raise ValueError(
            f"served by another target ({record['target_hash']}, this one is {reader.target_hash}); give its own log"
        )
    reason = record.get("finish_reason")
    if reason is not None and reason not in FINISH_REASONS:
        raise ValueError(f"the finish reason must be one of {', '.join(FINISH_REASONS)}, not {reason!r}")
    prompt, response, bare = _ids(reader, record, default_id, reason)
    response, finish = _cut(response, reason, reader)
    if reader.context is not None and len(prompt) + len(response) > reader.context:
        raise ValueError(
            f"{len(prompt) + len(response)} tokens do not fit into the target's context of {reader.context}, so it "
            "cannot have served them; is this the log of another model?"
        )
    id = record.get("id", record.get("request_id"))
    temperature, top_k, top_p = _sampler(record)
    row = Row(
        id=default_id if id is None or id == "" else str(id),
        prompt_ids=prompt,
        response_ids=response,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=0,
        finish_reason=finish,
        target_hash=reader.target_hash,
        source=TRAFFIC,
    )
    return row, bare


def _flat(item: dict[str, Any]) -> dict[str, Any]:
    """The record with the one entry of its ``choices`` or ``outputs`` list laid over it."""
    for name in NESTED:
        entries = item.get(name)
        if entries is None:
            continue
        if not isinstance(entries, list) or len(entries) != 1 or not isinstance(entries[0], dict):
            raise ValueError(f'"{name}" must be a list of one response; write one record a response')
        entry = {key: value for key, value in entries[0].items() if value is not None}
        message = entry.get("message")
        text = message.get("content") if isinstance(message, dict) else entry.get("text")
        return item | entry | ({"completion": text} if isinstance(text, str) else {})
    return item


def _ids(
    reader: _Reader, record: dict[str, Any], default_id: str, reason: str | None
) -> tuple[list[int], list[int], bool]:
    """(prompt ids, response ids, whether the prompt is raw text without markup) of a record of any shape."""
    prompt_key = next((key for key in PROMPT_KEYS if record.get(key) is not None), None)
    response_key = next((key for key in RESPONSE_KEYS if record.get(key) is not None), None)
    text = next((record[key] for key in TEXT_KEYS if isinstance(record.get(key), str)), None)
    if prompt_key and response_key:
        prompt = _checked_ids(record[prompt_key], prompt_key, reader)
        response = _checked_ids(record[response_key], response_key, reader)
        if text is not None:
            _check_spelling(reader, response, text)
        return prompt, response, False
    if prompt_key or response_key:
        have, lack = (prompt_key, RESPONSE_KEYS) if prompt_key else (response_key, PROMPT_KEYS)
        raise ValueError(f'"{have}" without {" or ".join(lack)}; give the token ids of prompt and response')
    if record.get("messages") is not None:
        prompt, response = _from_messages(reader, record, default_id, text, reason)
        return prompt, response, False
    if isinstance(record.get("prompt"), str) and text is not None:
        prompt, response = _from_text(reader, record["prompt"], text, reason)
        special = set(reader.tokenizer.all_special_ids)
        # The first token may be one that the tokenizer puts in front of every text.
        return prompt, response, not special.intersection(prompt[1:])
    raise ValueError(
        "no prompt_ids and response_ids, no messages that end with an answer, no prompt and completion among its keys: "
        + (", ".join(sorted(map(str, record))[:8]) or "none")
    )


def _from_messages(
    reader: _Reader, record: dict[str, Any], default_id: str, text: str | None, reason: str | None
) -> tuple[list[int], list[int]]:
    messages: list[Message] = parse_conversation({"messages": record["messages"]}, default_id).messages
    if text is not None:
        messages = [*messages, {"role": "assistant", "content": text}]
    if messages[-1]["role"] != "assistant":
        raise ValueError("the messages end with no answer of the assistant, and there is no completion")
    if len(messages) < 2 or messages[-2]["role"] != "user":
        raise ValueError("the last answer does not stand behind a user turn")
    answer = messages[-1]["content"]
    if not answer.strip():
        raise ValueError("the last answer is empty")
    _check_round_trip(reader, "answer", answer)
    prompt, response, finish = answer_ids(reader.tokenizer, default_id, messages[:-1], answer, reader.eos_ids)
    # The template ends every answer; one that was cut off when it was served had no end.
    return prompt, response[:-1] if reason == "length" and finish == "stop" else response


def _from_text(reader: _Reader, prompt: str, completion: str, reason: str | None) -> tuple[list[int], list[int]]:
    if not prompt or not completion:
        raise ValueError("an empty prompt or completion")
    _check_round_trip(reader, "completion", completion)
    # An engine adds what the tokenizer puts around a prompt, unless the text begins with it already.
    plain, whole = (list(reader.tokenizer(prompt, add_special_tokens=b).input_ids) for b in (False, True))
    prompt_ids = plain if plain and whole and plain[0] == whole[0] else whole
    response = continuation_ids(reader.tokenizer, plain, prompt, completion)
    if reason != "length" and response[-1] not in reader.eos_ids:
        response.append(int(reader.tokenizer.eos_token_id))
    return prompt_ids, response


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


def _check_spelling(reader: _Reader, response: list[int], text: str) -> None:
    """Ids beside text must spell it: another tokenizer's ids are numbers like any other."""
    plain, marked = (reader.tokenizer.decode(response, skip_special_tokens=skip) for skip in (True, False))
    # Engines differ in the blanks they write, and in half a character at the end of a cut-off answer.
    same = "".join(text.split()) in ("".join(plain.split()), "".join(marked.split()))
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


def _cut(response: list[int], reason: str | None, reader: _Reader) -> tuple[list[int], str]:
    limit = reader.max_new_tokens
    if limit is not None and len(response) > limit:
        return response[:limit], "length"
    return response, reason or ("stop" if response[-1] in reader.eos_ids else "length")


def _sampler(record: dict[str, Any]) -> tuple[float, int, float]:
    """(temperature, top-k, top-p) as recorded; a temperature of 1 where none is."""
    found = []
    for name, default, least in (("temperature", UNKNOWN_TEMPERATURE, 0.0), ("top_k", 0, -1), ("top_p", 1.0, 0.0)):
        value = record.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
            raise ValueError(f"{name} must be a number of {least:g} or more, not {value!r}")
        found.append(value)
    # Engines write "no limit" as -1 or 0.
    return float(found[0]), max(0, int(found[1])), float(found[2]) or 1.0
