"""Rows that stay on the disk: lines made and checked as bytes, the index of a long file, and what it never hides."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.data import lines, table
from redraft.data.lines import Row, checksum, decode_row, encode_row, quick_line
from redraft.data.store import RowWriter, read_rows, spooled, write_rows
from redraft.data.table import index_path
from redraft.errors import UserError
from redraft.rows import anchors, sizes, whole_length

IDS = st.lists(st.one_of(st.integers(0, 300_000), st.integers(0, 2**31 - 1)), min_size=1, max_size=9)
ROWS = st.builds(
    Row,
    st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
    IDS,
    IDS,
    st.one_of(st.floats(0, 9), st.integers(0, 3)),
    st.integers(0, 99),
    st.one_of(st.floats(0, 1), st.integers(0, 1)),
    st.integers(-(2**70), 2**70),
    st.sampled_from(["stop", "length", "context"]),
    st.text("0123456789abcdef", max_size=16),
    st.integers(0, 9),
    st.sampled_from(["target", "traffic", "reference"]),
)


def plain_line(row: Row) -> bytes:
    """What the line of a row is by the definition of the format."""
    value = asdict(row)
    if row.source == "target":
        del value["source"]
    return (json.dumps(value | {"checksum": checksum(value)}, separators=(",", ":")) + "\n").encode()


@settings(deadline=None)
@given(ROWS)
def test_lines_are_what_the_format_says_and_come_back(row: Row) -> None:
    line = encode_row(row)
    assert line == plain_line(row)
    quick = quick_line(line)
    assert (quick is None) == (max(*row.prompt_ids, *row.response_ids) >= 10**9)
    for form in (line, line.rstrip(b"\n"), json.dumps(json.loads(line), indent=None, sort_keys=True).encode()):
        found = decode_row(form)
        assert found == row and repr(found) == repr(row), "0 stays 0 and 0.0 stays 0.0"
    if quick is not None:
        assert quick.row == row and quick.sizes == (len(row.prompt_ids), len(row.response_ids))


def test_no_changed_byte_of_a_line_passes() -> None:
    line = encode_row(Row('a\\"b', [1, 20], [3, 0, 5], 0.5, 0, 1.0, 7, "stop", "cafe"))
    for place in range(len(line) - 1):
        for bit in (1, 2, 16, 32):
            changed = line[:place] + bytes([line[place] ^ bit]) + line[place + 1 :]
            with pytest.raises(ValueError):
                decode_row(changed)


@pytest.mark.parametrize("ids", ["1,,2", "01,2", "1,2,", ",1", "", "1 ,2", "-1", "1.0", "2147483648"])
def test_numbers_in_another_form_are_not_taken_though_the_checksum_fits(ids: str) -> None:
    sound = encode_row(Row("a", [1, 2], [3], 0.5, 0, 1.0, 7, "stop", "cafe"))
    body = f'"id":"a","prompt_ids":[{ids}],"response_ids":[3]'.encode()
    quick = quick_line(sound)
    assert quick is not None
    line = b'{%b,%b,"checksum":"%b"}' % (body, quick.rest.text, quick.rest.checksum(body))
    assert quick_line(line) is None
    with pytest.raises(ValueError):
        decode_row(line)


# -- rows of a file ----------------------------------------------------------------------------------------------------
def some(count: int, first: int = 0) -> list[Row]:
    return [
        Row(f"r{i}", [i, 1], list(range(1 + i % 4)), 0.7 * (i % 2), 0, 1.0, i, "stop", "cafe", i % 3)
        for i in range(first, first + count)
    ]


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file has an index, however short."""
    monkeypatch.setattr("redraft.data.store.INDEXED_FROM", 1)


def write(path: Path, rows: Sequence[Row]) -> bytes:
    with RowWriter(path) as writer:
        writer.append(rows)
    return path.read_bytes()


