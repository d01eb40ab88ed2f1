"""Suites: what is read from where, how rows become items, categories, turns, and bad input."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.adaptation.bench import suite_prompts
from redraft.data.shapes import Conversation
from redraft.data.suites import DATA_VARIABLE, load_suite, run_turns
from redraft.decode.engine import PlainDecoder
from redraft.errors import UserError
from redraft.evaluate.speed import Prompt
from redraft.registries import SUITES
from redraft.target import Target

# One row of each public source, with its own columns.
GSM8K = {"question": "Two and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}
HUMANEVAL = {
    "task_id": "HumanEval/7",
    "prompt": "def helper(x):\n    return x\n\ndef double(x):\n    '''twice x'''\n",
    "canonical_solution": "    return helper(x) * 2\n",
    "entry_point": "double",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to check a sum.",
    "code": "def check(a):\r\n  return a\r\ndef total(a):\r\n  return check(sum(a))",
    "test_list": ["assert total([1]) == 1", "assert total([]) == 0"],
}
PUBMEDQA = {
    "pubid": 5,
    "question": "Does it?",
    "context": {"contexts": ["It may.", "It did."], "labels": ["AIM", "RESULTS"]},
    "long_answer": "It does.",
    "final_decision": "yes",
}
MEDQUAD = {"question": "What is it?", "answer": "A thing."}
QUESTION = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}
HUB_QUESTION = {"prompt_id": 9, "category": "math", "prompt": ["Add.", "Twice."], "reference": ["", ""]}
ABILITY = {"task": "CM", "id": 3, "history": [{"user": "One?", "bot": "1"}, {"user": "Two?", "bot": "2"}]}


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def asked(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("name", "row", "id", "task", "prompts", "reference"),
    [
        ("gsm8k", GSM8K, "gsm8k/test/0", "gsm8k", ["Two and 3?"], "2+3=5\n#### 5"),
        ("humaneval", HUMANEVAL, "humaneval/7", "humaneval", None, "double"),
        ("mbpp", MBPP, "mbpp/11", "mbpp", None, "total"),
        ("pubmedqa", PUBMEDQA, "pubmedqa/5", "pubmedqa", None, "It does.\n\nAnswer: yes"),
        ("medquad", MEDQUAD, "medquad/0", "medquad", ["What is it?"], "A thing."),
        ("spec-bench", QUESTION, "spec_bench/writing/81", "spec-bench:mt_bench", ["Write.", "Again."], None),
        ("mt-bench", QUESTION, "mt_bench/writing/81", "mt-bench", ["Write.", "Again."], None),
        ("mt-bench", HUB_QUESTION, "mt_bench/math/9", "mt-bench", ["Add.", "Twice."], None),
        ("mtbench101", ABILITY, "mtbench101/CM/3", "mtbench101", ["One?", "Two?"], None),
    ],
)
def test_rows_of_the_public_sources(
    tmp_path: Path, name: str, row: Any, id: str, task: str, prompts: list[str] | None, reference: str | None
) -> None:
    (item,) = load_suite(f"{name}={write(tmp_path / 'rows.jsonl.gz', row)}").items
    assert (item.id, item.task, item.reference) == (id, task, reference)
    assert prompts is None or asked(item.conversation) == prompts


def test_what_the_prompts_of_code_and_abstracts_hold(tmp_path: Path) -> None:
    def prompt(name: str, row: Any) -> str:
        return asked(load_suite(f"{name}={write(tmp_path / 'r.jsonl', row)}").items[0].conversation)[0]

    assert "twice x" in prompt("humaneval", HUMANEVAL) and "helper(x) * 2" not in prompt("humaneval", HUMANEVAL)
    assert prompt("mbpp", MBPP).endswith("assert total([1]) == 1\nassert total([]) == 0")
    assert prompt("mbpp", {k: v for k, v in MBPP.items() if k != "text"} | {"prompt": "Sum."}).count("Sum.") == 1
    abstract = prompt("pubmedqa", PUBMEDQA)
    assert "AIM: It may.\nRESULTS: It did." in abstract and "It does." not in abstract


def test_rows_without_an_answer_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"question": "Why?", "answer": None}, MEDQUAD)
    assert [item.id for item in load_suite(f"medquad={path}").items] == ["medquad/1"]


def test_any_known_prompt_shape_will_do(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]},
        {"id": "b", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "#### 4"}]},
        {"id": "c", "instruction": "q", "output": "#### 5"},
    ]
    items = {item.id: item for item in load_suite(f"gsm8k={write(tmp_path / 'r.jsonl', *rows)}").items}
    assert {id: item.reference for id, item in items.items()} == {"a": None, "b": "#### 4", "c": "#### 5"}
    assert asked(items["a"].conversation) == ["s", "q"] and asked(items["b"].conversation) == ["q"]


def test_data_folder_by_argument_and_by_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one" / "math" / "gsm8k.test.jsonl.gz", GSM8K)
    path = write(tmp_path / "two" / "math" / "gsm8k.test.jsonl", GSM8K | {"question": "Other?"})
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "two"))
    assert load_suite("gsm8k").source == str(path)
    assert asked(load_suite("gsm8k", tmp_path / "one").items[0].conversation) == ["Two and 3?"]


@pytest.mark.parametrize(
    ("name", "row", "call"),
    [
        ("gsm8k", GSM8K, ("openai/gsm8k", "main", "test")),
        ("humaneval", HUMANEVAL, ("openai/openai_humaneval", None, "test")),
        ("mbpp", MBPP, ("google-research-datasets/mbpp", "full", "test")),
        ("pubmedqa", PUBMEDQA, ("qiaojin/PubMedQA", "pqa_labeled", "train")),
        ("medquad", MEDQUAD, ("lavita/MedQuAD", None, "train")),
        ("mt-bench", HUB_QUESTION, ("HuggingFaceH4/mt_bench_prompts", None, "train")),
    ],
)
def test_a_named_data_set_is_read_with_its_config_and_split(
    monkeypatch: pytest.MonkeyPatch, name: str, row: dict[str, Any], call: tuple[str, str | None, str]
) -> None:
    calls = []

    def load_dataset(repository: str, config: str | None, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert not streaming
        calls.append((repository, config, split))
        return [row]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    hub = SUITES.get(name).hub
    assert load_suite(f"{name}=datasets:{hub}").source == f"datasets:{hub}"
    assert calls == [call]


# -- categories and order --------------------------------------------------------------------------------------------
def spec_bench(tmp_path: Path, count: int = 4) -> Path:
    rows = [
        {"question_id": f"{category}-{i}", "category": category, "turns": [f"{category} {i}"]}
        for category in SUITES.get("spec-bench").groups
        for i in range(count)
    ]
    return write(tmp_path / "question.jsonl", *rows)


def test_categories_by_their_own_name_and_by_group(tmp_path: Path) -> None:
    path = spec_bench(tmp_path)
    tasks = Counter(item.task for item in load_suite(f"spec-bench={path}").items)
    assert tasks["spec-bench:mt_bench"] == 32 and tasks["spec-bench:qa"] == 4 and len(tasks) == 6
    group = load_suite(f"spec-bench:mt_bench={path}").items
    assert {item.task for item in group} == {"spec-bench:mt_bench"} and len(group) == 32
    alone = load_suite(f"spec-bench:writing={path}").items
    assert {item.task for item in alone} == {"spec-bench:writing"} and len(alone) == 4
    assert len(load_suite(f"mt-bench={path}").items) == 32
    assert {item.task for item in load_suite(f"mt-bench:math={path}").items} == {"mt-bench:math"}


def test_a_limit_has_its_share_of_every_task_and_category(tmp_path: Path) -> None:
    path = spec_bench(tmp_path)
    tasks = Counter(item.task for item in load_suite(f"spec-bench={path}", limit=12).items)
    assert set(tasks.values()) == {2}
    categories = Counter(item.id.split("/")[1] for item in load_suite(f"mt-bench={path}", limit=16).items)
    assert len(categories) == 8 and set(categories.values()) == {2}


def test_the_order_is_not_that_of_the_file(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "messages": [{"role": "user", "content": f"q{i}"}]} for i in range(30)]
    forward = load_suite(f"gsm8k={write(tmp_path / 'a.jsonl', *rows)}").items
    backward = load_suite(f"gsm8k={write(tmp_path / 'b.jsonl', *rows[::-1])}").items
    assert forward == backward and [item.id for item in forward] != [row["id"] for row in rows]


# -- turns -----------------------------------------------------------------------------------------------------------
def test_run_turns_puts_the_models_own_replies_between_the_turns() -> None:
    users = [{"role": "user", "content": text} for text in ("a", "b", "c")]
    conversation = Conversation("x", [{"role": "system", "content": "s"}, *users])
    given: list[list[str]] = []

    def reply(messages: list[dict[str, str]]) -> str:
        given.append([m["content"] for m in messages])
        return f"reply {len(given)}"

    turns = list(run_turns(conversation, reply))
    assert [len(turn) for turn in turns] == [2, 4, 6]
    assert [m["content"] for m in turns[-1]] == ["s", "a", "reply 1", "b", "reply 2", "c"]
    assert [m["role"] for m in turns[-1]] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert given == [["s", "a"], ["s", "a", "reply 1", "b"]]  # the last turn is the caller's to answer


def turn_prompts(texts: list[str], target: Target, new_tokens: int = 8) -> list[Prompt]:
    return suite_prompts([load_suite(text) for text in texts], target, new_tokens)


def test_suite_prompts_go_through_the_template_with_the_targets_replies(
    tmp_path: Path, tiny_target: Callable[..., Target]
) -> None:
    target = tiny_target()
    questions, maths = write(tmp_path / "q.jsonl", QUESTION), write(tmp_path / "m.jsonl", GSM8K)
    first, second, third = turn_prompts([f"mt-bench={questions}", f"gsm8k={maths}"], target, 12)
    assert [p.id for p in (first, second, third)] == ["mt_bench/writing/81", "mt_bench/writing/81#1", "gsm8k/test/0"]
    assert (first.task, first.reference) == ("mt-bench", None)
    assert (third.task, third.reference) == ("gsm8k", "2+3=5\n#### 5")
    decode = target.tokenizer.decode
    own = decode(PlainDecoder(target).generate(first.ids, 12).ids, skip_special_tokens=True)
    assert decode(second.ids).startswith(decode(first.ids) + own + "<|im_end|>\n<|im_start|>user\nAgain.<|im_end|>")
    assert "#### 5" not in decode(third.ids)


def test_a_conversation_that_outgrows_the_context_ends_before_that_turn(
    tmp_path: Path, tiny_target: Callable[..., Target]
) -> None:
    row = QUESTION | {"turns": ["Write.", "x" * 600]}
    found = turn_prompts([f"mt-bench={write(tmp_path / 'q.jsonl', row)}"], tiny_target())
    assert [prompt.id for prompt in found] == ["mt_bench/writing/81"]
    row = QUESTION | {"turns": ["x" * 600]}
    with pytest.raises(UserError, match=r"mt_bench/writing/81 has \d+ tokens"):
        turn_prompts([f"mt-bench={write(tmp_path / 'q.jsonl', row)}"], tiny_target())


def test_a_suite_given_twice_is_refused(tmp_path: Path, tiny_target: Callable[..., Target]) -> None:
    text = f"spec-bench={spec_bench(tmp_path, 1)}"
    with pytest.raises(UserError, match=r"spec-bench:qa: prompt spec_bench/qa/qa-0 is already in spec-bench"):
        turn_prompts([text, text.replace("=", ":qa=", 1)], tiny_target())


# -- bad input -------------------------------------------------------------------------------------------------------
def test_unknown_suites_are_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown suite 'gms8k' \(did you mean gsm8k\?\).*gsm8k.*spec-bench"):
        load_suite("gms8k")


def test_absent_data_are_answered_with_three_ways_to_give_them(tmp_path: Path) -> None:
    with pytest.raises(UserError) as found:
        load_suite("gsm8k")
    message = str(found.value)
    for part in ("no data folder is named", "gsm8k=FILE", "--data FOLDER", DATA_VARIABLE, "datasets:openai/gsm8k"):
        assert part in message
    with pytest.raises(UserError, match=r"math/gsm8k\.test\.jsonl\.gz does not exist"):
        load_suite("gsm8k", tmp_path)
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        load_suite(f"gsm8k={tmp_path}/nowhere.jsonl")


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("gsm8k", '{"question": "x"}', r"no 'answer' among its keys \(question\)"),
        ("gsm8k", '{"question": "x", "answer": 5}', "a column is not of the kind"),
        ("pubmedqa", json.dumps(PUBMEDQA | {"context": "text"}), "a column is not of the kind"),
        ("mt-bench", json.dumps(QUESTION | {"turns": "one"}), "turns must be a list"),
        ("mt-bench", json.dumps(QUESTION | {"turns": []}), "no user turn"),
        ("mtbench101", json.dumps(ABILITY | {"history": "x"}), "a column is not of the kind"),
        ("gsm8k", "5", "must be a JSON object"),
        ("gsm8k", '{"question": ', "not JSON"),
    ],
)
def test_wrong_rows_are_named_by_file_and_line(tmp_path: Path, name: str, line: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{says}"):
        load_suite(f"{name}={path}")


def test_other_slips(tmp_path: Path) -> None:
    path = spec_bench(tmp_path, 1)
    with pytest.raises(UserError, match=r"no category 'qq'; choose one of: coding, .*translation"):
        load_suite(f"spec-bench:qq={path}")
    with pytest.raises(UserError, match=r"no category ''"):
        load_suite(f"spec-bench:={path}")
    with pytest.raises(UserError, match=r"gsm8k has no category 'easy'; it has none"):
        load_suite(f"gsm8k:easy={write(tmp_path / 'g.jsonl', GSM8K)}")
    with pytest.raises(UserError, match="names no file behind the ="):
        load_suite("gsm8k=")
    with pytest.raises(UserError, match="at least 1, not 0"):
        load_suite("gsm8k", limit=0)
    only = write(tmp_path / "only.jsonl", {"question_id": 1, "category": "qa", "turns": ["x"]})
    with pytest.raises(UserError, match=r"only\.jsonl holds no prompt of suite mt-bench"):
        load_suite(f"mt-bench={only}")
