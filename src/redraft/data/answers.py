"""Between text and tokens: the token ids of an answer that came as text, and the chat turn of a response in ids.

A chat template writes answers in its own way: it trims them, drops thoughts, opens an empty block of thoughts. So the
answer's own text is put behind the template's opening of its turn, and of the template only what frames it is taken:
marks between thoughts and answer, and the end token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from redraft.data.prompts import check_length, prompt_messages, user_turns
from redraft.data.shapes import Conversation, with_turns
from redraft.data.store import REFERENCE, UNKNOWN, Failure, Row, row_key
from redraft.data.template import render, template_ids, template_text
from redraft.data.turns import ASSISTANT, SYSTEM, USER, Message
from redraft.errors import UserError

ANSWER, THOUGHT = "redraftanswer", "redraftthought"
# What opens and closes a block of thoughts in the public families of models that think.
MARKS = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "seed:think", "thought", "reasoning")),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
)
# What stands around an answer behind its thoughts.
ANSWER_MARKS = (("<|START_RESPONSE|>", "<|END_RESPONSE|>"), ("<response>", "</response>"), ("<answer>", "</answer>"))
HARMONY = re.compile(r"(?:<\|start\|>[^<]*)?<\|channel\|>([^<]*)(?:<\|constrain\|>[^<]*)?<\|message\|>")


# -- text to tokens --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Frame:
    """What a template writes around an answer: before the thoughts, between the two, and behind, up to the end token.

    ``before`` is what it writes between its opening of the turn and the thoughts, or the answer where there are none;
    None where it does not write the turn behind that opening at all. ``between`` is None where it drops the thoughts.
    """

    opened: str
    before: str | None
    between: str | None
    behind: str
    end: int | None


def answer_ids(
    tokenizer: Any,
    id: str,
    asked: Sequence[Message],
    answer: str | Message,
    eos_ids: Collection[int] = (),
    *,
    cut: bool = False,
    served: bool = False,
    counts: Collection[int] = (),
) -> tuple[list[int], list[int], str]:
    """(prompt ids, response ids, finish reason) of an ``answer`` to the messages ``asked``, by the chat template.

    The response is the answer's own text behind the opening of the assistant's turn, any thoughts before it, and the
    first end token that the template writes behind it (``stop``); without one where it was ``cut`` off or the template
    writes none (``length``). ``served`` answers are the model's own: nothing is put among them that the model may not
    have written, unless the number of tokens, one of ``counts``, says that it did. Others are framed as the template
    does it. ``eos_ids`` are the target's end tokens (the tokenizer's own where none are given). Raises ``UserError``
    for a template that cannot be followed or drops the thoughts, an answer without the thoughts that its prompt opens,
    one with a tool call, one that holds an end token.
    """
    message: Message = {"role": ASSISTANT, "content": answer} if isinstance(answer, str) else answer
    if message.get("tool_calls"):
        raise UserError(
            f"the answer in conversation {id} has tool_calls, whose tokens as the model wrote them cannot be told from "
            "them; log token ids instead, or leave such rows out"
        )
    ends = set(eos_ids) or {int(tokenizer.eos_token_id)}
    prompt = template_ids(tokenizer, id, asked)
    frame = _frame(tokenizer, id, asked, bool(message.get("reasoning_content")), ends)
    end = [] if cut or frame.end is None else [frame.end]
    texts = dict.fromkeys(_texts(id, frame, message, served, bool(counts), cut))
    responses = [continuation_ids(tokenizer, prompt, frame.opened, text) for text in texts]
    for each in responses:
        if not each or each[0] in ends:
            raise UserError(f"the answer in conversation {id} begins with an end token, so nothing of it is left")
        if inside := [token for token in each if token in ends]:
            mark = tokenizer.decode(inside[:1], skip_special_tokens=False)
            raise UserError(f"the answer in conversation {id} holds the end token {mark}; take it out of the text")
    response = _counted(id, responses, len(end), counts) if counts else responses[0]
    return prompt, [*response, *end], "stop" if end else "length"


def _counted(id: str, responses: Sequence[list[int]], end: int, counts: Collection[int]) -> list[int]:
    """The one response that has as many tokens as were counted, with its end token or else without."""
    fitting = [ids for ids in responses if len(ids) + end in counts] or [ids for ids in responses if len(ids) in counts]
    if len(fitting) == 1:
        return fitting[0]
    have = "several spellings of that number" if fitting else f"{len(responses[0]) + end} as text"
    raise UserError(
        f"usage says {' or '.join(map(str, sorted(counts)))} tokens, but the answer in conversation {id} has {have}, "
        "so what else the model wrote cannot be told; log token ids instead"
    )


def _frame(tokenizer: Any, id: str, asked: Sequence[Message], thinks: bool, ends: Collection[int]) -> _Frame:
    opened = render(tokenizer, id, asked, True)
    sample = {"role": ASSISTANT, "content": ANSWER} | ({"reasoning_content": THOUGHT} if thinks else {})
    whole = render(tokenizer, id, with_turns(asked, [*asked, sample]), False)
    before, found, behind = whole.rpartition(ANSWER)
    if not found:
        raise UserError(f"the chat template does not write the answer of conversation {id}; log token ids instead")
    lead: str | None = before[len(opened) :] if before.startswith(opened) else None
    between: str | None = None
    if thinks and THOUGHT in (lead or ""):
        lead, _, between = (lead or "").rpartition(THOUGHT)
    elif lead is None and before.rstrip() == _without_block(opened).rstrip():
        # The opening holds an empty block of thoughts that the template does not write into a history.
        lead = ""
    tail = list(tokenizer(behind, add_special_tokens=False).input_ids)
    place = next((place for place, token in enumerate(tail) if token in ends), None)
    if place is None:
        return _Frame(opened, lead, between, "", None)
    return _Frame(opened, lead, between, tokenizer.decode(tail[:place], skip_special_tokens=False), tail[place])


def _texts(id: str, frame: _Frame, message: Message, served: bool, counted: bool, cut: bool) -> Iterator[str]:
    """What the model may have written, the likeliest first. Raises ``UserError``."""
    content, thoughts = message["content"], message.get("reasoning_content", "")
    opens, lead = opened_thoughts(frame.opened), frame.before or ""
    behind = "" if cut else frame.behind.rstrip()
    thinks = any(mark in lead for mark, _ in MARKS)
    if thoughts:
        yield _thought_text(id, frame, content, thoughts, behind, counted, cut)
    elif any(_holds(content, pair) for pair in MARKS) or (cut and opens):
        # The thoughts are in the text, closed or cut off in their midst. The prompt may have opened them already.
        yield _behind_mark(frame.opened, content, opens[0]) if opens else content
    elif opens:
        raise UserError(
            f"the prompt of conversation {id} opens a block of thoughts, but its answer has none: they were split off "
            "and lost; give reasoning_content too, or token ids"
        )
    elif frame.before is None:
        raise UserError(
            f"the chat template does not write the answer of conversation {id} behind its own opening of an "
            "assistant turn, so it cannot be placed; regenerate the answers, or give token ids"
        )
    elif not lead.strip() and not behind:
        yield content if content.startswith(lead) else lead + content
    elif served and counted:
        yield content
        yield lead + content + behind
    elif not served and not thinks:
        yield lead + content + behind
    else:
        raise UserError(
            f"the chat template writes {(lead.strip() or behind)[:40]!r} around the answer of conversation {id}, which "
            "the row does not hold, so what the model wrote cannot be told; "
            + ("set --template-arg enable_thinking=false if it did not think, or " if thinks else "")
            + "give its thoughts, or token ids"
        )


def _thought_text(id: str, frame: _Frame, content: str, thoughts: str, behind: str, counted: bool, cut: bool) -> str:
    """Thoughts and answer that a server took apart: as the template joins them, or as its prompt's block asks for."""
    opens, lead, between = opened_thoughts(frame.opened), frame.before or "", frame.between
    if between is not None:
        begun = _behind_mark(frame.opened, thoughts, opens[0]) if opens and not lead else lead + _joined(lead, thoughts)
        if cut and not content:
            return begun
        return _joined_end(begun, between) + between + _joined(between, content) + behind
    if opens and counted and not behind:
        # A server that cut the text at the closing mark and left the blanks there; the count tells whether it did.
        return thoughts + opens[1] + content
    raise UserError(
        f"the chat template leaves out the thoughts (reasoning_content) of the answer in conversation {id}, so the "
        "tokens of the model's response cannot be told; log token ids, or usage with completion_tokens"
    )


