"""The one reader of files: whatever lies in a file's place, and JSON and YAML that no writer of ours makes."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from redraft.data.lines import checksum
from redraft.data.store import Row, encode_row, read_rows
from redraft.errors import UserError
from redraft.inputs import (
    MOST_DEEP,
    json_lines,
    load_yaml,
    loads,
    read_bytes,
    read_json,
    read_text,
    read_yaml,
    require_file,
    typed,
)


def refused(call, *parts: str) -> None:
    """One line of words that holds these parts."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text.isprintable() and all(part in text for part in parts), text


# -- what lies there ---------------------------------------------------------------------------------------------------
def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda path: None, "does not exist; name another"),
        (lambda path: path.mkdir(), "is a folder"),
        (os.mkfifo, "no ordinary file"),
        (_socket, "no ordinary file"),
        (lambda path: path.symlink_to("/dev/zero"), "no ordinary file"),
        (lambda path: path.symlink_to("nowhere"), "does not exist"),
        (lambda path: path.symlink_to("a.json"), "cannot be read"),
    ],
    ids=["nothing", "folder", "pipe", "socket", "device", "dangling", "loop"],
)
def test_what_is_no_file_is_not_waited_for(tmp_path, monkeypatch, make, said):
    monkeypatch.chdir(tmp_path)
    path = Path("a.json")
    make(path)
    for read in (require_file, read_bytes, read_text):
        refused(lambda read=read: read(path, "name another"), "a.json", said)
    refused(lambda: read_json(path), "a.json")


def test_a_name_that_is_no_name_is_one_line(tmp_path):
    refused(lambda: read_text("a\0b"), "a\\x00b")
    refused(lambda: read_text(tmp_path / ("x" * 300)), "xxx")
    refused(lambda: read_text(tmp_path / "two\nlines"), "two\\nlines")
    refused(lambda: read_text(tmp_path / "file" / "below"), "does not exist")


def test_a_packed_file_unpacks_to_so_much_and_no_more(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(5000)))
    assert read_bytes(path, most=5000) == bytes(5000)
    refused(lambda: read_bytes(path, most=4999), "a.jsonl.gz unpacks to more than 4,999 bytes")
    plain = tmp_path / "a.jsonl"
    plain.touch()
    os.truncate(plain, 1 << 40)
    refused(lambda: read_bytes(plain), "1,099,511,627,776 bytes")
    for data in (b"plain", gzip.compress(b"cut off")[:-6], gzip.compress(b"text" * 99)[:20] + b"x" * 30):
        path.write_bytes(data)
        refused(lambda: read_bytes(path), "cannot read", "a.jsonl.gz")


