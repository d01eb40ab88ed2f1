"""One row of text of any shape that people use, brought to a conversation: turns, tools and template arguments.

What a key means is told in docs/text.md. A key that changes what an engine is sent is read or refused by name; other
keys (scores, sources, categories) play no part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redraft.data import turns as turn_shapes
from redraft.data.turns import ASSISTANT, SYSTEM, THOUGHTS, USER, Message, asked_by_user, decoded, excerpt, text_of

TURN_KEYS = ("messages", "conversations", "conversation")
SYSTEM_KEYS = ("system", "system_prompt", "system_message", "system_instruction")
ANSWER_KEYS = ("completion", "response", "answer", "output")
# Template arguments that requests carry outside chat_template_kwargs.
LOOSE_ARGUMENTS = ("enable_thinking", "reasoning_effort")
ARGUMENT_KEYS = ("chat_template_kwargs", "chat_template_args")
# What apply_chat_template and its renderer keep for themselves.
RESERVED = frozenset(
    "messages conversation conversations tools documents chat_template add_generation_prompt continue_final_message "
    "tokenize sanitize_control_tokens padding truncation max_length return_tensors return_dict "
    "return_assistant_tokens_mask tokenizer_kwargs strftime_now raise_exception".split()
)
BEGINNING = "an answer that goes on from a given beginning is no answer of its own; leave it out"
PAIR = "a pair of answers says not which one counts; keep the prompt, and one answer as completion"
# Keys that would change the prompt and are not read, and what to do about them.
REFUSED = {
    **dict.fromkeys(turn_shapes.MEDIA, "only text can be trained on; leave such rows out"),
    **dict.fromkeys(("chosen", "rejected"), PAIR),
    **dict.fromkeys(("continue_final_message", "prefix", "prefill", "assistant_prefill"), BEGINNING),
    "instructions": 'give it as "system", or in the first turn',
    "suffix": "a text to be filled in is no chat; leave such rows out",
    "chat_template": "the target's own chat template is used; set it in the tokenizer",
    "documents": "write them into a turn, as the template would",
}
# Texts beside a question that belong to it in some way which only their data set knows.
TEXTS = (
    "context contexts ctxs passage passages document article paragraph story background evidence table schema "
    "starter_code"
).split()
CHOICES = "choices options option_a opa A endings candidates hint".split()
PARTS = (*TEXTS, *CHOICES, "input", "inputs")
# Beside turns, of which a server's answer has choices too; and beside Alpaca's instruction, which has two of its own.
PARTS_OF_TURNS = ("context", "contexts", "ctxs", "passage", "passages", "document", "article")
PARTS_OF_AN_INSTRUCTION = tuple(name for name in PARTS if name not in ("input", "context"))
ONE_TEXT = ("question", "prompt")


@dataclass(frozen=True)
class Conversation:
    """Turns in order, each ``{"role", "content"}`` and what else its role has (:mod:`redraft.data.turns`).

    ``tools`` are OpenAI's function tools, ``arguments`` those of the chat template that the row itself names.
    """

    id: str
    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)

    def turns(self, messages: Iterable[Message]) -> Turns:
        """Other messages with this conversation's tools and arguments."""
        return Turns(messages, self.tools, self.arguments)


