"""The normaliser of prompt files: every shape, and every kind of bad input with its file and line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.data.prompts import check_length, prompt_messages, read_conversations, user_turns
from redraft.data.shapes import Conversation
from redraft.errors import UserError

USER = {"role": "user", "content": "how many?"}
MESSAGES = {"id": "a", "messages": [{"role": "system", "content": "be brief"}, USER]}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


def write(path: Path, *items: Any) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_every_shape_in_one_file(tmp_path: Path) -> None:
    found = read_conversations(write(tmp_path / "mixed.jsonl", MESSAGES, SHAREGPT, ALPACA))
    assert [c.id for c in found] == ["a", "mixed/2", "mixed/3"]
    assert found[0].messages == MESSAGES["messages"]
    assert found[1].messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert found[2].messages[0] == {"role": "user", "content": "Add.\n\n1 and 2"}
    assert found[2].messages[1] == {"role": "assistant", "content": "3"}


def test_array_text_and_gzip_give_the_same_conversations(tmp_path: Path) -> None:
    array = tmp_path / "p.json"
    array.write_text(json.dumps([MESSAGES, SHAREGPT], indent=1))
    assert read_conversations(array) == read_conversations(write(tmp_path / "p.jsonl", MESSAGES, SHAREGPT))
    packed = tmp_path / "p.json.gz"
    packed.write_bytes(gzip.compress(array.read_bytes()))
    assert read_conversations(packed) == read_conversations(array)
    text = tmp_path / "lines.txt"
    text.write_text("first one\n\n  second \n")
    assert read_conversations(text) == [
        Conversation("lines/1", [{"role": "user", "content": "first one"}]),
        Conversation("lines/3", [{"role": "user", "content": "second"}]),
    ]


def test_byte_order_mark_blank_lines_line_separators_and_content_parts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a\u2028b"}]}]}
    path.write_text("\ufeff\n" + json.dumps(parts, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read_conversations(path)[0].messages == [{"role": "user", "content": "a\u2028b"}]


def test_numbers_as_ids(tmp_path: Path) -> None:
    assert read_conversations(write(tmp_path / "p.jsonl", {**MESSAGES, "id": 0}))[0].id == "0"


BAD = {
    "broken JSON": ('{"messages": [}', r"p\.jsonl:2: not JSON"),
    "not an object": ("17", r"p\.jsonl:2: a prompt must be a JSON object, not 17"),
    "unknown shape": ('{"text": "x"}', r'p\.jsonl:2: no "messages".*its keys: text'),
    "unknown role": ('{"messages": [{"role": "wizard", "content": "x"}]}', r'p\.jsonl:2: unknown role "wizard"'),
    "role that is no text": ('{"messages": [{"role": ["user"], "content": "x"}]}', r"p\.jsonl:2: unknown role"),
    "no user turn": ('{"messages": [{"role": "system", "content": "x"}]}', r"p\.jsonl:2: .*no user turn"),
    "no turns": ('{"conversations": []}', r"p\.jsonl:2: .*no user turn"),
    "turns that are no list": ('{"messages": "hello"}', r"p\.jsonl:2: .*must be a list"),
    "empty user turn": ('{"messages": [{"role": "user", "content": " "}]}', r"p\.jsonl:2: a user turn is empty"),
    "an answer of no parts": (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": []}]}',
        r"p\.jsonl:2: the content of a turn must be text, not \[\]",
    ),
    "content that is no text": ('{"messages": [{"role": "user", "content": 5}]}', r"p\.jsonl:2: the content of a turn"),
    "odd id": ('{"id": {}, "instruction": "x"}', r"p\.jsonl:2: the id must be"),
    "id twice": (json.dumps(MESSAGES), r"p\.jsonl:2: id 'a' is already at .*p\.jsonl:1"),
}


@pytest.mark.parametrize("line,message", BAD.values(), ids=BAD.keys())
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "p.jsonl", MESSAGES)
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_conversations(path)
    assert "\n" not in str(caught.value)


def test_a_bad_array_names_line_or_item(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('[\n{"instruction": "x"},\n{"instruction": }\n]')
    with pytest.raises(UserError, match=r"p\.json:3: not JSON"):
        read_conversations(path)
    path.write_text('[{"instruction": "x"}, {"nothing": 1}]')
    with pytest.raises(UserError, match=r"p\.json: item 2: no \"messages\""):
        read_conversations(path)


@pytest.mark.parametrize(
    "name,data,message",
    [
        ("p.jsonl", b"", "is empty"),
        ("p.jsonl", b"\n\n", "is empty"),
        ("p.json", b"[]", "is empty"),
        ("p.txt", b" \n", "is empty"),
        ("p.jsonl", b"\xff\xfe{", "not UTF-8"),
        ("p.jsonl.gz", b"not gzip", "cannot read"),
        ("p.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "cannot read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_conversations(tmp_path / name)


def test_a_line_of_null_is_no_prompt_and_is_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\nnull\n')
    with pytest.raises(UserError, match=r"p\.jsonl:2: a prompt must be a JSON object, not null"):
        read_conversations(tmp_path / "p.jsonl")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        read_conversations(tmp_path)


def test_reference_answers_are_left_out_and_replies_go_behind_every_user_turn() -> None:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    conversation = Conversation(
        "c", [turn("system", "s"), turn("user", "1"), turn("assistant", "ref"), turn("user", "2"), turn("user", "3")]
    )
    assert [m["content"] for m in prompt_messages(conversation, ["", ""]) if m["content"]] == ["s", "1", "2", "3"]
    assert user_turns(conversation) == 3
    assert [m["content"] for m in prompt_messages(conversation, [])] == ["s", "1"]
    third = prompt_messages(conversation, ["A", "B"])
    assert [(m["role"], m["content"]) for m in third] == [
        ("system", "s"),
        ("user", "1"),
        ("assistant", "A"),
        ("user", "2"),
        ("assistant", "B"),
        ("user", "3"),
    ]
    with pytest.raises(ValueError, match="no user turn after 3"):
        prompt_messages(conversation, ["A", "B", "C"])


def test_a_prompt_longer_than_the_context_is_refused_and_one_that_just_fits_is_not() -> None:
    check_length("k", 12, 4, 16)
    check_length("k", 10**9, 4, None)
    with pytest.raises(UserError, match="prompt k has 13 tokens.*context of 16"):
        check_length("k", 13, 4, 16)


def test_a_data_set_name_without_the_library_or_the_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"redraft\[datasets\]|cannot read datasets:"):
        read_conversations(f"datasets:{tmp_path}/nothing-here")


def test_nulls_that_a_tables_columns_put_into_tools_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set has one set of columns for all rows, down into objects: what a tool lacks comes as null."""
    tools = [
        {
            "type": "function",
            "function": {"name": "a", "parameters": {"properties": {"x": {"type": "string"}, "y": None}}},
        },
        {"type": "function", "function": {"name": "b", "description": None, "parameters": {"properties": None}}},
    ]
    rows = [{"id": None, "messages": [USER | {"name": None, "tool_calls": None}], "tools": tools}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows))
    (found,) = read_conversations("datasets:some/name")
    assert found.messages == [USER]
    assert [tool["function"] for tool in found.tools] == [
        {"name": "a", "parameters": {"properties": {"x": {"type": "string"}}}},
        {"name": "b", "parameters": {}},
    ]
