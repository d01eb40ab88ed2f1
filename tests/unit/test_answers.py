"""Answers of text as the tokens that were served, and replies of tokens as a chat server would hold them.

The templates are of the shapes that public families have: what they write around an answer, drop and trim.
"""

from __future__ import annotations

from typing import Any

import pytest

from redraft.data.answers import UnclearReply, answer_ids, reply_message
from redraft.errors import UserError

HEAD = (
    "{% for m in messages %}{% if m.role != 'assistant' %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% else %}"
)
TAIL = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
SPLIT = (
    "{% set c = m.content %}{% set r = m.reasoning_content or '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
BLOCK = "<think>\n{{ r }}\n</think>\n\n"
# Thinks unless it is told not to; history is without thoughts, the last turn has a block, be it empty.
HYBRID = (
    HEAD + SPLIT + "<|im_start|>assistant\n{% if loop.last %}" + BLOCK + "{% endif %}{{ c }}<|im_end|>\n" + TAIL
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)  # fmt: skip
# Always thinks: the prompt opens the block.
OPENS = HYBRID.replace(
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}", "<think>\n"
)
# The same, but thoughts of any turn are dropped, in whatever key they come.
DROPS = (
    HEAD + "<|im_start|>assistant\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n" + TAIL + "<think>\n{% endif %}"
)
# Trims whatever it is given, and has blanks around answers.
TRIMS = HEAD + "<|im_start|>assistant\n{{ m.content | trim }}\n<|im_end|>\n" + TAIL + "{% endif %}"
# Channels: the model writes the name of the one it speaks in.
CHANNELS = (
    HEAD + "<|im_start|>assistant{% if m.thinking and loop.last %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "<|im_start|>assistant{% endif %}<|channel|>final<|message|>{{ m.content }}<|im_end|>"
    + TAIL.removesuffix("\n") + "{% endif %}"
)  # fmt: skip
# An opening with a closed block that a history has not, and no end token of its own.
CLOSED = (
    HEAD + "<|im_start|>assistant\n{{ m.content | trim }}<turn>\n" + TAIL + "<|channel>thought\n<channel|>{% endif %}"
)
MARKED = [
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|start|>",
    "<|channel>",
    "<channel|>",
    "[THINK]",
    "[/THINK]",
    "<turn>",
]

ASK = [{"role": "user", "content": "so?"}]
OFF = "<think>\n\n</think>\n\n"


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    tiny_tokenizer.add_tokens(["<think>", "</think>"])
    tiny_tokenizer.add_special_tokens({"extra_special_tokens": MARKED})
    return tiny_tokenizer


def thought(content: str, thoughts: str = "it is so") -> dict[str, str]:
    return {"role": "assistant", "content": content, "reasoning_content": thoughts}


def written(tokenizer: Any, template: str, answer: Any, asked: Any = ASK, **how: Any) -> tuple[str, str, str]:
    """(end of the prompt behind the opening of the turn, response, finish reason)."""
    tokenizer.chat_template = template
    prompt, response, finish = answer_ids(tokenizer, "a", asked, answer, **{"served": True} | how)
    # Nothing of the response depends on where it is cut into pieces: the ids are those of the text.
    return tokenizer.decode(prompt).rpartition("assistant")[2], tokenizer.decode(response), finish


CODE = "    x = 1\n"
AS_SERVED = {
    "code, trimmed by the template": (TRIMS, CODE, "\n", f"{CODE}<|im_end|>"),
    "trailing blanks": (TRIMS, "yes \n\n", "\n", "yes \n\n<|im_end|>"),
    "thoughts in the text": (HYBRID, "<think>\nhm\n</think>\n\nyes", "\n", "<think>\nhm\n</think>\n\nyes<|im_end|>"),
    "thoughts in another spelling": (HYBRID, "<think>hm</think>yes", "\n", "<think>hm</think>yes<|im_end|>"),
    "thoughts that the template drops": (DROPS, "hm\n</think>\n\nyes", "\n<think>\n", "hm\n</think>\n\nyes<|im_end|>"),
    "a block that the prompt opened": (
        OPENS, "<think>\nhm\n</think>\n\nyes", "\n<think>\n", "hm\n</think>\n\nyes<|im_end|>",
    ),
    "thoughts apart": (HYBRID, thought("yes"), "\n", "<think>\nit is so\n</think>\n\nyes<|im_end|>"),
    "thoughts apart, blanks kept": (
        HYBRID, thought("\n\nyes ", "\nhm\n"), "\n", "<think>\nhm\n</think>\n\nyes <|im_end|>",
    ),
    "thoughts apart behind an opening": (OPENS, thought("yes"), "\n<think>\n", "it is so\n</think>\n\nyes<|im_end|>"),
    "a break more than the opening has": (OPENS, "\nhm</think>yes", "\n<think>\n", "\nhm</think>yes<|im_end|>"),
    "thoughts apart in channels": (
        CHANNELS, thought("yes"), "",
        "<|channel|>analysis<|message|>it is so<|end|><|im_start|>assistant<|channel|>final<|message|>yes<|im_end|>",
    ),
    "an opening with a closed block": (CLOSED, "yes\n", "\n<|channel>thought\n<channel|>", "yes\n"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "answer", "opening", "response"), AS_SERVED.values(), ids=AS_SERVED.keys())
