"""Served traffic: every shape of record, what is refused and where, and how a log is split for a run."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redraft import provenance
from redraft.adaptation.models import Parts
from redraft.adaptation.runs import Log
from redraft.adaptation.sources import Source, Split, split_traffic
from redraft.data.overlap import same_text, trained_conversations
from redraft.data.store import TRAFFIC, Row, read_rows
from redraft.data.traces import read_traces
from redraft.errors import UserError
from redraft.settings.runs import AdaptConfig
from redraft.target import Target

EOS = 2


@pytest.fixture
def log(tmp_path: Path) -> Callable[..., Path]:
    def write(*records: Any) -> Path:
        path = tmp_path / "served.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return path

    return write


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def answered(text: str, answer: str) -> list[dict[str, str]]:
    return [*user(text), {"role": "assistant", "content": answer}]


# -- what is read ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "record",
    [
        {"prompt_ids": [1, 9, 10], "response_ids": [20, 21, EOS]},
        {"prompt_token_ids": [1, 9, 10], "token_ids": [20, 21, EOS], "finish_reason": "stop"},
        {"prompt_token_ids": [1, 9, 10], "choices": [{"token_ids": [20, 21, EOS], "index": 0, "stop_reason": None}]},
        {"request_id": "served/1", "prompt_token_ids": [1, 9, 10], "outputs": [{"token_ids": [20, 21, EOS]}]},
    ],
)
def test_token_ids_are_taken_as_they_are(record: Any, log: Callable[..., Path], tiny_tokenizer: Any) -> None:
    (row,) = read_traces(log(record), tiny_tokenizer, "cafe")
    assert row == Row("served/1", [1, 9, 10], [20, 21, EOS], 1.0, 0, 1.0, 0, "stop", "cafe", 0, TRAFFIC)
    assert row.key == "served/1@traffic"


def test_messages_go_through_the_chat_template(log: Callable[..., Path], tiny_tokenizer: Any) -> None:
    talk = [*answered("one", "first"), *answered("two", "second")]
    rows = read_traces(
        log(
            {"messages": talk},
            {"id": 7, "messages": [*talk[:3]], "completion": "other", "finish_reason": "length"},
            {"messages": answered("two", "second"), "temperature": 0, "top_p": 0.9, "top_k": -1},
        ),
        tiny_tokenizer,
        "cafe",
    )
    texts = [tiny_tokenizer.decode([*row.prompt_ids, *row.response_ids]) for row in rows]
    assert texts[0] + "\n" == tiny_tokenizer.apply_chat_template(talk, tokenize=False)
    assert texts[1].endswith("<|im_start|>assistant\nother") and rows[1].finish_reason == "length"
    assert tiny_tokenizer.decode(rows[0].response_ids) == "second<|im_end|>" and rows[0].finish_reason == "stop"
    assert [row.id for row in rows] == ["served/1", "7", "served/3"]
    assert (rows[2].temperature, rows[2].top_k, rows[2].top_p) == (0.0, 0, 0.9)


def test_raw_text_is_what_the_engine_had(log: Callable[..., Path], tiny_tokenizer: Any) -> None:
    prompt = "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n"
    said: list[str] = []
    rows = read_traces(
        log(
            {"prompt": prompt, "completion": "it is<|im_end|>"},
            {"prompt": prompt, "completion": "it was"},
            {"prompt": prompt, "completion": "it wa", "finish_reason": "length"},
        ),
        tiny_tokenizer,
        "cafe",
        warn=said.append,
    )
    assert [tiny_tokenizer.decode(row.prompt_ids) for row in rows] == [prompt] * 3
    ends = ["it is<|im_end|>", "it was<|im_end|>", "it wa"]
    assert [tiny_tokenizer.decode(row.response_ids) for row in rows] == ends
    assert [row.finish_reason for row in rows] == ["stop", "stop", "length"] and not said
    read_traces(log({"prompt": "so?", "completion": "yes"}), tiny_tokenizer, "cafe", warn=said.append)
    assert len(said) == 1 and "hold no special token" in said[0]


def test_an_answer_as_openai_servers_send_it(log: Callable[..., Path], tiny_tokenizer: Any) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "second"}, "finish_reason": "stop"}
    prompt = "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    rows = read_traces(
        log(
            {"messages": answered("two", "second"), "id": "whole"},
            {"messages": user("two"), "choices": [choice], "id": "parts"},
            {"prompt": prompt, "choices": [{"text": "second"}], "id": "raw"},
            {"prompt": "t", "completion": "he end", "id": "border"},
        ),
        tiny_tokenizer,
        "cafe",
    )
    # The first three are one exchange.
    assert [row.id for row in rows] == ["whole", "border"]
    # "t" and "he" would make "th" and "e" in one text; the prompt was sent as it is.
    assert tiny_tokenizer.convert_ids_to_tokens([*rows[1].prompt_ids, *rows[1].response_ids[:1]]) == ["t", "he"]


def test_repeated_exchanges_count_once_and_long_answers_are_cut(log: Callable[..., Path], tiny_tokenizer: Any) -> None:
    said: list[str] = []
    record = {"messages": answered("one", "a long answer")}
    rows = read_traces(log(record, record), tiny_tokenizer, "cafe", max_new_tokens=4, warn=said.append)
    assert [(len(row.response_ids), row.finish_reason) for row in rows] == [(4, "length")]
    assert len(said) == 1 and "1 of 2 records repeat" in said[0]


def test_arrays_and_compressed_files(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "served.json.gz"
    path.write_bytes(gzip.compress(json.dumps([{"messages": answered("one", "first")}]).encode()))
    assert read_traces(path, tiny_tokenizer, "cafe")[0].id == "served/1"
    # A response file of ours is a log like any other.
    own = replace(read_traces(path, tiny_tokenizer, "cafe")[0], source="target")
    from redraft.data.store import encode_row

    (tmp_path / "own.jsonl").write_bytes(encode_row(own))
    assert read_traces(tmp_path / "own.jsonl", tiny_tokenizer, "cafe")[0] == replace(own, source=TRAFFIC)


# -- what is refused -------------------------------------------------------------------------------------------------
GOOD = {"prompt_ids": [1, 9], "response_ids": [20, EOS]}


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ("{", "not JSON"),
        ([1], "must be a JSON object"),
        ({"text": "x"}, "among its keys: text"),
        ({"prompt_ids": [1]}, '"prompt_ids" without response_ids or token_ids'),
        ({"token_ids": [1]}, '"token_ids" without prompt_ids'),
        (GOOD | {"response_ids": []}, '"response_ids" must be a list of token ids'),
        (GOOD | {"prompt_ids": [1, True]}, '"prompt_ids" must be a list of token ids'),
        (GOOD | {"response_ids": [128]}, "the target has 128 tokens"),
        (GOOD | {"response_ids": [-1]}, "holds the id -1"),
        (GOOD | {"completion": "something else"}, "are they another tokenizer's"),
        (GOOD | {"target_hash": "beef"}, "served by another target (beef, this one is cafe)"),
        (GOOD | {"finish_reason": "content_filter"}, "not 'content_filter'"),
        (GOOD | {"temperature": "hot"}, "temperature must be a number"),
        (GOOD | {"temperature": -1}, "temperature must be a number of 0"),
        (GOOD | {"prompt_ids": [5] * 99}, "do not fit into the target's context of 64"),
        (GOOD | {"id": "twice"}, "id 'twice' is already at"),
        ({"prompt_token_ids": [1], "choices": [{"token_ids": [2]}, {"token_ids": [3]}]}, "a list of one response"),
        ({"messages": user("x")}, "end with no answer"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no user turn"),
        ({"messages": [*answered("x", "y"), {"role": "assistant", "content": "z"}]}, "does not stand behind a user"),
        ({"messages": answered("x", " ")}, "answer is empty"),
        ({"messages": answered("x", "na\u00efve")}, "unchanged (from character 3 on"),
        ({"prompt": "x", "completion": "caf\u00e9"}, "the completion does not come back"),
        ({"prompt": "x", "completion": ""}, "empty prompt or completion"),
    ],
)
def test_bad_records_are_one_line_with_file_and_line(
    record: Any, text: str, log: Callable[..., Path], tiny_tokenizer: Any
) -> None:
    path = log(GOOD | {"id": "twice"}, record)
    with pytest.raises(UserError) as caught:
        read_traces(path, tiny_tokenizer, "cafe", context=64)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and text in message and "\n" not in message


def test_missing_and_empty_logs(log: Callable[..., Path], tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_traces(tmp_path / "none.jsonl", tiny_tokenizer, "cafe")
    with pytest.raises(UserError, match="is empty"):
        read_traces(log(""), tiny_tokenizer, "cafe")


def test_half_a_character_at_the_end_is_no_other_tokenizer(log: Callable[..., Path], tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("it is", add_special_tokens=False).input_ids
    record = {"prompt_ids": [1], "response_ids": ids, "completion": "it is\ufffd", "finish_reason": "length"}
    assert read_traces(log(record), tiny_tokenizer, "cafe")[0].response_ids == ids
    assert read_traces(log(record | {"completion": " it  is "}), tiny_tokenizer, "cafe")[0].response_ids == ids


# -- in a run --------------------------------------------------------------------------------------------------------
def served(count: int) -> list[dict[str, Any]]:
    """``count`` questions, every third of them answered twice."""
    found = []
    for i in range(count):
        words = " ".join("alpha bravo charlie delta echo foxtrot golf hotel".split()[: 3 + i % 5])
        for n in range(2 if i % 3 == 0 else 1):
            found.append({"messages": answered(f"{words} number {i}", f"answer {i} {n}")})
    return found


def test_a_split_keeps_the_answers_to_one_prompt_together(
    log: Callable[..., Path], tiny_target: Callable[..., Target]
) -> None:
    target = tiny_target()
    rows = read_traces(log(*served(40)), target.tokenizer, "cafe")
    train, heldout, evaluation = split_traffic(rows, target, 6, 5, seed=0)
    again = split_traffic(list(reversed(rows)), target, 6, 5, seed=0)
    texts = [
        {same_text(c) for c in trained_conversations(part, target.tokenizer)} for part in (train, heldout, evaluation)
    ]
    assert [len(part) for part in texts] == [29, 6, 5]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert {row.key for row in heldout} == {row.key for row in again[1]}
    kept = {row.key for row in (*train, *heldout)}
    assert len(kept) == len(train) + len(heldout)
    dropped = [row for row in rows if row.key not in kept]
    assert {same_text(c) for c in trained_conversations(dropped, target.tokenizer)} == texts[2]


def test_traffic_costs_no_generation_and_is_read_again_after_a_kill(
    log: Callable[..., Path], tmp_path: Path, tiny_target: Callable[..., Target]
) -> None:
    target, said = tiny_target(), list[str]()
    paths = (tmp_path / "run" / "responses.jsonl", tmp_path / "run" / "heldout.jsonl")
    ledger = provenance.Ledger()
    written = Log(ledger, said.append)

    def source(count: int) -> Source:
        given = {"target": "t", "draft": "d", "out": tmp_path / "run", "responses": str(log(*served(count)))}
        given |= {"heldout_prompts": 6, "bench_prompts": 5, "max_new_tokens": 32}
        return Source(AdaptConfig(**given), Parts.of(target), written)

    found: Split = source(40).traffic
    assert read_rows(paths[0]) == found[0] and read_rows(paths[1]) == found[1]
    assert {row.target_hash for row in found[0]} == {target.content_hash()}
    (entry,) = ledger.stages
    assert (entry.stage, entry.tokens, entry.flops) == ("served traffic", 0, 0) and entry.bytes_written > 0
    before = [path.stat().st_mtime_ns for path in paths]
    assert source(40).traffic == found
    assert [prompt.ids for prompt in source(40).evaluation(8)] == [row.prompt_ids for row in found[2]]
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert "nothing was generated" in said[-1]
    with pytest.raises(UserError, match="too few"):
        source(9).write()


# -- what a request and an answer say beside the text ----------------------------------------------------------------
TOOLED = "{% if tools %}{{ tools[0].function.name }}\n{% endif %}"
TIDES = {"type": "function", "function": {"name": "tides"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [TIDES | {"id": "1"}]}


def one(log: Callable[..., Path], tokenizer: Any, record: dict[str, Any], **how: Any) -> tuple[str, str, str]:
    (row,) = read_traces(log(record), tokenizer, "cafe", **how)
    return tokenizer.decode(row.prompt_ids), tokenizer.decode(row.response_ids), row.finish_reason


def test_tools_and_their_results_stand_in_the_prompt(log: Callable[..., Path], tiny_tokenizer: Any) -> None:
    calls = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }} {% endfor %}{% endfor %}"
    tiny_tokenizer.chat_template = TOOLED + calls + tiny_tokenizer.chat_template
    talk = [*user("so?"), CALLED, {"role": "tool", "content": "noon", "tool_call_id": "1"}]
    prompt, response, _ = one(log, tiny_tokenizer, {"messages": talk, "tools": [TIDES], "completion": "at noon"})
    assert prompt.startswith("tides\ntides ") and "<|im_start|>tool\nnoon<|im_end|>" in prompt
    assert response == "at noon<|im_end|>"


def test_the_servers_counts_must_agree(log: Callable[..., Path], tiny_tokenizer: Any) -> None:
    record = {"messages": user("so?"), "completion": "no"}
    (row,) = read_traces(log(record), tiny_tokenizer, "cafe")
    ids = {"prompt_ids": row.prompt_ids, "response_ids": row.response_ids}
    for found in (record, ids, {"prompt": tiny_tokenizer.decode(row.prompt_ids), "completion": "no"}):
        for less in (0, 1):
            usage = {"prompt_tokens": len(row.prompt_ids), "completion_tokens": len(row.response_ids) - less}
            assert one(log, tiny_tokenizer, found | {"usage": usage})[1] == "no<|im_end|>"
        with pytest.raises(UserError, match=r"served\.jsonl:1: usage says 60 tokens"):
            one(log, tiny_tokenizer, found | {"usage": {"completion_tokens": 60}})
        with pytest.raises(UserError, match=r"usage says that the prompt had 3 tokens.*tools, a system turn"):
            one(log, tiny_tokenizer, found | {"usage": {"prompt_tokens": 3}})
    cut = record | {"finish_reason": "length", "usage": {"completion_tokens": 2}}
    assert one(log, tiny_tokenizer, cut)[1:] == ("no", "length")


def test_the_end_is_the_one_that_came(log: Callable[..., Path], tiny_tokenizer: Any) -> None:
    chat = {"messages": user("so?"), "completion": "no", "finish_reason": "stop"}
    raw = {"prompt": "<|im_start|>so?", "completion": "no", "finish_reason": "stop"}
    ends = {"eos_ids": [EOS, 3]}
    for record in (chat, raw):
        # A stop string ended it, or a token of the engine's choice.
        assert one(log, tiny_tokenizer, record | {"stop_reason": "END"}, **ends)[1:] == ("no", "length")
        assert one(log, tiny_tokenizer, record | {"finish_reason": "stop_sequence"}, **ends)[1:] == ("no", "length")
        assert one(log, tiny_tokenizer, record | {"stop_reason": 3}, **ends)[1:] == ("no<pad>", "stop")
        assert one(log, tiny_tokenizer, record | {"finish_reason": {"type": "length"}}, **ends)[1:] == ("no", "length")
    assert one(log, tiny_tokenizer, chat, **ends)[1] == "no<|im_end|>"
    assert one(log, tiny_tokenizer, raw, **ends)[1] == "no"  # two end tokens, and nobody says which
    with pytest.raises(UserError, match="stop_reason.*the target has 128 tokens"):
        one(log, tiny_tokenizer, chat | {"stop_reason": 999})


def test_ids_beside_what_a_server_split_off_are_still_checked(log: Callable[..., Path], tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("(hm) no<|im_end|>").input_ids
    said = {"role": "assistant", "content": "no", "reasoning_content": "hm"}
    record = {"prompt_token_ids": [9], "choices": [{"token_ids": ids, "message": said, "finish_reason": "stop"}]}
    assert one(log, tiny_tokenizer, record)[1] == "(hm) no<|im_end|>"
    assert one(log, tiny_tokenizer, record | {"choices": [{"token_ids": ids, "message": CALLED}]})[1][:4] == "(hm)"
    wrong = record | {"choices": [{"token_ids": ids, "message": said | {"reasoning_content": "mm"}}]}
    with pytest.raises(UserError, match="are they another tokenizer's"):
        one(log, tiny_tokenizer, wrong)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"messages": user("x"), "choices": [{"message": CALLED, "finish_reason": "tool_calls"}]}, "has tool_calls"),
        ({"messages": user("x"), "completion": "y", "tools": [TIDES]}, "leaves out its tools"),
        ({"messages": user("x"), "completion": "y", "images": ["a.png"]}, 'the key "images" is not read'),
        (
            {"messages": user("x"), "choices": [{"message": {"content": "y", "reasoning": "z"}}]},
            "leaves out the thoughts",
        ),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}, {"text": "b"}]}], "completion": "y"},
            "several text parts",
        ),
    ],
)
def test_what_the_text_does_not_tell_is_refused(
    log: Callable[..., Path], tiny_tokenizer: Any, record: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError) as caught:
        one(log, tiny_tokenizer, record)
    assert text in str(caught.value) and "served.jsonl:1: " in str(caught.value)