def test_text_is_utf_8_without_zeros(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfline\r\n")
    assert read_text(path) == "line\r\n"
    path.write_bytes(b"one\ntwo \xe9\n")
    refused(lambda: read_text(path), "a.txt is not UTF-8", "line 2")
    path.write_bytes("text".encode("utf-16"))
    refused(lambda: read_text(path), "a.txt is not UTF-8")
    path.write_bytes(b"one\ntw\0o\n")
    refused(lambda: read_text(path), "a.txt", "a zero in line 2")


# -- JSON --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, said",
    [
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": [-Infinity]}', "-Infinity is no number"),
        ('{"a": 1e999}', "1e999 is beyond"),
        (f'{{"a": {"9" * 5000}}}', "5,000 digits is beyond"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"a": {"b": 1, "b": true}}', "'b' twice"),
        ('{"a": "\\ud83d"}', "half a character"),
        ("[" * (MOST_DEEP + 2) + "]" * (MOST_DEEP + 2), "nested too deeply"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
    ],
)
def test_json_that_nobody_can_mean(text, said, tmp_path):
    with pytest.raises(ValueError, match=said) as caught:
        loads(text)
    assert not isinstance(caught.value, json.JSONDecodeError)
    (tmp_path / "a.json").write_text(text)
    refused(lambda: read_json(tmp_path / "a.json"), "a.json is no JSON that can be read", said)


def test_json_as_other_programs_write_it():
    assert loads('{"a": [1, Infinity]}', finite=False) == {"a": [1, float("inf")]}
    assert loads('{"a": [1], "a": [1]}') == {"a": [1]}
    assert loads('"\\ud83d\\ude00 \\\\ud83d"') == "\U0001f600 \\ud83d"
    assert loads("[" * MOST_DEEP + "]" * MOST_DEEP)
    assert loads("9" * 300) == int("9" * 300)


def test_lines_of_json_and_a_torn_last_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": "\u2028"}\r\n\n{"b": "é'.encode()[:-1])
    assert list(json_lines(path, torn=True)) == [(1, {"a": "\u2028"})]
    refused(lambda: list(json_lines(path)), "a.jsonl is not UTF-8")
    path.write_text('{"a": 1}\n{"b"\n{"c": 1}')
    for torn in (True, False):
        refused(lambda torn=torn: list(json_lines(path, torn=torn)), "a.jsonl:2: not JSON")
    path.write_text('{"a": 1}\n[[[')
    refused(lambda: list(json_lines(path, torn=True)), "a.jsonl:2: not JSON")
    path.write_text('{"a": 1}\n{"c": 1}')
    assert [value for _, value in json_lines(path, torn=True)] == [{"a": 1}, {"c": 1}]


@pytest.mark.parametrize("value", [True, "3", 3.5, None, [3], -1, 2**70])
def test_types_are_strict_and_told_by_their_place(value):
    whole = Annotated[int, Field(ge=0, lt=2**63)]
    assert typed(dict[str, whole], {"a": 3}, "f.json") == {"a": 3}
    refused(lambda: typed(dict[str, whole], {"a": value}, "f.json", "mend it"), "f.json: a: ", "; mend it")


# -- YAML --------------------------------------------------------------------------------------------------------------
def test_aliases_may_stand_for_what_they_name_and_not_for_more_than_is_there(tmp_path):
    assert load_yaml("a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 6)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    refused(lambda: read_yaml(tmp_path / "a.yaml", "settings"), "a.yaml is not YAML", "aliases")
    (tmp_path / "a.yaml").write_text("a: &x [*x]")
    refused(lambda: read_yaml(tmp_path / "a.yaml", "settings"), "a.yaml is not YAML", "within what it names")


@pytest.mark.parametrize("text", ["a: 1\na: 2", "\ta: 1", "a: [" * 3000, "a: 'x", "a: !!python/name:os.x", "- 1", "3"])
def test_yaml_that_holds_no_settings(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    refused(lambda: read_yaml(tmp_path / "a.yaml", "settings"), "a.yaml")


def test_a_settings_file_of_megabytes_is_another_file(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 1\n" + "# text\n" * 100_000)
    refused(lambda: read_yaml(tmp_path / "a.yaml", "settings"), "a.yaml has 700,005 bytes")


# -- rows: the checksum is right and what it seals is not --------------------------------------------------------------
ROW = Row("a", [1, 2], [3, 4], 0.0, 0, 1.0, 7, "stop", "hash")


@pytest.mark.parametrize(
    "name, value",
    [
        ("prompt_ids", [1, True]),
        ("prompt_ids", [1, 2.0]),
        ("prompt_ids", "12"),
        ("response_ids", [-1]),
        ("response_ids", [2**31]),
        ("response_ids", [None]),
        ("response_ids", []),
        ("temperature", True),
        ("temperature", "0"),
        ("temperature", -0.5),
        ("top_p", 2),
        ("top_k", 1.5),
        ("seed", None),
        ("turn", -1),
        ("id", 3),
        ("target_hash", None),
        ("finish_reason", ["stop"]),
    ],
)
def test_a_row_of_wrong_types_is_refused_though_its_checksum_is_right(name, value, tmp_path):
    path, sound = tmp_path / "r.jsonl", encode_row(ROW)
    path.write_bytes(sound)
    assert read_rows(path) == [ROW]
    for end in (b"\n", b""):
        fields = {**vars(ROW), "id": "b", name: value}
        wrong = json.dumps(fields | {"checksum": checksum(fields)}).encode()
        path.write_bytes(sound + wrong + end)
        refused(lambda: read_rows(path), "r.jsonl:2")