def test_an_answer_stands_as_it_was_served(
    tokenizer: Any, template: str, answer: Any, opening: str, response: str
) -> None:
    finish = "stop" if response.endswith("<|im_end|>") else "length"
    assert written(tokenizer, template, answer) == (opening, response, finish)


def test_thinking_switched_off_closes_the_block_in_the_prompt(tokenizer: Any) -> None:
    from redraft.data.shapes import Turns

    asked = Turns(ASK, (), {"enable_thinking": False})
    assert written(tokenizer, HYBRID, "yes", asked) == ("\n" + OFF, "yes<|im_end|>", "stop")


CUT = {
    "text": (TRIMS, "it is  ", "it is  "),
    "thoughts apart": (HYBRID, thought("", "it i"), "<think>\nit i"),
    "thoughts apart behind an opening": (OPENS, thought("", "it i"), "it i"),
    "thoughts in the text": (HYBRID, "<think>\nit i", "<think>\nit i"),
    "thoughts that the prompt opened": (OPENS, "it i", "it i"),
    "after the thoughts": (HYBRID, thought("ye"), "<think>\nit is so\n</think>\n\nye"),
}


@pytest.mark.parametrize(("template", "answer", "response"), CUT.values(), ids=CUT.keys())
def test_an_answer_that_was_cut_off_gets_nothing_behind_it(
    tokenizer: Any, template: str, answer: Any, response: str
) -> None:
    assert written(tokenizer, template, answer, cut=True)[1:] == (response, "length")


REFUSED = {
    "an empty block that nobody wrote": (HYBRID, "yes", "around the answer of conversation a.*enable_thinking=false"),
    "a block without thoughts": (OPENS, "yes", "opens a block of thoughts, but its answer has none"),
    "thoughts that the template drops": (DROPS, thought("yes"), "leaves out the thoughts"),
    "marks that are not in the row": (CHANNELS, "yes", "writes '<|channel|>final<|message|>' around"),
    "an end token in the text": (TRIMS, "yes<|im_end|>no", "holds the end token <|im_end|>"),
    "nothing but an end token": (TRIMS, "<|im_end|>", "begins with an end token"),
    "a call": (TRIMS, {"role": "assistant", "content": "x", "tool_calls": [{}]}, "has tool_calls"),
    "a template without answers": (f"so{TAIL[23:]}{{% endif %}}", "yes", "does not write the answer"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "answer", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_model_cannot_have_written_is_refused(tokenizer: Any, template: str, answer: Any, why: str) -> None:
    with pytest.raises(UserError, match=why.replace("|", r"\|")) as caught:
        written(tokenizer, template, answer)
    assert "\n" not in str(caught.value)


def tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


COUNTED = {
    "without the block": (HYBRID, "yes", "yes<|im_end|>"),
    "with the empty block": (HYBRID, "yes", f"{OFF}yes<|im_end|>"),
    "with the channel": (CHANNELS, "yes", "<|channel|>final<|message|>yes<|im_end|>"),
    "thoughts as the server cut them": (DROPS, thought("\n\nyes", "hm\n"), "hm\n</think>\n\nyes<|im_end|>"),
}


@pytest.mark.parametrize("end_counted", [True, False])
@pytest.mark.parametrize(("template", "answer", "response"), COUNTED.values(), ids=COUNTED.keys())
def test_the_servers_count_tells_what_was_written(
    tokenizer: Any, template: str, answer: Any, response: str, end_counted: bool
) -> None:
    count = tokens(tokenizer, response) - (not end_counted)
    assert written(tokenizer, template, answer, counts=(count,))[1] == response


def test_a_count_that_fits_no_spelling_is_refused(tokenizer: Any) -> None:
    blanks_lost, count = thought("yes", "hm"), tokens(tokenizer, "hm\n</think>\n\nyes<|im_end|>")
    with pytest.raises(UserError, match=f"usage says {count} tokens"):
        written(tokenizer, DROPS, blanks_lost, counts=(count,))
    with pytest.raises(UserError, match="usage says 60 tokens, but the answer in conversation a has 3 as text"):
        written(tokenizer, TRIMS, "no", counts=(60,))


def test_answers_of_others_are_framed_as_the_template_does_it(tokenizer: Any) -> None:
    framed = written(tokenizer, CHANNELS, "yes", served=False)
    assert framed[1] == "<|channel|>final<|message|>yes<|im_end|>"
    with pytest.raises(UserError, match="enable_thinking=false"):
        written(tokenizer, HYBRID, "yes", served=False)


def test_of_several_end_tokens_the_templates_own_is_taken(tokenizer: Any) -> None:
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<turn>", "<|end|>"])
    assert written(tokenizer, TRIMS, "ha", eos_ids=ends)[1] == "ha<|im_end|>"
    assert written(tokenizer, CLOSED, "ha", eos_ids=ends)[1] == "ha<turn>"
    assert written(tokenizer, CLOSED, "ha", eos_ids=ends[:1])[1:] == ("ha", "length")


# -- replies ---------------------------------------------------------------------------------------------------------
def reply(tokenizer: Any, template: str, response: str, prompt: str = "<|im_start|>assistant\n") -> Any:
    tokenizer.chat_template = template
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, response)]
    found = reply_message(tokenizer, *ids, [tokenizer.eos_token_id])
    assert found.pop("role") == "assistant"
    return found


