"""Keys and values of rows, records and settings that would change what an engine is sent without being seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.data.prompts import prompt_messages, read_conversations
from redraft.data.shapes import parse_conversation
from redraft.data.template import use_template
from redraft.data.traces import read_traces
from redraft.errors import UserError
from redraft.settings.base import read
from redraft.settings.runs import AdaptConfig
from redraft.settings.texts import parse_template_args

ASK = [{"role": "user", "content": "so?"}]
NEEDED = "target: t\ndraft: d\nprompts: p.jsonl\nout: run\n"


def texts(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in parse_conversation(row, "d").messages]


# -- rows ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"prompt": "Translate this.", "input": "Haus"}, "input"),
        ({"question": "Who?", "article": "Long ago."}, "article"),
        ({"question": "Which?", "opa": "x", "opb": "y"}, "opa"),
        ({"question": "How many?", "table": [["a", "b"]]}, "table"),
        ({"instruction": "Choose.", "options": {"A": "x"}}, "options"),
        ({"instruction": "Answer.", "question": "Why?"}, "question"),
        ({"prompt": "Say it.", "data": ["a", "b"]}, "prompt"),
        ({"messages": ASK, "prompt": "also?"}, "prompt"),
        ({"messages": ASK, "document": "It rains."}, "document"),
        ({"messages": ASK, "prompt": "Something else"}, "prompt"),
        ({"messages": ASK, "instructions": "Be brief."}, "instructions"),
        ({"messages": ASK, "reasoning": {"effort": "high"}}, "reasoning"),
        ({"messages": ASK, "thinking": {"type": "disabled"}}, "thinking"),
        ({"messages": ASK, "extra_body": {"documents": [{"text": "x"}]}}, "documents"),
        ({"messages": ASK, "extra_body": {"chosen": "x"}}, "chosen"),
        ({"messages": ASK, "tools": [{"name": "a"}], "extra_body": {"tools": [{"name": "b"}]}}, "tools"),
        ({"messages": ASK, "image_url": "a.png"}, "image_url"),
        ({"messages": [ASK[0] | {"attachments": ["a.pdf"]}]}, "attachments"),
        ({"prompt": "def f():", "suffix": "return x"}, "suffix"),
        ({"messages": ASK, "enable_thinking": "false"}, "enable_thinking"),
    ],
)
def test_what_would_be_lost_is_refused_by_its_key(row: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        parse_conversation(row, "d")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASK, "prompt": "<|im_start|>user\nso?<|im_end|>\n"},
        {"messages": ASK, "prompt": " so? ", "context": [1, 2], "options": {"temperature": 0}},
        {"instruction": "so?", "prompt": "Below is a task.\n\nso?\n\nAnswer:"},
        {"prompt": "so?", "input": "so", "hint": "", "choices": []},
        {"question": "so?", "reasoning": {"effort": None}},
        {"turns": ["so?"], "question_id": 81, "reference": []},
        {"instruction": "", "input": "so?"},
    ],
)
def test_what_repeats_or_says_nothing_is_passed_over(row: dict[str, Any]) -> None:
    assert texts(row) == [("user", "so?")]


def test_a_clients_extra_body_is_part_of_the_request() -> None:
    extra = {"tools": [{"name": "tides"}], "chat_template_kwargs": {"enable_thinking": False}}
    for given in (extra, json.dumps(extra)):
        found = parse_conversation({"messages": ASK, "extra_body": given}, "d")
        assert [tool["function"]["name"] for tool in found.tools] == ["tides"]
        assert found.arguments == {"enable_thinking": False}


def test_thoughts_in_a_key_of_the_row_belong_to_its_answer() -> None:
    row = {"question": "so?", "reasoning": "hm", "answer": "yes"}
    assert parse_conversation(row, "d").messages[-1] == {
        "role": "assistant", "content": "yes", "reasoning_content": "hm",
    }  # fmt: skip
    with pytest.raises(ValueError, match="two thoughts"):
        parse_conversation(row | {"thinking": "other"}, "d")


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_an_answer_that_is_not_to_be_learnt_is_marked(mark: dict[str, Any]) -> None:
    row = {"messages": [*ASK, {"role": "assistant", "content": "yes"} | mark]}
    assert parse_conversation(row, "d").messages[-1]["weight"] == 0


def test_what_an_assistant_says_before_any_question_stays_in_the_prompt() -> None:
    greeting = {"role": "assistant", "content": "Welcome."}
    talk = [greeting, *ASK, {"role": "assistant", "content": "yes"}, *ASK]
    found = prompt_messages(parse_conversation({"messages": talk}, "d"), ["no"])
    assert found == [greeting, *ASK, {"role": "assistant", "content": "no"}, *ASK]


# -- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "hi \\ud83d"}', ":2: .*half a character"),
        ("p.jsonl", '{"prompt": "a", "id": ' + "1" * 5000 + "}", ":1: no JSON that can be read"),
        ("p.txt", 'What is {x}?\n{"prompt": "a"}\n', ":2: a JSON row in a file of plain text"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(tmp_path: Path, name: str, text: str, why: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=why):
        read_conversations(tmp_path / name)


def test_a_pair_of_halves_and_braces_in_text_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "hi \\ud83d\\ude00"}')
    (tmp_path / "p.txt").write_text("{x} is a set\n{}\n")
    assert read_conversations(tmp_path / "p.jsonl")[0].messages[0]["content"] == "hi \U0001f600"
    assert len(read_conversations(tmp_path / "p.txt")) == 2


# -- records of served traffic -----------------------------------------------------------------------------------------
@pytest.fixture
def served(tmp_path: Path, tiny_tokenizer: Any) -> Callable[[Any], Any]:
    def read(record: Any) -> Any:
        (tmp_path / "served.jsonl").write_text(json.dumps(record))
        return read_traces(tmp_path / "served.jsonl", tiny_tokenizer, "cafe")[0]

    return read


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"response": "no"}, "two answers"),
        ({"usage": [1]}, '"usage" must be an object'),
        ({"usage": {"completion_tokens": "1"}}, '"usage" must be an object of whole numbers'),
        ({"top_k": 3.7}, "top_k must be a whole number"),
        ({"top_p": 1.5}, "top_p must be a number of 0 to 1"),
        ({"id": ["x"]}, "the id must be text"),
    ],
)
def test_records_that_contradict_themselves_are_refused(served: Any, more: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=f"served.jsonl:1: {why}"):
        served({"messages": ASK, "completion": "yes"} | more)


def test_thoughts_apart_from_raw_text_are_refused(served: Any) -> None:
    with pytest.raises(UserError, match='"reasoning_content" stands apart'):
        served({"prompt": "raw", "completion": "yes", "reasoning_content": "hm"})


def test_an_answer_is_the_same_wherever_a_log_has_it(served: Any) -> None:
    plain = served({"messages": ASK, "completion": "yes"})
    choices = {"choices": [{"message": {"role": "assistant", "content": "yes"}}]}
    for record in (
        {"prompt": ASK, "completion": "yes"},
        {"prompt": ASK, "completion": {"role": "assistant", "content": "yes"}},
        {"messages": ASK, "completion": "yes", "target_hash": None},
        {"messages": ASK, "response": choices},
        {"request": {"messages": ASK}, "response": {"status_code": 200, "body": choices}},
    ):
        assert served(record) == plain


def test_what_ended_a_response_may_stand_in_its_finish_reason(served: Any) -> None:
    record = {"messages": ASK, "completion": "yes"}
    body = served(record).response_ids[:-1]
    assert served(record | {"finish_reason": {"type": "stop", "matched": "\n"}}).response_ids == body
    assert served(record | {"finish_reason": {"type": "stop", "matched": 7}}).response_ids == [*body, 7]


@pytest.mark.parametrize("created", [0, "1711111122030", 1.7e12, True, "yesterday"])
def test_a_time_that_is_none_is_refused(served: Any, tiny_tokenizer: Any, created: Any) -> None:
    tiny_tokenizer.chat_template = "{{ strftime_now('%Y') }}\n" + tiny_tokenizer.chat_template
    with pytest.raises(UserError, match='"created" is no time of serving'):
        served({"messages": ASK, "completion": "yes", "created": created})


# -- template arguments ------------------------------------------------------------------------------------------------
KNOWS = SimpleNamespace(chat_template="{% if enable_thinking %}{% endif %}{% if mode == 'off' %}{% endif %}")


@pytest.mark.parametrize("value", ["off", "no", "FALSE", '"false"', "False", " false", '"0"'])
def test_a_word_that_a_template_takes_for_true_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="write true"):
        use_template(KNOWS, parse_template_args([f"enable_thinking={value}"]))


@pytest.mark.parametrize("name", ["thinking", "so", "be", "on"])
def test_a_name_in_a_text_or_of_a_turn_is_no_argument(name: str) -> None:
    text = "so {# be #}{% if message.thinking or message['thinking'] %}{{ 'on' }}{% endif %}"
    with pytest.raises(UserError, match="knows no argument"):
        use_template(SimpleNamespace(chat_template=text), {name: True})


def test_a_word_that_the_template_compares_is_handed_on() -> None:
    assert use_template(KNOWS, parse_template_args(["mode=off"])).arguments == {"mode": "off"}


def test_an_argument_has_one_value() -> None:
    assert parse_template_args(["a=1", "a=1", "b=NaN"]) == {"a": 1, "b": "NaN"}
    with pytest.raises(UserError, match="given twice"):
        parse_template_args(["a=1", "a=2"])
    with pytest.raises(UserError, match="JSON cannot hold"):
        use_template(KNOWS, {"mode": float("nan")})


# -- settings ----------------------------------------------------------------------------------------------------------
def settings(tmp_path: Path, more: str) -> Any:
    (tmp_path / "adapt.yaml").write_text(NEEDED + more)
    return read(AdaptConfig, tmp_path / "adapt.yaml")


def test_a_file_means_what_it_says(tmp_path: Path) -> None:
    found = settings(tmp_path, "template_arg: {date_string: 2024-07-26, at: 12:30, extra: {full-name: x}}\nbudget: 400")
    assert found.template_arg == {"date_string": "2024-07-26", "at": "12:30", "extra": {"full-name": "x"}}
    assert found.budget == "400"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("max_new_tokens: 1:30", "max-new-tokens"),
        ("temperatures: 0.7", r"temperatures must be a list, written \[a, b\]"),
        ("template_arg: a=1", "template-arg must hold settings as `name: value` lines"),
        ("temperatures: [0.7, 0.7]", "every temperature once, not 0.7, 0.7"),
        ("temperatures: []", "at least one temperature"),
        ("temperatures: [-1]", "temperature must be 0"),
        ("temperatures: [1]\ntop_p: 2", "top-p must lie in"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_anything_runs(tmp_path: Path, more: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        settings(tmp_path, more)


def test_temperatures_of_distillation_are_looked_at_too(tmp_path: Path) -> None:
    from redraft.settings.base import read
    from redraft.settings.runs import DistillConfig

    values = {"target": "t", "text": ("x",), "prompts": "p", "out": str(tmp_path)}
    with pytest.raises(UserError, match="every temperature once"):
        read(DistillConfig, None, values | {"temperatures": (1.0, 1.0)})
    with pytest.raises(UserError, match="every temperature once"):
        AdaptConfig(**{"target": "t", "draft": "d", "prompts": "p", "out": tmp_path, "temperatures": (0, 0)})
