"""Evaluation prompts in the training data: the same, nearly the same, and what only looks alike."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from redraft.adaptation.models import split_prompts
from redraft.data.overlap import find_overlap, refuse_overlap, same_text, trained_conversations
from redraft.data.prompts import read_conversations
from redraft.data.shapes import Conversation
from redraft.data.store import Row
from redraft.data.template import template_ids
from redraft.errors import UserError

DATA = Path(os.environ.get("REDRAFT_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data folder at {DATA}; name one with REDRAFT_DATA")

LONG = (
    "A farmer has 12 cows in the north field and 30 sheep in the south field, and sells a third of all his animals "
    "on the market day in spring. How many animals are left?"
)


def ask(id: str, *turns: str) -> Conversation:
    return Conversation(id, [{"role": "user", "content": turn} for turn in turns])


def shares(training: str | Conversation, evaluation: str | Conversation) -> list[float]:
    pair = [c if isinstance(c, Conversation) else ask(name, c) for name, c in (("t", training), ("e", evaluation))]
    return [overlap.share for overlap in find_overlap([pair[0]], [pair[1]])]


@pytest.mark.parametrize(
    ("training", "evaluation"),
    [
        ("What is the FA Cup?", "what  is the\nFA-cup"),
        ("ﬁne “quotes”", 'FINE "quotes"'),
        ("2 + 2 = ?", "2+2=?"),
        ("???", " ??? "),
        (LONG, LONG.upper().replace(",", "").replace(" ", "  ")),
    ],
)
def test_the_same_words_are_the_same_prompt(training: str, evaluation: str) -> None:
    assert shares(training, evaluation) == [1.0]


@pytest.mark.parametrize(
    ("training", "evaluation"),
    [
        ("What is 2+2?", "What is 2-2?"),
        ("Is x < y?", "Is x > y?"),
        ("What is 5?", "What is -5?"),
        ("???", "!!!"),
        ("What are the symptoms of gout?", "What are the symptoms of mumps?"),
        (LONG, LONG.replace("12", "14")),
        (LONG, LONG.replace("30 sheep", "30 sheep and 2 goats")),
    ],
)
def test_other_problems_are_other_prompts(training: str, evaluation: str) -> None:
    assert shares(training, evaluation) == []


def test_nearly_the_same_prompts_are_found_within_longer_ones_too() -> None:
    renamed = LONG.replace("A farmer", "Old MacDonald")
    assert 0.5 <= shares(renamed, LONG)[0] < 1
    assert shares("Solve this, with steps.\n" + LONG + "\nThink first!", LONG) == [1.0]
    # the other way round most of the prompt is new
    assert shares(LONG, "Read on. " + " ".join(f"word{i}" for i in range(60)) + LONG) == []


def test_a_shared_beginning_is_no_overlap() -> None:
    head = "You are an expert Python programmer, and here is your task: Write a function to "
    first = head + "find the longest chain which can be formed from the given set of pairs of numbers"
    second = head + "reverse the words of a sentence without touching the order of the letters inside each word"
    assert shares(first, second) == []


def test_each_turn_is_looked_at_and_short_turns_only_as_a_whole() -> None:
    assert shares(LONG, ask("e", "Hello there", LONG)) == [1.0]
    assert shares(ask("t", LONG, "Now double it."), LONG) == [1.0]
    assert shares(ask("t", "hi", "tell me more"), ask("e", "hi", "something else")) == []
    assert shares(ask("t", "hi", "tell me more"), ask("e", "Hi!", "Tell me more.")) == [1.0]


def test_every_evaluation_prompt_is_counted_once_with_its_closest_match() -> None:
    training = [ask("near", LONG.replace("A farmer", "Old MacDonald")), ask("same", LONG), ask("more", LONG.lower())]
    found = find_overlap(training, [ask("e0", "else"), ask("e1", LONG), ask("e2", LONG)])
    assert [(o.evaluation_id, o.training_id, o.share) for o in found] == [("e1", "same", 1.0), ("e2", "same", 1.0)]


def test_references_and_replies_play_no_part() -> None:
    answered = Conversation("t", [*ask("t", "a").messages, {"role": "assistant", "content": LONG}])
    assert shares(answered, LONG) == [] and same_text(answered) == "a"


def test_the_refusal_says_how_many_which_and_how_to_mend() -> None:
    training = [ask(f"train/{i}", f"question {i}") for i in range(9)]
    with pytest.raises(UserError) as found:
        refuse_overlap(training, [ask(f"test/{i}", f"Question {i}!") for i in range(5, 12)], "my.jsonl")
    message = str(found.value)
    assert message.startswith("4 of the 7 prompts of my.jsonl are also in the training prompts (test/5 is train/5, ")
    assert "test/7 is train/7, ...)" in message and "test/8" not in message
    assert "remove them from the training prompts, or measure on others" in message
    near = LONG.replace("A farmer", "Old MacDonald")
    with pytest.raises(UserError, match=r"1 of the 1 prompts of x .* \(e is nearly t\), so"):
        refuse_overlap([ask("t", near)], [ask("e", LONG)], "x")
    refuse_overlap(training, [ask("e", "another")], "x")


def row(tokenizer: PreTrainedTokenizerFast, id: str, *turns: str, temperature: float = 0.0) -> Row:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    ids = template_ids(tokenizer, id, messages)
    return Row(id, ids, [5], temperature, 0, 1.0, 0, "stop", "hash", turn=len(turns) // 2)


def test_prompts_of_a_response_file(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        row(tiny_tokenizer, "a", "what is it?"),
        row(tiny_tokenizer, "a", "what is it?", temperature=0.7),
        row(tiny_tokenizer, "a", "what is it?", "a thing", LONG),
    ]
    found = list(trained_conversations(rows, tiny_tokenizer))
    assert len(found) == 2
    assert found[0] == ask("a", "what is it?")
    evaluation = [ask("short", "What is it"), ask("long", LONG), ask("new", "What was it")]
    assert [o.evaluation_id for o in find_overlap(found, evaluation)] == ["short", "long"]


@pytest.mark.parametrize("marked", [True, False], ids=["marked turns", "bare text"])
def test_a_services_system_turn_makes_its_prompts_no_repetitions(
    tiny_tokenizer: PreTrainedTokenizerFast, marked: bool
) -> None:
    """Thirteen words and more that stand in every prompt say nothing about what is asked in it."""
    shared = {
        "role": "system",
        "content": "answer in the shortest way that you can think of and never say what you do not know",
    }
    if not marked:
        tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = []
    for number in range(6):
        asked = [shared, {"role": "user", "content": f"what is {number}?"}]
        rows.append(Row(str(number), template_ids(tiny_tokenizer, "a", asked), [5], 0.0, 0, 1.0, 0, "stop", "hash"))
    found = list(trained_conversations(rows, tiny_tokenizer))
    if marked:
        assert found == [ask(str(number), f"what is {number}?") for number in range(6)]
        assert not find_overlap(found[1:], found[:1])
    else:
        assert found[0].messages[0]["content"] == shared["content"] + "what is 0?"


def test_a_split_trains_on_nothing_that_is_nearly_measured() -> None:
    names = ("Ann", "Bob", "Cy", "Dan", "Eve")
    prompts = [
        ask(f"{i}/{name}", LONG.replace("12", str(100 + i)) + f" asks {name}") for i in range(20) for name in names
    ]
    train, _, evaluation = split_prompts(prompts, 4, 6, seed=0)
    assert len(evaluation) == 6 and 60 <= len(train) < 90
    assert {c.id.split("/")[0] for c in train}.isdisjoint({c.id.split("/")[0] for c in evaluation})
    twice = split_prompts(
        [*prompts, *(ask("again/" + c.id, c.messages[0]["content"].upper()) for c in prompts)], 4, 6, 0
    )
    assert [c.id for c in twice[2]] == [c.id for c in evaluation] and len(twice[0]) == len(train)


# -- known facts of public data --------------------------------------------------------------------------------------
def read(name: str) -> list[Conversation]:
    return read_conversations(DATA / f"{name}.jsonl.gz")


@needs_data
def test_eighty_prompts_of_spec_bench_are_gsm8k_test_problems() -> None:
    maths, bench = read("math/gsm8k.test"), read("general/spec_bench.test")
    found = find_overlap(maths, bench)
    assert len(found) == 80 and {o.evaluation_id.split("/")[1] for o in found} == {"math_reasoning"}
    with pytest.raises(
        UserError, match=r"80 of the 480 prompts of spec-bench .*spec_bench/math_reasoning/401 is gsm8k"
    ):
        refuse_overlap(maths, bench, "spec-bench")


@needs_data
@pytest.mark.parametrize("name", ["math/gsm8k", "medical/pubmedqa", "medical/medquad", "general/dolly_3k"])
def test_the_official_splits_do_not_overlap(name: str) -> None:
    assert find_overlap(read(f"{name}.train"), read(f"{name}.test")) == []