def _without(text: str, mark: str) -> str:
    """The text behind an opening mark, which the prompt has already."""
    return text.lstrip().removeprefix(mark) if text.lstrip().startswith(mark) else text


def _behind_mark(opened: str, text: str, mark: str) -> str:
    """The text as it goes on behind ``opened``, which ends in the mark that the text may begin with once more."""
    return _joined(opened, _without(text, mark)) if text.lstrip().startswith(mark) else text


def _without_block(opened: str) -> str:
    """The opening of a turn without the closed block of thoughts that it ends in."""
    end = opened.rstrip()
    marks = next((pair for pair in MARKS if end.endswith(pair[1])), None)
    return end[: end.rindex(marks[0])] if marks and marks[0] in end else opened


def _joined(before: str, text: str) -> str:
    """The text without the blanks that stand in front of it already."""
    gap = before[len(before.rstrip()) :]
    while gap and not text.startswith(gap):
        gap = gap[1:]
    return text[len(gap) :]


def _joined_end(text: str, behind: str) -> str:
    """The text without the blanks that follow it anyway."""
    return _joined(behind[::-1], text[::-1])[::-1]


def continuation_ids(tokenizer: Any, prompt_ids: Sequence[int], prompt: str, text: str) -> list[int]:
    """Token ids of ``text`` where it follows ``prompt``, whose ids are ``prompt_ids`` (as it is, nothing added)."""
    joined = list(tokenizer(prompt + text, add_special_tokens=False).input_ids)
    if joined[: len(prompt_ids)] == list(prompt_ids):
        return joined[len(prompt_ids) :]
    # A token across the border: no engine that was sent the prompt would produce it.
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _holds(text: str, marks: tuple[str, str]) -> bool:
    """Whether a text begins with a block of thoughts, or holds the end of one that its prompt opened."""
    return text.lstrip().startswith(marks[0]) or marks[1] in text


