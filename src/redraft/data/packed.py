"""Plain text as training blocks: read in order, tokenised, laid end to end and cut, with no token lost or padded.

Read are text files (``.txt``, ``.text``, ``.md``), JSON lines with a text field (``.jsonl``, ``.json``), any of these
with ``.gz``, folders of them, and ``datasets:NAME:CONFIG@SPLIT``, which is streamed. A line of JSON is a piece, a text
file is cut at line breaks into pieces of about ``PIECE_BYTES``. Pieces are shuffled within windows of ``WINDOW``, by
seed, pass and window, so that a stream of any length has a reproducible order, and reading goes on from a position in
it as if it had never stopped. Every piece ends with the tokenizer's end token, and begins with its opening token where
the tokenizer itself puts one.

A block has ``length + 1`` tokens and begins with the last one of the block before: as inputs and labels, shifted by
one, every token of the stream is a label once, but for the very first. Shape legend: B blocks, T tokens.
"""

from __future__ import annotations

import gzip
import random
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from redraft.data.prompts import HUB_PREFIX, hub_rows
from redraft.data.turns import keys_of
from redraft.errors import UserError
from redraft.inputs import parse_json, require_file

PIECE_BYTES = 1 << 14
WINDOW = 1024
BATCH = 64  # pieces that are tokenised together
PLAIN, JSON = (".txt", ".text", ".md"), (".jsonl", ".json")
HASH_PARTS = 1_000_000
MOST_LINE = 1 << 28  # bytes; a packed file may unpack to one of any length

T = TypeVar("T")


# -- files -----------------------------------------------------------------------------------------------------------
def _kind_of(path: Path) -> str:
    """The ending that tells the format, without ``.gz``."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def text_files(names: Sequence[str]) -> list[str]:
    """Files and ``datasets:`` names, in the order given, folders replaced by their files in name order.
    Raises ``UserError`` for what is missing, empty, or of an unknown format, and when nothing is named."""
    found: list[str] = []
    for name in names:
        path, known = Path(name), (*PLAIN, *JSON)
        files = [name]
        if not name.startswith(HUB_PREFIX):
            if path.is_dir():
                files = [str(p) for p in sorted(path.rglob("*")) if p.is_file() and _kind_of(p) in known]
            elif not path.is_file():
                raise UserError(f"{path} does not exist; name text files, a folder of them or datasets:NAME")
            elif _kind_of(path) not in known:
                raise UserError(f"{path} is of no known format; text files end in {', '.join(known)}, or .gz")
        if not files:
            raise UserError(f"{path} holds no text files; they end in {', '.join(known)}, or .gz behind")
        found += files
    if not found:
        raise UserError("no text is named; give text files, a folder of them or datasets:NAME")
    if len(set(found)) < len(found):
        raise UserError(f"{max(found, key=found.count)} is named twice; name every text file once")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line. Raises ``UserError`` that names file and byte where it is not UTF-8 text."""
    require_file(path)
    at, number = 0, 1
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MOST_LINE), b""), 1):
                if len(line) == MOST_LINE:
                    raise UserError(f"{path}:{number}: a line of {MOST_LINE:,} bytes or more; break it up")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if "\0" in text:
                    place = at + line.index(b"\0")
                    raise UserError(f"{path} is no text: a zero at byte {place} (line {number}); leave it out")
                at += len(line)
                yield number, text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text at byte {at + error.start} (line {number}, {error.reason}); "
            "convert the file to UTF-8 or leave it out"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _file_pieces(path: Path, text_field: str) -> Iterator[str]:
    if _kind_of(path) in JSON:
        for number, line in _lines(path):
            if line.strip():
                yield _text_of(parse_json(line, path, number), text_field, f"{path}:{number}")
        return
    held = ""
    for _, line in _lines(path):
        held += line
        if len(held) >= PIECE_BYTES:
            yield held
            held = ""
    yield held


def _text_of(item: Any, text_field: str, place: str) -> str:
    text = item.get(text_field) if isinstance(item, dict) else None
    if not isinstance(text, str):
        known = keys_of(item) if isinstance(item, dict) else type(item).__name__
        raise UserError(f"{place}: no text under {text_field!r} (there is {known}); name the field that holds it")
    return text


class TextSource:
    """Pieces of text in a fixed order. ``names`` are files, folders and ``datasets:`` names.

    Raises ``UserError``; what is wrong inside a file is found by :meth:`survey`, or when reading comes to it.
    """

    def __init__(self, names: Sequence[str], text_field: str = "text") -> None:
        self.files, self.text_field = text_files(names), text_field

    def pieces(self, skip: int = 0) -> Iterator[str]:
        """Every piece from number ``skip`` on; a piece without any letter or sign is an empty string."""
        for name in self.files:
            hub = name.startswith(HUB_PREFIX)
            # A data set can skip cheaply, but how many it has is known only at its end.
            lazily = hub and name == self.files[-1]
            rows = hub_rows(name, skip if lazily else 0) if hub else ()
            texts = (_text_of(item, self.text_field, f"{name}: row {number}") for number, item in rows)
            for piece in texts if hub else self._of_file(name):
                if skip and not lazily:
                    skip -= 1
                else:
                    yield piece if not piece.isspace() else ""

    def _of_file(self, name: str) -> Iterator[str]:
        blank = True
        for piece in _file_pieces(Path(name), self.text_field):
            blank = blank and (not piece or piece.isspace())
            yield piece
        if blank:
            raise UserError(f"{name} holds no text; leave it out")

    def survey(self) -> int:
        """Read every local file once; the bytes of text in them. Raises ``UserError`` for the first that is bad."""
        local = [name for name in self.files if not name.startswith(HUB_PREFIX)]
        return sum(len(piece.encode()) for name in local for piece in self._of_file(name))