@pytest.fixture
def read_lines(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The lines that were taken apart when files were opened."""
    found: list[bytes] = []
    known = table.Table._take
    monkeypatch.setattr(table.Table, "_take", lambda self, line: found.append(line) or known(self, line))
    return found


def test_a_sequence_of_rows_that_are_read_when_they_are_looked_at(tmp_path: Path, monkeypatch: Any) -> None:
    rows, path = some(9), tmp_path / "r.jsonl"
    write(path, rows)
    stored = read_rows(path)
    reads: list[int] = []
    known = table.Table._read
    monkeypatch.setattr(table.Table, "_read", lambda self, index: reads.append(index) or known(self, index))
    every = list(stored)
    assert [row.key for row in every] == [row.key for row in rows] and len({row.key for row in rows}) == 9
    assert [sizes(row) for row in every] == [sizes(row) for row in rows]
    assert [(anchors(row), whole_length(row)) for row in every] == [(anchors(row), whole_length(row)) for row in rows]
    assert [row.temperature for row in every[-2:]] == [0.7, 0.0] and stored[-1].id == "r8"
    supervised = stored.where(stored.response_tokens > 1)
    assert [row.id for row in supervised] == [row.id for row in rows if anchors(row)]
    assert sorted(how.turn for how in supervised[:2].hows) == [1, 2]
    assert reads == [], "nothing of that needs a look at the file"
    assert every == rows and stored == rows and stored[2:5] == rows[2:5] and supervised[-1] == rows[7] and reads
    assert stored != rows[:-1] and stored != [*rows[:-1], rows[0]]
    assert stored.get("r4@T0#1") == rows[4] and stored.get("r4@T0") is None
    assert every[3].called("other") == replace(rows[3], id="other")
    assert replace(every[3], seed=9) == replace(rows[3], seed=9)
    for copied in (pickle.loads(pickle.dumps(every[3])), copy.deepcopy(every[3])):
        assert copied == rows[3] and type(copied) is Row


def test_rows_of_one_number_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redraft.data.table.UNSORTED", 3)
    for module in ("table", "store", "stored"):
        monkeypatch.setattr(f"redraft.data.{module}.name_of", lambda key: len(key) % 2)
    rows, path = some(12), tmp_path / "r.jsonl"
    with RowWriter(path) as writer:
        for row in rows:
            assert writer.rows.get(row.key) is None
            writer.append([row])
            assert all(writer.rows.get(one.key) == one for one in rows[: len(writer.rows)])
        with pytest.raises(ValueError, match=r"row r7@T0.7#1 is already stored"):
            writer.append(rows[7:8])
        with pytest.raises(ValueError, match=r"row x@T0 is already stored"):
            writer.append([replace(row, id="x", turn=0, temperature=0.0) for row in rows[:2]])
    assert read_rows(path) == rows


def test_a_line_that_changes_while_its_file_is_open_is_told_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    data = write(path, some(6))
    rows = read_rows(path)
    start = data.index(b'"id":"r3"')
    with open(path, "rb+") as file:
        file.seek(data.index(b"[3,1]", start) + 1)
        file.write(b"4")
    assert rows[2] == some(6)[2]
    with pytest.raises(UserError, match=r"r\.jsonl:4: the checksum does not fit; delete it and run"):
        assert rows[3].prompt_ids
    with open(path, "rb+") as file:
        file.truncate(start)
    with pytest.raises(UserError, match=r"r\.jsonl:4: not JSON"):
        assert rows[3].prompt_ids


# -- the index ---------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("indexed")
def test_what_the_index_knows_is_not_read_again(tmp_path: Path, read_lines: list[bytes]) -> None:
    path, rows = tmp_path / "r.jsonl", some(8)
    write(path, rows)
    assert index_path(path).is_file() and read_rows(path) == rows and read_lines == []
    more = some(3, first=8)
    with open(path, "ab") as file:  # a program that knows of no index, and was killed
        file.write(b"\n" + b"".join(map(encode_row, more)) + encode_row(some(1, first=20)[0])[:-9])
    with RowWriter(path) as writer:
        assert writer.rows == [*rows, *more] and len(read_lines) == 4
        with pytest.raises(ValueError, match="already stored"):
            writer.append(rows[2:3])
        writer.append(some(1, first=11))
    read_lines.clear()
    assert read_rows(path) == some(12) and read_lines == []
    again = plain_line(rows[1])
    with open(path, "ab") as file:
        file.write(again)
    with pytest.raises(UserError, match=r"r\.jsonl:14: row r1@T0.7#1 is already on line 2; delete one"):
        read_rows(path)


@pytest.mark.usefixtures("indexed")
def test_damage_to_rows_is_told_whatever_the_index_says(tmp_path: Path) -> None:
    path, rows = tmp_path / "r.jsonl", some(5)
    data = write(path, rows)
    ends = [place + 1 for place, byte in enumerate(data) if byte == ord("\n")]
    for place in range(0, len(data) - 1, 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
        line = sum(end <= place for end in ends) + 1
        for use in (read_rows, RowWriter):
            with pytest.raises(UserError, match=rf"r\.jsonl:{line}: "):
                use(path)
    path.write_bytes(data[: ends[2]])
    assert read_rows(path) == rows[:3]
    path.write_bytes(data[ends[0] :] + data[: ends[0]])
    assert read_rows(path) == [*rows[1:], rows[0]]


def nothing(path: Path, other: Path) -> None:
    path.unlink()


def cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def swapped(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def flipped(place: int) -> Callable[[Path, Path], None]:
    def flip(path: Path, other: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place % len(data)] ^= 1
        path.write_bytes(data)

    return flip


@pytest.mark.usefixtures("indexed")
@pytest.mark.parametrize("spoil", [nothing, cut, swapped, empty, folder, *map(flipped, range(-600, 700, 37))])
def test_a_spoilt_index_costs_nothing_but_time(spoil: Callable[[Path, Path], None], tmp_path: Path) -> None:
    path, other, rows = tmp_path / "r.jsonl", tmp_path / "other.jsonl", some(6)
    write(path, rows)
    write(other, [replace(row, id=f"{row.id}x") for row in rows])
    spoil(index_path(path), index_path(other))
    assert read_rows(path) == rows
    with RowWriter(path) as writer:
        assert writer.rows == rows and writer.rows.get("r5@T0.7#2") == rows[5]
        writer.append(some(1, first=6))
    assert read_rows(path) == some(7)


def test_a_long_run_keeps_its_index_while_it_writes(tmp_path: Path, monkeypatch: Any, read_lines: list[bytes]) -> None:
    monkeypatch.setattr("redraft.data.store.INDEXED_FROM", 8)
    path = tmp_path / "r.jsonl"
    writer = RowWriter(path)
    known = []
    for number in range(30):
        writer.append(some(1, first=number))
        read_lines.clear()
        assert len(read_rows(path)) == number + 1
        known.append(number + 1 - len(read_lines))
    assert known[:7] == [0] * 7 and known[7] == 8, "short files have none"
    assert sorted(set(known)) == [0, 8, 12, 18, 27], "half as many more each time"
    with writer:
        pass
    read_lines.clear()
    assert len(read_rows(path)) == 30 and read_lines == []


@pytest.mark.usefixtures("indexed")
def test_a_disk_without_room_for_an_index_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("redraft.data.table.save_file", full)
    write(path, some(4))
    assert not index_path(path).exists() and [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]
    assert read_rows(path) == some(4)


@pytest.mark.usefixtures("indexed")
def test_a_new_file_has_no_index_of_one_that_was_there_before(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, some(4))
    path.unlink()
    with RowWriter(path) as writer:
        assert not index_path(path).exists() and not writer.rows


def test_a_file_of_certain_rows_is_written_whole_and_only_where_it_differs(tmp_path: Path) -> None:
    path, rows = tmp_path / "r.jsonl", some(5)
    assert write_rows(path, rows) == path.stat().st_size and path.read_bytes() == b"".join(map(plain_line, rows))
    before = path.stat().st_ino
    assert write_rows(path, read_rows(path)) == 0 and path.stat().st_ino == before
    stored = read_rows(path)
    assert write_rows(path, stored[1:]) and read_rows(path) == rows[1:], "its own rows, too, may take its place"


def test_rows_out_of_memory_are_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = spooled(iter(some(20)))
    assert found == some(20) and found.get("r7@T0.7#1") == some(20)[7] and list(tmp_path.iterdir()) == []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="cannot write .*none"):
        spooled(some(1))


def test_memory_of_a_row_is_some_sixty_bytes(tmp_path: Path) -> None:
    rows = [Row(f"prompt-{i}", [7] * 50, [8] * 50, 0.0, 0, 1.0, 0, "stop", "cafe") for i in range(2000)]
    write(tmp_path / "r.jsonl", rows)
    found = read_rows(tmp_path / "r.jsonl").table
    held = sum(getattr(found, name).buffer_info()[1] * getattr(found, name).itemsize for name in table.COLUMNS)
    assert (held + len(found.ids)) / 2000 < 64
    assert len(found.known) == 1 and not found._recent


def test_rows_that_were_read_last_are_kept_up_to_a_number_of_tokens(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("redraft.data.table.RECENT_TOKENS", 40)
    write(tmp_path / "r.jsonl", some(50))
    found = read_rows(tmp_path / "r.jsonl")
    for row in found:
        assert row.response_ids is row.response_ids
        assert sum(sum(kept.sizes) for kept in found.table._recent.values()) <= 40


def test_what_is_kept_of_ways_to_draw_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lines, table):
        monkeypatch.setattr(module, "MOST_RESTS", 4)
    rows, path = some(40), tmp_path / "r.jsonl"  # a seed of its own each
    write(path, rows)
    found = read_rows(path)
    assert found == rows and len(found.table._numbers_of) <= 4 and len(found.hows) == 6
    assert np.array_equal(found.prompt_tokens, [2] * 40)