def opened_thoughts(prompt: str) -> tuple[str, str] | None:
    """The marks of the block of thoughts that a prompt ends in; None where it opens none."""
    end = prompt.rstrip()
    return next((marks for marks in MARKS if end.endswith(marks[0])), None)


# -- tokens to a turn ------------------------------------------------------------------------------------------------
class UnclearReply(ValueError):
    """What of a reply is the answer cannot be told."""


def reply_message(
    tokenizer: Any, prompt_ids: Sequence[int], response_ids: Sequence[int], eos_ids: Collection[int]
) -> Message:
    """The assistant's turn that a chat server would hold of a response, for the history of the next turn.

    Thoughts whose marks the template knows what to do with stay in the text; others are split off, as a server's parser
    does it. Of gpt-oss's channels the final one is the answer. Raises ``UnclearReply`` where it cannot be told.
    """
    ids = list(response_ids)
    while ids and ids[-1] in eos_ids:
        ids.pop()
    text = tokenizer.decode(ids, skip_special_tokens=False)
    if "<|channel|>" in text:
        return _harmony(text)
    opens = opened_thoughts(tokenizer.decode(list(prompt_ids[-16:]), skip_special_tokens=False))
    marks = opens or next((pair for pair in MARKS if _holds(text, pair)), None)
    thought: Message = {}
    if marks is not None:
        if marks[1] not in text:
            raise UnclearReply("its thoughts do not end, so there is no answer")
        if special_tokens(tokenizer).intersection(marks) or marks[1] not in template_text(tokenizer):
            thoughts, _, text = text.rpartition(marks[1])
            thoughts, text = _without(thoughts, marks[0]).strip("\n"), text.lstrip("\n")
            around = next((pair for pair in ANSWER_MARKS if text.startswith(pair[0])), ("", ""))
            text = text.removeprefix(around[0]).removesuffix(around[1])
            thought = {"reasoning_content": thoughts} if thoughts.strip() else {}
    return {"role": ASSISTANT, "content": _said(tokenizer, text), **thought}


