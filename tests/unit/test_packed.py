"""Plain text as blocks: every token once, an order that a stop does not change, and what bad files are told."""

from __future__ import annotations

import gzip
import json
import threading
from itertools import islice
from pathlib import Path

import pytest
import torch

from redraft.data import packed
from redraft.data.packed import PackedText, Position, TextSource, ahead, text_files
from redraft.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A text file, JSON lines and the like packed: 130 pieces in all."""
    place = tmp_path / "text"
    place.mkdir()
    (place / "a.txt").write_text("".join(f"line {i} of the first file\n" for i in range(900)))
    lines = [json.dumps({"text": f"story {i}: " + "he sat there " * (i % 9), "n": i}) for i in range(100)]
    (place / "b.jsonl").write_text("\n".join([*lines[:60], ""]))
    (place / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[60:]).encode()))
    return place


@pytest.fixture
def text(folder: Path, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch) -> PackedText:
    monkeypatch.setattr(packed, "PIECE_BYTES", 700)
    monkeypatch.setattr(packed, "WINDOW", 48)
    monkeypatch.setattr(packed, "BATCH", 7)
    return PackedText(TextSource([str(folder)]), tiny_tokenizer, 32, seed=3)


def first_pass(text: PackedText) -> list[tuple[torch.Tensor, Position]]:
    found = []
    for block, at in text.blocks():
        if at.epoch:
            return found
        found.append((block, at))
    raise AssertionError


def test_a_pass_holds_every_token_of_every_piece_once(text: PackedText) -> None:
    """As labels, in the order of the shuffled pieces; what does not fill a block goes into the next pass."""
    pieces = [piece for piece in text.source.pieces() if piece]
    expected = sorted(tuple(text.tokens([piece])) for piece in pieces)
    blocks = list(islice(text.blocks(), len(first_pass(text)) + 5))
    stream = [int(blocks[0][0][0]), *(int(i) for block, _ in blocks for i in block[1:])]
    assert all(int(one[0][-1]) == int(two[0][0]) for one, two in zip(blocks, blocks[1:], strict=False))
    end, found, piece = text.tokenizer.eos_token_id, [], []
    for token in stream:
        piece.append(token)
        if token == end:
            found.append(tuple(piece))
            piece = []
    assert sorted(found[: len(expected)]) == expected
    assert len(pieces) > 2 * packed.WINDOW, "several windows"


def test_the_stream_goes_on_from_any_position_as_if_it_had_not_stopped(text: PackedText) -> None:
    whole = list(islice(text.blocks(), len(first_pass(text)) + 40))
    for place in range(0, len(whole) - 1, 11):
        position = Position.of(json.loads(json.dumps(vars(whole[place][1]))))
        rest = list(islice(text.blocks(position), 12))
        for (block, at), (again, after) in zip(whole[place + 1 :], rest, strict=False):
            assert torch.equal(block, again) and at == after


def test_the_order_is_that_of_seed_and_pass(folder: Path, text: PackedText) -> None:
    same = PackedText(TextSource([str(folder)]), text.tokenizer, 32, seed=3)
    other = PackedText(TextSource([str(folder)]), text.tokenizer, 32, seed=4)
    blocks = torch.stack([b for b, _ in islice(text.blocks(), 20)])
    assert torch.equal(blocks, torch.stack([b for b, _ in islice(same.blocks(), 20)]))
    assert not torch.equal(blocks, torch.stack([b for b, _ in islice(other.blocks(), 20)]))
    passes = len(first_pass(text))
    again = torch.stack([b for b, _ in islice(text.blocks(), passes, passes + 20)])
    assert not torch.equal(blocks, again)


def test_held_out_text_is_never_in_the_stream(folder: Path, text: PackedText) -> None:
    kept = PackedText(TextSource([str(folder)]), text.tokenizer, 32, heldout_share=0.3)
    held = kept.heldout(1000)
    apart = [piece for piece in kept.source.pieces() if piece and kept.held_out(piece)]
    assert 10 < len(apart) < 80
    assert len(held) == (sum(len(kept.tokens([p])) for p in apart) - 1) // 32
    stream = " ".join(kept.tokenizer.convert_ids_to_tokens([int(i) for b, _ in first_pass(kept) for i in b[1:]]))
    stories = [" ".join(kept.tokenizer.convert_ids_to_tokens(kept.tokens([p]))) for p in apart if p.startswith("story")]
    assert stories and not any(story in stream for story in stories)


def test_the_opening_token_stands_where_the_tokenizer_puts_one(text: PackedText) -> None:
    assert text.opening == []

    class Opening:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, texts, **kwargs):
            plain = [[9]] * len(texts)
            ids = plain if kwargs.get("add_special_tokens") is False else [1, 9]
            return type("Found", (), {"input_ids": ids})

    assert PackedText(text.source, Opening(), 8).tokens(["x", "", "y"]) == [1, 9, 2, 1, 9, 2]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        (
            "mixed.txt",
            "caf\u00e9\n".encode() + "caf\u00e9\n".encode("latin-1"),
            r"mixed\.txt is not UTF-8 text at byte 9",
        ),
        ("wide.txt", "text".encode("utf-16"), r"wide\.txt is not UTF-8 text at byte 0"),
        ("zero.txt", b"good\nb\0d\n", r"zero\.txt is no text: a zero at byte 6"),
        ("blank.txt", b" \n\n\t\n", r"blank\.txt holds no text"),
        ("none.jsonl", b"", r"none\.jsonl holds no text"),
        ("list.jsonl", b'{"text": "a"}\n[1]\n', r"list\.jsonl:2: no text under 'text'"),
        ("field.jsonl", b'{"content": "a"}\n', r"field\.jsonl:1: no text under 'text' \(there is content\)"),
        ("torn.jsonl", b'{"text": "a"}\n{"te\n', r"torn\.jsonl:2: not JSON"),
        ("torn.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:-9], r"cannot read .*torn\.txt\.gz"),
    ],
)
def test_a_bad_file_is_named_with_its_place(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=said):
        TextSource([str(tmp_path / name)]).survey()


def test_the_byte_counts_over_lines(tmp_path: Path) -> None:
    (tmp_path / "late.txt").write_bytes(b"0123456789\n" * 1000 + b"ab\xff\n")
    with pytest.raises(UserError, match=r"byte 11002 \(line 1001"):
        TextSource([str(tmp_path / "late.txt")]).survey()


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    for names, said in (
        ([], "no text is named"),
        ([str(tmp_path / "gone.txt")], "does not exist"),
        ([str(tmp_path)], "holds no text files"),
        ([str(tmp_path / "model.bin")], "no known format"),
    ):
        with pytest.raises(UserError, match=said):
            text_files(names)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="named twice"):
        text_files([str(tmp_path), str(tmp_path / "a.txt")])


def test_too_little_text_is_said_and_not_repeated_until_it_fills(tmp_path: Path, tiny_tokenizer) -> None:
    (tmp_path / "a.txt").write_text("short")
    text = PackedText(TextSource([str(tmp_path)]), tiny_tokenizer, 32, heldout_share=0.5)
    with pytest.raises(UserError, match="does not fill one block of 33"):
        next(text.blocks())
    with pytest.raises(UserError, match="held-out text has"):
        text.heldout(4)


def test_a_data_set_is_streamed_in_order_and_resumes(tmp_path: Path, tiny_tokenizer) -> None:
    datasets = pytest.importorskip("datasets")
    assert datasets
    place = tmp_path / "set"
    place.mkdir()
    lines = [json.dumps({"text": f"row {i} he sat there and then"}) for i in range(200)]
    (place / "train.jsonl").write_text("\n".join(lines))
    text = PackedText(TextSource([f"datasets:{place}"]), tiny_tokenizer, 32)
    whole = list(islice(text.blocks(), 60))
    rest = list(islice(text.blocks(whole[30][1]), 10))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[31:], rest, strict=False))
    with pytest.raises(UserError, match="cannot read datasets:"):
        next(TextSource([f"datasets:{tmp_path / 'gone'}"]).pieces())


def test_without_the_package_a_data_set_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets"):
        next(TextSource(["datasets:some/set"]).pieces())


def test_reading_ahead_keeps_order_hands_errors_on_and_ends_its_thread() -> None:
    assert list(ahead(lambda: iter(range(50)), 3)) == list(range(50))

    def broken():
        yield 1
        raise UserError("a bad line")

    line = ahead(broken, 3)
    assert next(line) == 1
    with pytest.raises(UserError, match="a bad line"):
        next(line)
    endless = ahead(lambda: iter(int, 1), 2)
    assert next(endless) == 0
    endless.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("redraft-text")]