class Turns(list[Message]):
    """Messages for a chat template, with what it is handed beside them."""

    def __init__(
        self, messages: Iterable[Message], tools: Sequence[Any] = (), arguments: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(messages)
        self.tools, self.arguments = list(tools), dict(arguments or {})


def with_turns(asked: Sequence[Message], messages: Iterable[Message]) -> Turns:
    """``messages`` with the tools and arguments of ``asked``, where it has any."""
    return Turns(messages, asked.tools, asked.arguments) if isinstance(asked, Turns) else Turns(messages)


def parse_conversation(item: Any, default_id: str) -> Conversation:
    """The conversation of one item of any known shape. Raises ``ValueError`` that says what is wrong with it."""
    if isinstance(item, str):
        return Conversation(default_id, _checked([asked_by_user(item)]))
    if not isinstance(item, dict):
        raise ValueError(f"a prompt must be a JSON object, not {excerpt(item)}")
    name = id_of(item.get("id"), default_id)
    item = _with_extra_body(item)
    _refuse_keys(item)
    messages = _checked(_with_thoughts(item, _with_system(item, _messages(item))))
    return Conversation(name, messages, tools_of(item), arguments_of(item))


def id_of(given: Any, default: str) -> str:
    """The id of a row as text; ``default`` where it has none. Raises ``ValueError``."""
    if isinstance(given, bool) or not isinstance(given, str | int | None):
        raise ValueError(f"the id must be text or a whole number, not {excerpt(given)}")
    return default if given is None or given == "" else str(given)


# -- turns -----------------------------------------------------------------------------------------------------------
def _messages(item: dict[str, Any]) -> list[Message]:
    """The turns of a row, without the system text of a key of its own."""
    for key in TURN_KEYS:
        if item.get(key) is not None:
            return _alone(item, key, turn_shapes.parse_turns(item[key]), ("prompt", "instruction"))
    if isinstance(item.get("prompt"), list):
        asked, answer = _alone(item, "prompt", turn_shapes.parse_turns(item["prompt"]), ()), item.get("completion")
        return asked + (turn_shapes.parse_turns(answer) if isinstance(answer, list) else _answer(item))
    if item.get("data") is not None:
        return _alone(item, "data", _alternating(item["data"]), ("prompt", "instruction", "question"))
    if _is_list_of_texts(item.get("turns")):
        return _alone(item, "turns", list(map(asked_by_user, item["turns"])), ("prompt", "instruction", "question"))
    if "instruction" in item:
        turns = _alone(item, "instruction", [asked_by_user(_instruction(item))], ("prompt", "question"))
        return [*_history(item.get("history")), *turns, *_answer(item)]
    if item.get("question") and item.get("prompt"):
        raise ValueError('both "question" and "prompt"; keep what is asked')
    for key in ONE_TEXT:
        if item.get(key) is not None:
            return [*_alone(item, key, [asked_by_user(text_of(item[key]))], ()), *_answer(item)]
    raise ValueError(
        'no "messages" (or ShareGPT "conversations", Alpaca "instruction", "prompt", "question") among its keys: '
        + turn_shapes.keys_of(item)
    )


def _alone(item: dict[str, Any], key: str, messages: list[Message], others: Sequence[str]) -> list[Message]:
    """The turns under ``key``, if neither ``others`` beside it, which ask something themselves, nor texts or choices
    that belong to what is asked say something that the turns lack. Raises ``ValueError``."""
    texts = [message["content"] for message in messages if message["role"] != ASSISTANT]
    whole = key in ONE_TEXT and isinstance(item.get(key), str)
    for name in PARTS if whole else PARTS_OF_AN_INSTRUCTION if key == "instruction" else PARTS_OF_TURNS:
        value = item.get(name)
        if _says_something(value) and not (isinstance(value, str) and _within(value, texts)):
            raise ValueError(f'the key "{name}" beside "{key}" is not read; write what is asked into one text')
    for other in others if texts else ():
        said = item.get(other)
        # Data sets often repeat a question, and logs a whole prompt with its marks: either may be within the other.
        if not isinstance(said, str) or not said.strip() or _within(said, texts):
            continue
        if not all(_within(text, [said]) for text in texts):
            raise ValueError(f'both "{other}" and "{key}" ask something; write what is asked into one of them')
    return messages


def _within(part: str, texts: Sequence[str]) -> bool:
    """Whether one of the texts holds the part as whole words, whatever their blanks."""
    whole = re.compile(rf"(?<!\w){re.escape(' '.join(part.split()))}(?!\w)")
    return any(whole.search(" ".join(text.split())) for text in texts)


def _says_something(value: Any) -> bool:
    """Whether a value holds text; numbers (token ids, counts, marks) do not."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(_says_something(inner) for inner in value.values())
    return isinstance(value, list) and any(_says_something(inner) for inner in value)


def _refuse_keys(item: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for the first key of a row that is not read."""
    for key, advice in REFUSED.items():
        if item.get(key):
            raise ValueError(f'the key "{key}" is not read: {advice}')
    if item.get("add_generation_prompt") is False:
        raise ValueError('the key "add_generation_prompt" is not read: the answer\'s turn is always opened')
    for key in THOUGHTS:
        # {"effort": "high"}, {"type": "disabled"}: each server makes template arguments of its own of them.
        if isinstance(item.get(key), dict) and any(value is not None for value in item[key].values()):
            raise ValueError(
                f'the key "{key}" is not read where it is {excerpt(item[key])}: say in chat_template_kwargs what the '
                "template was handed"
            )


def _answer(item: dict[str, Any]) -> list[Message]:
    """The answer in a key of its own, as a turn; none where there is none."""
    found = [(key, item[key]) for key in ANSWER_KEYS if _given(item.get(key))]
    if len(found) > 1:
        raise ValueError(f"two answers, in {found[0][0]} and {found[1][0]}; keep one")
    return [{"role": ASSISTANT, "content": text_of(value)} for _, value in found]


def _given(value: Any) -> bool:
    """Whether there is anything: no text, list or object that is empty. Zero and false are, and no text."""
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def _instruction(item: dict[str, Any]) -> str:
    """Alpaca's instruction with its input, Dolly's with its context."""
    parts = [text_of(item[key]) for key in ("input", "context") if _given(item.get(key))]
    if len(parts) > 1:
        raise ValueError('both "input" and "context" stand beside the instruction; keep one')
    return "\n\n".join(text for text in (text_of(item["instruction"]), *parts) if text)


def _history(pairs: Any) -> list[Message]:
    """Earlier rounds of an Alpaca row, a list of question and answer each."""
    if pairs is None:
        return []
    if not isinstance(pairs, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise ValueError(f'"history" must be a list of [question, answer], not {excerpt(pairs)}')
    return [turn for question, answer in pairs for turn in turn_shapes.exchange(text_of(question), text_of(answer))]


def _alternating(texts: Any) -> list[Message]:
    """UltraChat's list of texts, the user's first."""
    if not _is_list_of_texts(texts):
        raise ValueError(f'"data" must be a list of texts, the user\'s first, not {excerpt(texts)}')
    return [{"role": (USER, ASSISTANT)[number % 2], "content": text} for number, text in enumerate(texts)]


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _with_extra_body(item: dict[str, Any]) -> dict[str, Any]:
    """The row with what a client's ``extra_body`` lays beside its keys, but for template arguments. ``ValueError``."""
    if not item.get("extra_body"):
        return item
    extra = decoded(item["extra_body"], "extra_body")
    if not isinstance(extra, dict):
        raise ValueError(f'"extra_body" must be an object, not {excerpt(extra)}')
    laid = {key: value for key, value in extra.items() if key not in (*ARGUMENT_KEYS, *LOOSE_ARGUMENTS)}
    for key, value in laid.items():
        if item.get(key) not in (None, value):
            raise ValueError(f'"{key}" stands beside extra_body and in it, with two values; keep one')
    return {**item, **laid, "extra_body": extra}


def _with_thoughts(item: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The turns, the last answer with the thoughts that stand in a key of the row. Raises ``ValueError``."""
    found = {key: item[key] for key in THOUGHTS if isinstance(item.get(key), str) and item[key]}
    last = messages[-1] if messages else {}
    if not found or last.get("role") != ASSISTANT:
        return messages
    thoughts = {*found.values(), *([last[THOUGHTS[0]]] if last.get(THOUGHTS[0]) else [])}
    if len(thoughts) > 1:
        raise ValueError(f'the key "{next(iter(found))}" and another are two thoughts of the last answer; keep one')
    return [*messages[:-1], {**last, THOUGHTS[0]: thoughts.pop()}]


def _with_system(item: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The turns behind the system text that stands in a key of its own."""
    for key in filter(item.get, SYSTEM_KEYS):
        text, first = text_of(item[key]), messages[0] if messages else {}
        if first.get("role") == SYSTEM and first["content"] != text:
            raise ValueError(f'the key "{key}" and the first turn are two system texts; keep one')
        if first.get("role") != SYSTEM:
            messages = [{"role": SYSTEM, "content": text}, *messages]
    return messages


def _checked(messages: list[Message]) -> list[Message]:
    """The turns, if a user asks something in them. Raises ``ValueError``."""
    asked = [message["content"].strip() for message in messages if message["role"] == USER]
    if not all(asked) or not asked:
        raise ValueError("a user turn is empty" if asked else "the conversation has no user turn")
    return messages


# -- beside the turns ------------------------------------------------------------------------------------------------
def tools_of(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools of a row as OpenAI writes them, from ``tools`` (or its JSON text) or ``functions``. ``ValueError``."""
    given = [(key, decoded(item[key], key)) for key in ("tools", "functions") if item.get(key)]
    found = [(key, value) for key, value in given if value]
    if not found:
        return []
    if len(found) > 1:
        raise ValueError('both "tools" and "functions"; keep one')
    key, tools = found[0]
    if item.get("tool_choice") == "none":
        raise ValueError(f'"{key}" with tool_choice "none": engines differ in whether the prompt names them; drop both')
    if not isinstance(tools, list):
        raise ValueError(f'"{key}" must be a list of tools, not {excerpt(tools)}')
    return [_tool(key, tool) for tool in tools]


def _tool(key: str, tool: Any) -> dict[str, Any]:
    """A tool with its wrapper, which some data sets leave out."""
    bare = isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str)
    whole = {"type": "function", "function": tool} if bare and "input_schema" not in tool else tool
    wrapped = isinstance(whole, dict) and whole.get("type", "function") == "function"
    function = whole.get("function") if wrapped else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f'"{key}" holds {excerpt(tool)}, which is no function tool as OpenAI writes them')
    return whole


def arguments_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """The template arguments of a request: ``chat_template_kwargs``, and two that may stand outside it.
    Raises ``ValueError``."""
    extra = item.get("extra_body")
    places = [item, extra] if isinstance(extra, Mapping) else [item]
    found: dict[str, Any] = {}
    for place in places:
        found |= {key: place[key] for key in LOOSE_ARGUMENTS if place.get(key) is not None}
        for key in ARGUMENT_KEYS:
            given = decoded(place[key], key) if place.get(key) else {}
            if not isinstance(given, dict):
                raise ValueError(f'"{key}" must be an object of names and values, not {excerpt(given)}')
            found |= {name: value for name, value in given.items() if value is not None}
    for name, value in found.items():
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            raise ValueError(f"{name} is the text {value!r}, which templates take for true; write it without quotes")
    if wrong := sorted(RESERVED & found.keys()):
        raise ValueError(f"{wrong[0]} is no argument of a chat template; leave it out of chat_template_kwargs")
    return found


def row_of(conversation: Conversation) -> dict[str, Any]:
    """The conversation as a row of a prompt file, which :func:`parse_conversation` reads again."""
    beside = {"tools": conversation.tools, "chat_template_kwargs": conversation.arguments}
    return {"id": conversation.id, "messages": conversation.messages, **{k: v for k, v in beside.items() if v}}