def special_tokens(tokenizer: Any) -> set[str]:
    """What decoding leaves out of the text it shows: the named special tokens, and those added as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def _said(tokenizer: Any, text: str) -> str:
    """The text without special tokens that frame no part of an answer (begin, padding, unknown, and those of turns,
    which a model that runs on may write). Raises ``UnclearReply`` for any other: beside it may stand something else."""
    text = text.removeprefix(ANSWER_MARKS[0][0]).removesuffix(ANSWER_MARKS[0][1])
    found = {mark for mark in special_tokens(tokenizer) if mark in text}
    strange = found - {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token}
    if strange:
        talk: list[Message] = [{"role": role, "content": ANSWER} for role in (USER, ASSISTANT, USER)]
        turns = render(tokenizer, "of a sample", talk, False)
        strange = {mark for mark in strange if mark not in turns}
    if strange:
        raise UnclearReply(f"it holds the special token {min(strange)}, so what of it is the answer cannot be told")
    for mark in found:
        text = text.replace(mark, "")
    return text


def _harmony(text: str) -> Message:
    """The final channel of a reply in gpt-oss's format, and what it thought before. Raises ``UnclearReply``."""
    _, *parts = HARMONY.split(text)
    names, bodies = map(str.strip, parts[::2]), (body.removesuffix("<|end|>") for body in parts[1::2])
    channels = list(zip(names, bodies, strict=True))
    final = [body for name, body in channels if name == "final"]
    other = [name for name, _ in channels if name not in ("analysis", "final", "commentary")]
    if len(final) != 1 or other or channels[-1][0] != "final" or "<|" in final[0]:
        raise UnclearReply("it has no final channel to take the answer from")
    thoughts = "\n".join(body for name, body in channels if name == "analysis")
    return {"role": ASSISTANT, "content": final[0], **({"reasoning_content": thoughts} if thoughts else {})}


# -- reference answers -----------------------------------------------------------------------------------------------
def reference_rows(
    conversations: Iterable[Conversation],
    tokenizer: Any,
    target_hash: str,
    *,
    eos_ids: Sequence[int] = (),
    max_new_tokens: int | None = None,
    context: int | None = None,
    failures: list[Failure] | None = None,
) -> list[Row]:
    """One row for every user turn, with the answer that stands behind it in the file; ``source`` is ``reference``.

    They are off-policy text, to be compared with the target's own answers to the same prompts, and what the published
    way to adapt a draft trains on.

    Turn by turn, as regeneration does it: the prompt of a later turn holds the reference answers to the earlier ones. A
    turn of ``weight`` 0 gives no row and stays in the prompts of later ones. ``eos_ids`` are the target's end tokens
    (the tokenizer's own where none are given). Answers longer than ``max_new_tokens`` are cut there and finish with
    ``length``, as a regenerated one would; ``context`` is the longest sequence of the target. A later turn that no
    longer fits goes to ``failures`` where a list is given, with all turns behind it.

    Raises ``UserError`` that names the conversation, as :func:`answer_ids` does, and for a user turn without an answer,
    a prompt that does not fit, an id that is there twice.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    for conversation in conversations:
        if conversation.id in seen:
            raise UserError(f"two conversations are called {conversation.id}; ids must differ")
        seen.add(conversation.id)
        answers = reference_answers(conversation)
        for turn, answer in enumerate(answers):
            if answer.get("weight") == 0:
                continue  # a turn that is only there to be answered
            asked = prompt_messages(conversation, answers[:turn])
            prompt, response, finish = answer_ids(tokenizer, conversation.id, asked, answer, eos_ids)
            try:
                check_length(conversation.id, len(prompt), max_new_tokens or len(response), context)
            except UserError as error:
                if turn == 0 or failures is None:
                    raise
                keys = (row_key(conversation.id, 0.0, later, REFERENCE) for later in range(turn, len(answers)))
                failures += (Failure(key, str(error)) for key in keys)
                break
            if max_new_tokens is not None and len(response) > max_new_tokens:
                response, finish = response[:max_new_tokens], "length"
            found = prompt, response, UNKNOWN, finish, target_hash
            rows.append(Row.of(conversation.id, *found, turn=turn, source=REFERENCE))
    return rows


def reference_answers(conversation: Conversation) -> list[Message]:
    """The assistant's turn behind every user turn, in order.

    Raises ``UserError`` when a user turn has none, an empty one or two, or an answer stands behind no user turn.
    """
    answers: list[Message] = []
    role = SYSTEM
    for message in conversation.messages:
        previous, role = role, message["role"]
        if role == ASSISTANT:
            if previous != USER:
                raise UserError(f"conversation {conversation.id} has an assistant turn that answers no user turn")
            answers.append(message)
        elif previous == USER:
            break
    empty = [not answer["content"].strip() and "tool_calls" not in answer for answer in answers]
    without = [*empty, True].index(True)
    if without < user_turns(conversation):
        raise UserError(
            f"conversation {conversation.id} has no reference answer to its user turn {without + 1}; remove that turn, "
            "or regenerate the answers"
        )
    return answers