SAID = {
    "text": (TRIMS, " yes \n<|im_end|>", {"content": " yes \n"}),
    "padding and unknown": (TRIMS, "ye<unk>s<pad>", {"content": "yes"}),
    "the mark of another turn": (TRIMS, "yes<|im_start|>user", {"content": "yesuser"}),
    "the template's own marks": (HYBRID, "<think>\nhm\n</think>\n\nyes", {"content": "<think>\nhm\n</think>\n\nyes"}),
    "marks that it knows by key": (
        HEAD + "{{ m.content }}{{ m.reasoning_content }}" + TAIL + "{% endif %}",
        "<think>\nhm\n</think>\n\nyes", {"content": "yes", "reasoning_content": "hm"},
    ),
    "marks that it knows nothing of": (
        TRIMS, "<think>hm</think><response>yes</response>", {"content": "yes", "reasoning_content": "hm"},
    ),
    "an answer in marks alone": (TRIMS, "<answer>yes</answer>", {"content": "<answer>yes</answer>"}),
    "special marks": (TRIMS, "[THINK]hm[/THINK]yes<|im_end|>", {"content": "yes", "reasoning_content": "hm"}),
    "a channel of thoughts": (
        CLOSED, "<|channel>thought\nhm<channel|>yes", {"content": "yes", "reasoning_content": "hm"},
    ),
    "channels": (
        CHANNELS, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes<|im_end|>",
        {"content": "yes", "reasoning_content": "hm"},
    ),
    "a final channel alone": (CHANNELS, "<|channel|>final<|message|>yes", {"content": "yes"}),
}  # fmt: skip


@pytest.mark.parametrize(("template", "response", "found"), SAID.values(), ids=SAID.keys())
def test_a_reply_is_what_a_chat_server_holds(tokenizer: Any, template: str, response: str, found: Any) -> None:
    assert reply(tokenizer, template, response) == found


def test_thoughts_that_the_prompt_opened_are_no_part_of_the_reply(tokenizer: Any) -> None:
    opened = "<|im_start|>assistant\n<think>\n"
    assert reply(tokenizer, OPENS, "hm\n</think>\n\nyes", opened) == {"content": "hm\n</think>\n\nyes"}
    assert reply(tokenizer, TRIMS, "hm\n</think>\n\nyes", opened) == {"content": "yes", "reasoning_content": "hm"}


UNCLEAR = {
    "thoughts without an end": (HYBRID, "<think>\nhm", "do not end"),
    "special marks without an end": (TRIMS, "[THINK]hm", "do not end"),
    "no final channel": (CHANNELS, "<|channel|>analysis<|message|>hm", "no final channel"),
    "a call in a channel": (CHANNELS, "<|channel|>commentary to=tides<|message|>{}", "no final channel"),
    "an unknown mark": (TRIMS, "hm<turn>yes", "special token <turn>"),
    "a mark behind the thoughts": (TRIMS, "[THINK]hm[/THINK]ye<turn>s", "special token <turn>"),
}


@pytest.mark.parametrize(("template", "response", "why"), UNCLEAR.values(), ids=UNCLEAR.keys())
def test_a_reply_that_is_not_clear_is_no_history(tokenizer: Any, template: str, response: str, why: str) -> None:
    with pytest.raises(UnclearReply, match=why):
        reply(tokenizer, template, response)


def test_a_cut_off_thought_behind_an_opening_is_not_taken_for_an_answer(tokenizer: Any) -> None:
    with pytest.raises(UnclearReply, match="do not end"):
        reply(tokenizer, OPENS, "hm", "<|im_start|>assistant\n<think>\n")
