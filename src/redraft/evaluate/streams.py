"""One answer of a server as a client sees it: its tokens, its times, and whether its parts agree with each other."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from redraft.data import transport
from redraft.data.generate import Request
from redraft.data.store import FINISH_REASONS
from redraft.data.transport import Refused, Transient, shown


@dataclass(frozen=True)
class Answer:
    """One request as the client saw it; ``fault`` says why it failed. ``first`` and ``last`` need a stream."""

    tokens: int = 0
    seconds: float = 0.0
    first: float | None = None
    last: float | None = None
    text: str = ""
    ids: list[int] | None = None
    fault: str = ""

    @property
    def inter_token(self) -> float | None:
        """Seconds a token after the first, None without a stream or a second token."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)

    def same_output(self, other: Answer) -> bool:
        """Whether two answers say the same: in token ids where both came with them, else in text."""
        if self.ids is not None and other.ids is not None:
            return self.ids == other.ids
        return self.text == other.text


def read_answer(
    events: Iterable[dict[str, Any]],
    body: dict[str, Any],
    request: Request,
    began: float,
    eos_ids: Container[int] = (),
    vocab_size: int | None = None,
) -> Answer:
    """The answer in the events of a stream, or in the one object of a server that does not stream; ``began`` is when
    it was asked for. Ids from ``vocab_size`` on are none of the target's, which ends with one of ``eos_ids``.

    Raises ``Transient`` for half an answer and for one whose parts contradict each other, ``Refused`` for one without
    token counts.
    """
    what = "stream" if body["stream"] else "answer"
    texts: list[str] = []
    ids: list[int] = []
    times: list[float] = []
    tokens: int | None = None
    with_ids, reason, most = False, None, int(body["max_tokens"]) + 1
    for event in events:
        # some servers count an end token beside the tokens that were asked for
        found = transport.counted(event, "completion_tokens", most)
        if found is not None and found < (tokens or 0):
            raise Transient(f"a {what} whose completion_tokens go from {tokens} to {found}")
        tokens = tokens if found is None else found
        choice = transport.first_choice(event)
        if choice is None:
            continue
        transport.check_prompt(choice, event, request)
        text, new = transport.answer_text(choice), transport.answer_ids(choice)
        with_ids = with_ids or new is not None
        if new or text:
            if reason is not None:
                raise Transient(f"a {what} that goes on behind its finish reason")
            times.append(time.perf_counter() - began)
            texts.append(text)
            ids += new or []
        said = choice.get("finish_reason")
        if said is not None and said not in FINISH_REASONS:
            raise Transient(f"an answer with the finish reason {shown(said)}")
        reason = reason or said
    seconds = time.perf_counter() - began
    if reason is None:
        raise Transient(f"half an answer: the {what} ended without a finish reason")
    if with_ids:
        transport.check_count(tokens, ids, reason == "stop", eos_ids)
        _check_ids(ids, most, vocab_size)
    tokens = len(ids) if tokens is None and with_ids else tokens
    if tokens is None:
        raise Refused(f"the {what} has neither usage nor token ids; the speed of this server cannot be told")
    if tokens < 1 or (body["stream"] and not times):
        raise Transient("an answer without tokens")
    first, last = (times[0], times[-1]) if body["stream"] else (None, None)
    return Answer(tokens, seconds, first, last, "".join(texts), ids if with_ids else None)


def _check_ids(ids: list[int], most: int, vocab_size: int | None) -> None:
    """Raise ``Transient`` for more ids than ``most``, and for one that the target does not have."""
    if len(ids) > most:
        raise Transient(f"an answer of {len(ids)} tokens where at most {most - 1} were asked for")
    if vocab_size is not None and ids and max(ids) >= vocab_size:
        raise Transient(f"an answer with token id {shown(max(ids))}, and the target's vocabulary has {vocab_size}")
