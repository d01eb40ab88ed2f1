"""Prompts for users who have none: the target, given only its chat template's opening of a user turn, goes on to
write what a user might ask (Magpie, arXiv 2406.08464).

A fine-tuned model leans towards what it was tuned on. Every draw depends on its number, the sampler and the seed alone;
draws are stored as they come, so a killed run goes on where it stopped, and the questions kept are those of a run that
was not killed (but for rounding that depends on what shares a batch).
"""

from __future__ import annotations

import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redraft.data.generate import Request, generate
from redraft.data.overlap import SENTINEL, numbers_of, words
from redraft.data.shapes import Conversation
from redraft.data.store import Row, RowWriter, row_key
from redraft.data.template import render
from redraft.data.turns import asked_by_user
from redraft.errors import UserError
from redraft.settings.sampler import Sampler
from redraft.target import Target

SAMPLER = Sampler(1.0, 0, 0.95)
# Self-Instruct (arXiv 2212.10560) keeps an instruction whose overlap with all others is below 0.7; its measure is
# ROUGE-L, ours the share of four-word shingles, which an index answers without comparing every pair.
SHINGLE, SHARE = 4, 0.7
LEAST_WORDS = 3
# Text that deflates to less than this share repeats itself; ordinary questions of this length stay above 0.5.
DEFLATED, DEFLATED_FROM = 0.35, 80
# Fewer than one usable question in this many draws, and the model does not write users' turns.
DRAWS_A_QUESTION = 8


@dataclass(frozen=True)
class UserOpening:
    """What the chat template writes up to the first letter of a user's turn, and what ends the turn: ``ending`` is
    looked for in the text where no single token of its own, one of ``stop_ids``, does."""

    ids: list[int]
    ending: str
    stop_ids: tuple[int, ...]


