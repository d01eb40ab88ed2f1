"""Rows of every shape: the table of docs/text.md is true, and what stands beside the turns gets into the prompt."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from redraft.data.prompts import prompt_messages, read_conversations
from redraft.data.shapes import Conversation, parse_conversation, row_of
from redraft.data.template import template_ids
from redraft.errors import UserError

DOCS = Path(__file__).resolve().parents[2] / "docs" / "text.md"
TABLE = re.findall(r"^\| ([^|`]+) \| `(.+?)` \| (.+?) \| .*\|$", DOCS.read_text(), re.M)

WITH_TOOLS = (
    "{% if tools %}<|im_start|>tools {{ tools | map(attribute='function.name') | join(' ') }}\n{% endif %}"
    "{% for m in messages %}{% if m.role != 'developer' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments.city }}{% endfor %}"
    "<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = [{"role": "user", "content": "so?"}]
TOOL = {"type": "function", "function": {"name": "tides", "parameters": {}}}
CALL = {"function": {"name": "tides", "arguments": '{"city": "Dover"}'}}


def told(conversation: Conversation) -> str:
    """A conversation in the words of the table."""
    parts = []
    for message in conversation.messages:
        text = f"{message['role']} {json.dumps(message['content'])}"
        if "reasoning_content" in message:
            text += f" after {json.dumps(message['reasoning_content'])}"
        if "tool_calls" in message:
            text += " calling " + " ".join(call["function"]["name"] for call in message["tool_calls"])
        parts.append(text)
    if conversation.tools:
        parts.append("tools " + " ".join(tool["function"]["name"] for tool in conversation.tools))
    parts += [f"{name}={json.dumps(value)}" for name, value in conversation.arguments.items()]
    return ", ".join(parts)


def test_the_table_is_all_there() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("|")]
    assert len(TABLE) == len(rows) - 2 >= 20


@pytest.mark.parametrize(("name", "row", "becomes"), TABLE, ids=[row[0] for row in TABLE])
def test_a_row_is_read_as_the_table_says(name: str, row: str, becomes: str) -> None:
    item = json.loads(row)
    refused = re.fullmatch(r"refused `(.+)`", becomes)
    if refused:
        with pytest.raises(ValueError, match=re.escape(refused[1])):
            parse_conversation(item, "d")
        return
    found = parse_conversation(item, "d")
    assert f"`{told(found)}`" == becomes
    assert parse_conversation(row_of(found), "other") == found


def read(tmp_path: Path, item: Any) -> Conversation:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(item) + "\n")
    return read_conversations(path)[0]


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"messages": ASK, "tools": "no JSON"}, '"tools" is neither an object nor its JSON text'),
        ({"messages": ASK, "tools": [{"type": "web_search"}]}, "no function tool as OpenAI writes them"),
        ({"messages": ASK, "tools": [{"name": "a", "input_schema": {}}]}, "no function tool as OpenAI writes them"),
        ({"messages": ASK, "tools": [TOOL], "functions": [TOOL["function"]]}, 'both "tools" and "functions"'),
        ({"messages": ASK, "tools": [TOOL], "tool_choice": "none"}, 'tool_choice "none"'),
        ({"messages": ASK, "chat_template_kwargs": [1]}, '"chat_template_kwargs" must be an object'),
        ({"messages": ASK, "chat_template_kwargs": {"tokenize": False}}, "tokenize is no argument of a chat template"),
        ({"messages": ASK, "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": [*ASK, {"role": "assistant", "content": None}]}, "must be text, not null"),
        ({"messages": [*ASK, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, "name its function"),
        ({"messages": [{"role": "user", "content": "x", "images": ["a"]}]}, 'the key "images" of a turn'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]}, '"image_url"'),
        (
            {"messages": [*ASK, {"role": "assistant", "content": "x", "reasoning": "a", "reasoning_content": "b"}]},
            "two different thoughts, in reasoning_content and reasoning",
        ),
        ({"messages": [*ASK, {"role": "assistant", "content": "x", "reasoning_details": [1]}]}, "reasoning_details"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{"}]}, "JSON text"),
        ({"instruction": "a", "input": "b", "context": "c"}, 'both "input" and "context"'),
        ({"instruction": "a", "history": ["b"]}, '"history" must be a list of [question, answer]'),
        ({"instruction": "a", "output": "b", "response": "c"}, "two answers, in response and output"),
        ({"question": "a", "prompt": "b"}, 'both "question" and "prompt"'),
        ({"data": [1]}, '"data" must be a list of texts'),
    ],
)
def test_what_cannot_be_read_is_named_with_file_and_line(tmp_path: Path, item: Any, text: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, item)
    assert text in str(caught.value) and "p.jsonl:1: " in str(caught.value) and "\n" not in str(caught.value)


def test_tools_and_calls_stand_in_the_prompt_and_reach_every_turn(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = WITH_TOOLS
    talk = read(tmp_path, {"messages": [*ASK, *ASK], "tools": json.dumps([TOOL["function"]])})
    assert talk.tools == [TOOL]
    for replies in ([], [{"role": "assistant", "content": "", "tool_calls": [CALL]}]):
        text = tiny_tokenizer.decode(template_ids(tiny_tokenizer, "a", prompt_messages(talk, replies)))
        assert text.startswith("<|im_start|>tools tides\n") and text.count("so?") == len(replies) + 1
    called = parse_conversation({"messages": [*ASK, {"role": "assistant", "tool_calls": [CALL]}, *ASK]}, "a")
    assert "CALL tides Dover" in tiny_tokenizer.decode(
        template_ids(tiny_tokenizer, "a", called.turns(called.messages)), skip_special_tokens=True
    )


@pytest.mark.parametrize(
    ("item", "lost"),
    [
        ({"messages": [{"role": "developer", "content": "so?"}, *ASK]}, "its developer turn"),
        ({"messages": ASK, "tools": [TOOL]}, "its tools"),
        ({"messages": [*ASK, {"role": "assistant", "content": "a", "tool_calls": [CALL]}, *ASK]}, "the tool call"),
    ],
)
def test_what_a_template_leaves_out_is_refused(tiny_tokenizer: Any, item: Any, lost: str) -> None:
    """The words of the turn that is left out stand elsewhere in the prompt, and the name of the tool nowhere."""
    tiny_tokenizer.chat_template = WITH_TOOLS[WITH_TOOLS.index("{% for m") :].replace("CALL {{ c.function.name }}", "")
    talk = parse_conversation(item, "a")
    with pytest.raises(UserError, match=rf"leaves out {lost}.*\(conversation a\)"):
        template_ids(tiny_tokenizer, "a", talk.turns(talk.messages))
