"""Response files: checksums, torn ends, damage, two writers, full disks."""

from __future__ import annotations

import gzip
import json
import os
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from redraft.data.store import (
    Failure,
    Row,
    RowWriter,
    decode_row,
    encode_row,
    failures_path,
    read_rows,
    row_key,
    write_failures,
)
from redraft.errors import UserError

ROW = Row("a\u2028\u00e4", [1, 2], [3], 0.3, 0, 0.95, 7, "stop", "cafe")


def listed_failures(path: Path) -> list[Failure]:
    """What the file beside the response file ``path`` lists; nothing where there is none."""
    place = failures_path(path)
    return [Failure(**json.loads(line)) for line in place.read_text().splitlines()] if place.exists() else []


def rows(count: int) -> list[Row]:
    return [replace(ROW, id=f"r{i}", response_ids=list(range(i + 1)), turn=i % 2) for i in range(count)]


def write(path: Path, found: list[Row]) -> bytes:
    with RowWriter(path) as writer:
        writer.append(found)
    return path.read_bytes()


def test_a_row_survives_the_file(tmp_path: Path) -> None:
    found = [ROW, replace(ROW, turn=1), replace(ROW, temperature=0.0, finish_reason="length")]
    data = write(tmp_path / "r.jsonl", found)
    assert read_rows(tmp_path / "r.jsonl") == found
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(data))
    assert read_rows(tmp_path / "r.jsonl.gz") == found


def test_keys_tell_id_temperature_and_turn_apart() -> None:
    assert ROW.key == "a\u2028\u00e4@T0.3"
    keys = {row_key(i, t, n) for i in ("a", "a@T0", "a#1") for t in (0.0, 1.0, 0.7) for n in (0, 1, 11)}
    assert len(keys) == 27


@pytest.mark.parametrize("name", [n for n in json.loads(encode_row(ROW)) if n != "checksum"])
def test_the_checksum_covers_every_field(name: str) -> None:
    value = json.loads(encode_row(ROW))
    value[name] = [9] if isinstance(value[name], list) else "length" if name == "finish_reason" else 9
    with pytest.raises(ValueError, match="checksum"):
        decode_row(json.dumps(value).encode())
    del value[name]
    with pytest.raises(ValueError, match=f"no {name}"):
        decode_row(json.dumps(value).encode())


def test_cut_at_every_byte_the_writer_goes_on_with_no_row_lost_or_doubled(tmp_path: Path) -> None:
    found = rows(4)
    path = tmp_path / "r.jsonl"
    data = write(path, found)
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        # the line break itself may be what is missing: the row before it is whole then
        whole = sum(end - 1 <= cut for end in ends)
        if whole and cut + 1 >= ends[whole - 1] and data[:cut].rstrip() == data[: ends[whole - 1]].rstrip():
            assert read_rows(path) == found[:whole]
        else:
            with pytest.raises(UserError, match="is torn|holds no responses"):
                read_rows(path)
        with RowWriter(path) as writer:
            assert writer.rows == found[:whole]
            writer.append(found[whole:])
        assert path.read_bytes() == data


def test_a_new_file_that_gets_no_row_before_an_error_is_not_left(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyError), RowWriter(path):
        raise KeyError
    assert not path.exists()
    with RowWriter(path):
        pass
    with pytest.raises(KeyError), RowWriter(path) as writer:
        writer.append(rows(1))
        raise KeyError
    assert read_rows(path) == rows(1)


def test_damage_before_the_end_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    lines = write(path, rows(3)).splitlines(keepends=True)
    damaged = [lines[0], lines[1].replace(b'"seed":7', b'"seed":8'), lines[2]]
    path.write_bytes(b"".join(damaged))
    for use in (read_rows, RowWriter):
        with pytest.raises(UserError, match=r"r\.jsonl:2: the checksum does not fit"):
            use(path)
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    with pytest.raises(UserError, match=r"r\.jsonl:2: not JSON"):
        read_rows(path)
    path.write_bytes(lines[0] + lines[1] + lines[0])
    with pytest.raises(UserError, match=r"r\.jsonl:3: row r0@T0\.3 is already on line 1"):
        read_rows(path)


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="holds no responses"):
        read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match="cannot read"):
        read_rows(tmp_path / "bad.jsonl.gz")
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "messages": []}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: no prompt_ids, .*no line of a response file"):
        read_rows(tmp_path / "prompts.jsonl")


def test_the_writer_refuses_a_key_that_is_there(tmp_path: Path) -> None:
    data = write(tmp_path / "r.jsonl", rows(2))
    with RowWriter(tmp_path / "r.jsonl") as writer, pytest.raises(ValueError, match="already stored"):
        writer.append(rows(1))
    assert (tmp_path / "r.jsonl").read_bytes() == data


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with RowWriter(tmp_path / "r.jsonl"), pytest.raises(UserError, match="being written by another process"):
        RowWriter(tmp_path / "r.jsonl")
    with RowWriter(tmp_path / "r.jsonl"):
        pass


def test_a_full_disk_is_a_user_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10, 10, 0)
    with RowWriter(tmp_path / "r.jsonl") as writer:
        monkeypatch.setattr("redraft.files.shutil.disk_usage", lambda place: usage)
        with pytest.raises(UserError, match="no room on the disk"):
            writer.append(rows(1))
    assert (tmp_path / "r.jsonl").read_bytes() == b""


def test_failures_are_listed_beside_the_rows_and_vanish_when_mended(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    assert listed_failures(path) == []
    listed = [Failure("a@T0", "status 400"), Failure("b@T0", "no connection", permanent=False)]
    write_failures(path, listed)
    assert failures_path(path).name == "r.failures.jsonl"
    assert listed_failures(path) == listed
    write_failures(path, [])
    assert not failures_path(path).exists()


def test_a_packed_file_of_a_size_that_nobody_packs_is_not_gone_through(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(encode_row(ROW))
    assert len(read_rows(path)) == 1
    os.truncate(path, 1 << 40)
    with pytest.raises(UserError, match=r"r\.jsonl\.gz has 1,099,511,627,776 bytes, and at most"):
        read_rows(path)
