"""One row of text of any shape that people use, brought to a conversation: turns, tools and template arguments.

What a key means is told in docs/text.md. A key that changes what an engine is sent is read or refused by name; other
keys (scores, sources, categories) play no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redraft.data.turns import (
    ASSISTANT,
    SYSTEM,
    THOUGHTS,
    USER,
    Message,
    decoded,
    excerpt,
    keys_of,
    parse_turns,
    text_of,
)
from redraft.data.unread_keys import refuse_keys, refuse_parts, refuse_second_text

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
        return Conversation(default_id, checked([{"role": USER, "content": item}]))
    if not isinstance(item, dict):
        raise ValueError(f"a prompt must be a JSON object, not {excerpt(item)}")
    name = id_of(item.get("id"), default_id)
    item = _with_extra_body(item)
    refuse_keys(item)
    messages = checked(_with_thoughts(item, _with_system(item, _messages(item))))
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
            return _alone(item, key, parse_turns(item[key]), ("prompt", "instruction"))
    if isinstance(item.get("prompt"), list):
        asked = _alone(item, "prompt", parse_turns(item["prompt"]), ())
        answer = item.get("completion")
        return asked + (parse_turns(answer) if isinstance(answer, list) else _answer(item))
    if item.get("data") is not None:
        return _alone(item, "data", _alternating(item["data"]), ("prompt", "instruction", "question"))
    if _is_list_of_texts(item.get("turns")):
        asked = [{"role": USER, "content": text} for text in item["turns"]]
        return _alone(item, "turns", asked, ("prompt", "instruction", "question"))
    if "instruction" in item:
        turn = {"role": USER, "content": _instruction(item)}
        _alone(item, "instruction", [turn], ("prompt", "question"))
        return [*_history(item.get("history")), turn, *_answer(item)]
    if item.get("question") and item.get("prompt"):
        raise ValueError('both "question" and "prompt"; keep what is asked')
    for key in ("question", "prompt"):
        if item.get(key) is not None:
            return [*_alone(item, key, [{"role": USER, "content": text_of(item[key])}], ()), *_answer(item)]
    raise ValueError(
        'no "messages" (or ShareGPT "conversations", Alpaca "instruction", "prompt", "question") among its keys: '
        + keys_of(item)
    )


def _alone(item: dict[str, Any], key: str, messages: list[Message], others: Sequence[str]) -> list[Message]:
    """The turns under ``key``, if no other key says something that they lack. Raises ``ValueError``."""
    texts = [message["content"] for message in messages if message["role"] != ASSISTANT]
    refuse_parts(item, key, texts)
    for other in others:
        refuse_second_text(item, other, key, texts)
    return messages


def _answer(item: dict[str, Any]) -> list[Message]:
    """The answer in a key of its own, as a turn; none where there is none."""
    found = [(key, item[key]) for key in ANSWER_KEYS if item.get(key)]
    if len(found) > 1:
        raise ValueError(f"two answers, in {found[0][0]} and {found[1][0]}; keep one")
    return [{"role": ASSISTANT, "content": text_of(value)} for _, value in found]


def _instruction(item: dict[str, Any]) -> str:
    """Alpaca's instruction with its input, Dolly's with its context."""
    parts = [text_of(item[key]) for key in ("input", "context") if item.get(key)]
    if len(parts) > 1:
        raise ValueError('both "input" and "context" stand beside the instruction; keep one')
    return "\n\n".join(text for text in (text_of(item["instruction"]), *parts) if text)


def _history(pairs: Any) -> list[Message]:
    """Earlier rounds of an Alpaca row, a list of question and answer each."""
    if pairs is None:
        return []
    if not isinstance(pairs, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise ValueError(f'"history" must be a list of [question, answer], not {excerpt(pairs)}')
    roles = (USER, ASSISTANT)
    return [{"role": role, "content": text_of(text)} for p in pairs for role, text in zip(roles, p, strict=True)]


def _alternating(texts: Any) -> list[Message]:
    """UltraChat's list of texts, the user's first."""
    if not _is_list_of_texts(texts):
        raise ValueError(f'"data" must be a list of texts, the user\'s first, not {excerpt(texts)}')
    return [{"role": (USER, ASSISTANT)[number % 2], "content": text} for number, text in enumerate(texts)]


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _with_extra_body(item: dict[str, Any]) -> dict[str, Any]:
    """The row with what a client's ``extra_body`` lays beside its keys; template arguments stay where they are.

    Raises ``ValueError`` for a key that is there twice with two values.
    """
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
    if not found or messages[-1:] == [] or messages[-1]["role"] != ASSISTANT:
        return messages
    last = messages[-1]
    thoughts = {*found.values(), *([last[THOUGHTS[0]]] if last.get(THOUGHTS[0]) else [])}
    if len(thoughts) > 1:
        raise ValueError(f'the key "{next(iter(found))}" and another are two thoughts of the last answer; keep one')
    return [*messages[:-1], {**last, THOUGHTS[0]: thoughts.pop()}]


def _with_system(item: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The turns behind the system text that stands in a key of its own."""
    for key in SYSTEM_KEYS:
        if not item.get(key):
            continue
        text = text_of(item[key])
        first = messages[0] if messages else {}
        if first.get("role") == SYSTEM and first["content"] != text:
            raise ValueError(f'the key "{key}" and the first turn are two system texts; keep one')
        if first.get("role") != SYSTEM:
            messages = [{"role": SYSTEM, "content": text}, *messages]
    return messages


def checked(messages: list[Message]) -> list[Message]:
    """The turns, if a user asks something in them. Raises ``ValueError``."""
    users = [message for message in messages if message["role"] == USER]
    if not users:
        raise ValueError("the conversation has no user turn")
    if not all(message["content"].strip() for message in users):
        raise ValueError("a user turn is empty")
    return messages


# -- beside the turns ------------------------------------------------------------------------------------------------
def tools_of(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools of a row as OpenAI writes them, from ``tools`` (a list, or its JSON text) or the older ``functions``.

    Raises ``ValueError``.
    """
    found = [(key, decoded(item[key], key)) for key in ("tools", "functions") if item.get(key)]
    found = [(key, value) for key, value in found if value]
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
    function = (
        whole.get("function") if isinstance(whole, dict) and whole.get("type", "function") == "function" else None
    )
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f'"{key}" holds {excerpt(tool)}, which is no function tool as OpenAI writes them')
    return whole


def arguments_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """The template arguments of a request: ``chat_template_kwargs``, and two that may stand outside it.

    Raises ``ValueError``.
    """
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
    row: dict[str, Any] = {"id": conversation.id, "messages": conversation.messages}
    row |= {"tools": conversation.tools} if conversation.tools else {}
    return row | ({"chat_template_kwargs": conversation.arguments} if conversation.arguments else {})