# -- the stream ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Position:
    """A place in a stream: pass, first piece of the window, batches done in it, blocks of the batch given out, and
    the tokens that stood before that batch."""

    epoch: int = 0
    window: int = 0
    batches: int = 0
    blocks: int = 0
    carry: tuple[int, ...] = ()

    @classmethod
    def of(cls, value: dict[str, Any] | None) -> Position:
        """From its JSON form (``vars``); the start for ``None``."""
        return cls(**{**value, "carry": tuple(value["carry"])}) if value else cls()


class PackedText:
    """Blocks of ``length + 1`` token ids out of ``source``, in the order described at the top of this file. Pieces
    whose checksum falls into ``heldout_share`` are kept out of the stream, for :meth:`heldout`."""

    def __init__(
        self, source: TextSource, tokenizer: Any, length: int, seed: int = 0, heldout_share: float = 0.0
    ) -> None:
        if length < 2:
            raise UserError(f"blocks must hold at least 2 tokens, not {length}")
        if not 0 <= heldout_share < 1:
            raise UserError(f"the held-out share of the text must be at least 0 and below 1, not {heldout_share}")
        self.source, self.tokenizer, self.length, self.seed = source, tokenizer, length, seed
        self.share = round(heldout_share * HASH_PARTS)
        self.opening = [i for i in list(tokenizer("a").input_ids)[:1] if i == tokenizer.bos_token_id]

    def held_out(self, piece: str) -> bool:
        """Whether a piece belongs to the held-out text: by what it says, not by where it stands."""
        return zlib.crc32(piece.encode()) % HASH_PARTS < self.share

    def tokens(self, pieces: Sequence[str]) -> list[int]:
        """Token ids of the pieces, each between the opening token (if any) and the end token."""
        texts, end = [piece for piece in pieces if piece], int(self.tokenizer.eos_token_id)
        found = self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
        return [i for ids in found for i in (*self.opening, *ids, end)]

    def heldout(self, blocks: int) -> Tensor:
        """The first ``blocks`` blocks of the held-out text, in file order, [B, T]; fewer where it holds fewer.
        Raises ``UserError`` when it does not fill one block."""
        held: list[int] = []
        for piece in self.source.pieces():
            if piece and self.held_out(piece):
                held += self.tokens([piece])
                if len(held) > blocks * self.length:
                    break
        count = min(blocks, (len(held) - 1) // self.length)
        if count < 1:
            raise UserError(
                f"the held-out text has {len(held)} tokens and a block needs {self.length + 1}; "
                "give more text, a file of held-out text, shorter blocks or a larger held-out share"
            )
        return cut(held, self.length, count)

    def blocks(self, start: Position = Position()) -> Iterator[tuple[Tensor, Position]]:
        """Blocks [T] from ``start`` on, without end, each with the position behind it.
        Raises ``UserError`` when a whole pass gives no block."""
        at = start
        while True:
            whole = (at.window, at.batches, at.blocks) == (0, 0, 0)
            given, carry = yield from self._pass(at)
            if whole and not given:
                raise UserError(
                    f"the text does not fill one block of {self.length + 1} tokens; give more text or shorter blocks"
                )
            at = Position(at.epoch + 1, carry=tuple(carry))

    def _pass(self, at: Position) -> Generator[tuple[Tensor, Position], None, tuple[int, list[int]]]:
        """The rest of a pass over the source, behind ``at``; returns how many blocks it had and the tokens left."""
        epoch, begin, carry = at.epoch, at.window, list(at.carry)
        first, given, total = at.batches, at.blocks, 0
        pieces = self.source.pieces(begin)
        while window := list(islice(pieces, WINDOW)):
            order = [piece for piece in window if piece and not self.held_out(piece)]
            random.Random(f"{self.seed}/{epoch}/{begin}").shuffle(order)
            for number in range(first, -(-len(order) // BATCH)):
                row = [*carry, *self.tokens(order[number * BATCH : (number + 1) * BATCH])]
                count = max(0, (len(row) - 1) // self.length)
                for i, block in enumerate(cut(row, self.length, count)[given:], given + 1):
                    yield block, Position(epoch, begin, number, i, tuple(carry))
                    total += 1
                carry, given = row[count * self.length :], 0
            begin, first = begin + len(window), 0
        return total, carry


def cut(row: Sequence[int], length: int, count: int) -> Tensor:
    """``count`` blocks [B, T] of ``length + 1`` tokens, each beginning with the last token of the one before."""
    ids = torch.tensor(row[: count * length + 1], dtype=torch.long)
    return ids.unfold(0, length + 1, length) if count else ids.new_empty(0, length + 1)


# -- reading ahead ---------------------------------------------------------------------------------------------------
def ahead(make: Callable[[], Iterator[T]], depth: int = 8) -> Iterator[T]:
    """What the iterator that ``make`` gives yields, worked out up to ``depth`` items ahead in a thread of its own,
    which ends when the generator is closed. Errors come out where the item would have."""
    end, items = object(), make()
    reader = ThreadPoolExecutor(1, thread_name_prefix="redraft-text")
    try:
        waiting = deque(reader.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(reader.submit(next, items, end))
            yield cast(T, item)
    finally:
        reader.shutdown(wait=True, cancel_futures=True)