@dataclass
class SelfPromptReport:
    """What a run did. ``tokens`` are those of new draws with their openings; ``dropped`` counts draws by reason."""

    draws: int = 0
    new: int = 0
    tokens: int = 0
    seconds: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line for a person."""
        kept = self.draws - self.dropped.total()
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        said = f"{kept} of {self.draws} questions that the target wrote itself are of use"
        return f"{said} ({why})" if why else said


def user_opening(tokenizer: Any) -> UserOpening:
    """The opening of a user's turn by the chat template, behind the template's own system turn if it has one.

    Raises ``UserError`` when there is no template, or one from which the opening cannot be told.
    """
    try:
        text = render(tokenizer, "with a lone user turn", [asked_by_user(SENTINEL)], False)
    except UserError as error:
        raise UserError(f"{error}; give a prompt file") from error
    before, found, behind = text.partition(SENTINEL)
    if not found or SENTINEL in behind or not before.strip() or not behind.strip():
        raise UserError(
            "the opening of a user's turn cannot be told from the chat template: it must write the user's text once, "
            "with marks in front of it and behind it; give a prompt file"
        )
    ids = list(tokenizer(before, add_special_tokens=False).input_ids)
    end = list(tokenizer(behind, add_special_tokens=False).input_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return UserOpening(ids, behind.strip(), (end[0],) if end[0] in {*tokenizer.all_special_ids, *added} else ())


def self_prompts(
    target: Target,
    count: int,
    seed: int,
    path: str | Path,
    *,
    sampler: Sampler = SAMPLER,
    max_new_tokens: int = 160,
    batch_size: int = 64,
    progress: Callable[..., None] | None = None,
) -> tuple[list[Conversation], SelfPromptReport]:
    """``count`` different questions in the target's own words, and what became of the other draws.

    The raw draws go to the response file ``path``; those that are there already are used again, so the same command
    goes on after a kill. A draw is dropped that does not end, has hardly a word, repeats itself, holds marks of the
    chat template or broken characters, or nearly is an earlier one. ``progress(questions, draws=n)`` is called as draws
    come in. Raises ``UserError``: for a greedy sampler, a chat template without an opening, stored draws that do not
    belong here, and when far too few draws are of use.
    """
    if count < 1:
        raise UserError(f"the number of prompts must be 1 or more, not {count}")
    if sampler.greedy:
        raise UserError("greedy drafts of a user's turn are all the same; give a temperature above 0")
    opening = user_opening(target.tokenizer)
    if len(opening.ids) + max_new_tokens > target.context:
        raise UserError(f"{max_new_tokens} new tokens do not fit into the target's context of {target.context}")
    with RowWriter(path) as writer:
        run = _Run(target, opening, sampler, seed, max_new_tokens, batch_size, writer, progress)
        return run.collect(count), run.report


@dataclass
class _Run:
    """The state of one run."""

    target: Target
    opening: UserOpening
    sampler: Sampler
    seed: int
    max_new_tokens: int
    batch_size: int
    writer: RowWriter
    progress: Callable[..., None] | None

    def __post_init__(self) -> None:
        self.hash, self.report = self.target.content_hash(), SelfPromptReport()
        self.kept, self.seen = list[Conversation](), NearDuplicates()
        wanted = (self.hash, self.opening.ids, self.sampler, self.seed)
        for row in self.writer.rows:
            found = (row.target_hash, row.prompt_ids, Sampler(row.temperature, row.top_k, row.top_p), row.seed)
            right_end = len(row.response_ids) == self.max_new_tokens or row.finish_reason == "stop"
            if found != wanted or not right_end or len(row.response_ids) > self.max_new_tokens:
                raise UserError(
                    f"{self.writer.path} holds draws of another target, template, sampler, seed or length "
                    f"({row.key}); name another file, or delete this one"
                )

    def collect(self, count: int) -> list[Conversation]:
        """Draw in waves and judge in the order of the numbers, until ``count`` questions are kept."""
        began, most = time.monotonic(), DRAWS_A_QUESTION * count + self.batch_size
        try:
            while len(self.kept) < count:
                done = self.report.draws
                if done >= most:
                    raise UserError(
                        f"only {len(self.kept)} different questions came out of {done} draws, {count} are asked for; "
                        "ask for fewer, raise the temperature, or give a prompt file"
                    )
                # Enough for what is missing at the yield so far, and never less than a full batch.
                share = max(len(self.kept) / done if done else 0.8, 1 / DRAWS_A_QUESTION)
                wave = max(self.batch_size, round(1.1 * (count - len(self.kept)) / share))
                numbers = range(done, min(done + wave, most))
                self._draw(numbers)
                for number in numbers:
                    if len(self.kept) < count:
                        self._judge(number)
        finally:
            self.report.seconds = time.monotonic() - began
        return self.kept

    def _key(self, number: int) -> str:
        return row_key(f"self/{number}", self.sampler.temperature)

    def _draw(self, numbers: Sequence[int]) -> None:
        """Complete the draws of these numbers in the file."""
        missing = [key for key in map(self._key, numbers) if self.writer.rows.get(key) is None]
        requests = [Request(key, self.opening.ids, self.sampler, self.seed) for key in missing]
        limits = self.max_new_tokens, self.batch_size
        buffer: list[Row] = []
        try:
            for done in generate(self.target, requests, *limits, stop_ids=self.opening.stop_ids):
                drawn = done.response_ids, self.sampler, done.finish_reason, self.hash
                id, _, _ = done.request.key.partition("@")
                buffer.append(Row.of(id, self.opening.ids, *drawn, seed=self.seed))
                self.report.new += 1
                self.report.tokens += len(self.opening.ids) + len(done.response_ids)
                if len(buffer) >= self.batch_size:
                    self._store(buffer)
                    buffer = []
        finally:
            self._store(buffer)

    def _store(self, rows: list[Row]) -> None:
        self.writer.append(rows)
        if self.progress is not None:
            self.progress(len(self.kept), draws=len(self.writer.rows))

    def _judge(self, number: int) -> None:
        """Keep the draw of this number, or count why not."""
        self.report.draws += 1
        row, tokenizer = self.writer.rows.get(self._key(number)), self.target.tokenizer
        assert row is not None  # all draws up to this one are there
        stopped = row.finish_reason == "stop"
        text = tokenizer.decode(row.response_ids[:-1] if stopped else row.response_ids, skip_special_tokens=False)
        if not self.opening.stop_ids:
            text, found, _ = text.partition(self.opening.ending)
            stopped = stopped or bool(found)
        text = text.strip()
        marks = (self.opening.ending, *tokenizer.all_special_tokens)
        reason = unusable(text, marks) if stopped else "unfinished"
        if reason is None and not self.seen.add(text):
            reason = "near duplicates"
        if reason is None:
            self.kept.append(Conversation(f"self/{self.seed}/{number}", [asked_by_user(text)]))
        else:
            self.report.dropped[reason] += 1


# -- what is of use --------------------------------------------------------------------------------------------------
def unusable(text: str, marks: Sequence[str]) -> str | None:
    """Why a question is of no use, or None: ``empty``, ``marked`` by the template or broken, ``repetitive``."""
    found = words(text)
    if len(found) < LEAST_WORDS:
        return "empty"
    if "\ufffd" in text or any(mark in text for mark in marks):
        return "marked"
    data = text.encode()
    deflates = len(data) >= DEFLATED_FROM and len(zlib.compress(data, 9)) < DEFLATED * len(data)
    repeats = len(found) >= 2 * SHINGLE and len(set(found)) * 4 < len(found)
    return "repetitive" if deflates or repeats else None


class NearDuplicates:
    """Texts that are not near each other: they share less than 0.7 of the four-word shingles of the shorter one, or
    that one has a number that the other lacks. A problem with other numbers is another problem."""

    def __init__(self) -> None:
        self.holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        self.texts: list[tuple[set[tuple[str, ...]], set[str]]] = []

    def add(self, text: str) -> bool:
        """Keep a text unless it nearly is one that is kept; whether it was kept."""
        found = words(text)
        span = min(SHINGLE, len(found))
        shingles = {tuple(found[i : i + span]) for i in range(len(found) - span + 1)}
        numbers = numbers_of(found)
        shared = Counter(index for shingle in shingles for index in self.holders.get(shingle, ()))
        for index, count in shared.items():
            others, their_numbers = self.texts[index]
            small, large = (numbers, their_numbers) if len(shingles) <= len(others) else (their_numbers, numbers)
            if count >= SHARE * min(len(shingles), len(others)) and small <= large:
                return False
        for shingle in shingles:
            self.holders[shingle].append(len(self.texts))
        self.texts.append((shingles, numbers))
        return True
