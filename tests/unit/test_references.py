"""Reference answers as rows: the template's own tokens, turn by turn, and never taken for the target's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from redraft.data.answers import reference_rows
from redraft.data.shapes import Conversation
from redraft.data.store import REFERENCE, Failure, Row, decode_row, encode_row
from redraft.errors import UserError

EOS = 2


def talk(id: str, *turns: tuple[str, str]) -> Conversation:
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(id, messages)


TALKS = [talk("a", ("the hat?", "a hat")), talk("b", ("one", "first"), ("two", "second one"))]


def test_prompt_and_answer_are_the_templates_own_text(tiny_tokenizer: Any) -> None:
    rows = reference_rows(TALKS, tiny_tokenizer, "cafe")
    assert [row.key for row in rows] == ["a@reference", "b@reference", "b@reference#1"]
    for row, conversation in zip(rows, (TALKS[0], TALKS[1], TALKS[1]), strict=True):
        messages = conversation.messages[: 2 * row.turn + 2]
        whole = tiny_tokenizer.apply_chat_template(messages, tokenize=False)
        assert tiny_tokenizer.decode([*row.prompt_ids, *row.response_ids]) + "\n" == whole
        assert row.prompt_ids == list(
            tiny_tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        )
        assert row.response_ids[-1] == EOS and EOS not in row.response_ids[:-1]
        assert (row.finish_reason, row.target_hash, row.source) == ("stop", "cafe", REFERENCE)
        assert row.temperature != 0


def test_a_later_turn_holds_the_reference_answer_to_the_earlier_one(tiny_tokenizer: Any) -> None:
    later = reference_rows(TALKS, tiny_tokenizer, "cafe")[2]
    assert "assistant\nfirst<|im_end|>" in tiny_tokenizer.decode(later.prompt_ids)


def test_a_long_answer_is_cut_as_a_regenerated_one_is(tiny_tokenizer: Any) -> None:
    whole = reference_rows(TALKS, tiny_tokenizer, "cafe")
    cut = reference_rows(TALKS, tiny_tokenizer, "cafe", max_new_tokens=6)
    for full, short in zip(whole, cut, strict=True):
        assert short.response_ids == full.response_ids[:6]
        assert short.finish_reason == ("stop" if len(full.response_ids) <= 6 else "length")


def test_other_end_tokens_and_templates_without_one(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("<|im_end|>", "<pad>")
    (row,) = reference_rows(TALKS[:1], tiny_tokenizer, "cafe")
    assert row.finish_reason == "length" and row.response_ids[-1] != EOS
    (row,) = reference_rows(TALKS[:1], tiny_tokenizer, "cafe", eos_ids=[EOS, 3])
    assert row.finish_reason == "stop" and row.response_ids[-1] == 3


def test_a_token_across_the_border_is_split_there(tiny_tokenizer: Any) -> None:
    """The prompt's ids are what an engine is sent; the answer's tokens begin behind them, whatever would merge."""
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("assistant\n", "assistant t").replace(
        "message['role'] }}\n", "message['role'] }} t"
    )
    (row,) = reference_rows([talk("a", ("so", "he"))], tiny_tokenizer, "cafe")
    # "t" + "he" would be "th" + "e"
    assert tiny_tokenizer.decode(row.prompt_ids).endswith(" t")
    assert tiny_tokenizer.convert_ids_to_tokens(row.response_ids) == ["he", "<|im_end|>"]


def test_a_turn_that_no_longer_fits_is_listed(tiny_tokenizer: Any) -> None:
    rows = reference_rows(TALKS, tiny_tokenizer, "cafe")
    context = len(rows[2].prompt_ids)
    failures: list[Failure] = []
    assert reference_rows(TALKS, tiny_tokenizer, "cafe", context=context, failures=failures) == rows[:2]
    assert [failure.key for failure in failures] == ["b@reference#1"]
    with pytest.raises(UserError, match="does not fit"):
        reference_rows(TALKS, tiny_tokenizer, "cafe", context=context)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([("user", "x")], "no reference answer to its user turn 1"),
        ([("user", "x"), ("assistant", " ")], "no reference answer to its user turn 1"),
        ([("user", "x"), ("assistant", "y"), ("user", "z")], "user turn 2"),
        ([("user", "x"), ("user", "z"), ("assistant", "y")], "user turn 1"),
        ([("user", "x"), ("assistant", "y"), ("assistant", "y")], "answers no user turn"),
        ([("assistant", "y"), ("user", "x"), ("assistant", "y")], "answers no user turn"),
        ([("user", "x"), ("assistant", "<|im_end|>")], "begins with an end token"),
    ],
)
def test_conversations_without_their_answers_are_refused(messages: Any, text: str, tiny_tokenizer: Any) -> None:
    conversation = Conversation("odd", [{"role": role, "content": content} for role, content in messages])
    with pytest.raises(UserError, match=text) as caught:
        reference_rows([conversation], tiny_tokenizer, "cafe")
    assert "odd" in str(caught.value) and "\n" not in str(caught.value)


def test_templates_that_cannot_be_followed_are_refused(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("assistant\n", "assistant\n<think>")
    with pytest.raises(UserError, match="opens a block of thoughts"):
        reference_rows(TALKS, tiny_tokenizer, "cafe")
    tiny_tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UserError, match="chat template refuses conversation a"):
        reference_rows(TALKS, tiny_tokenizer, "cafe")


def test_two_conversations_of_one_id_are_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="called a"):
        reference_rows([TALKS[0], TALKS[0]], tiny_tokenizer, "cafe")


def test_the_source_of_a_row_survives_the_file_and_old_rows_keep_their_bytes(tiny_tokenizer: Any) -> None:
    row = reference_rows(TALKS, tiny_tokenizer, "cafe")[2]
    assert decode_row(encode_row(row)) == row
    own = replace(row, source="target")
    assert own.key == "b@T1#1" and b"source" not in encode_row(own) and decode_row(encode_row(own)) == own
    with pytest.raises(ValueError, match="unknown source 'elsewhere'"):
        decode_row(encode_row(replace(row, source="elsewhere")))


def test_a_line_of_an_earlier_release_loads() -> None:
    line = (
        b'{"id":"q","prompt_ids":[1,2],"response_ids":[3],"temperature":0.0,"top_k":0,"top_p":1.0,"seed":0,'
        b'"finish_reason":"stop","target_hash":"cafe","turn":0,"checksum":"c48bdef416d9023b"}\n'
    )
    row = Row("q", [1, 2], [3], 0.0, 0, 1.0, 0, "stop", "cafe")
    assert decode_row(line) == row and encode_row(row) == line
