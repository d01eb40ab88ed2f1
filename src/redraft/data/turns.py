"""Turns of a conversation: the many names that data sets and servers have for the same thing, brought to one form.

A turn is ``{"role", "content"}`` with text as content, and where it has them ``reasoning_content`` (what an assistant
thought before it spoke), ``tool_calls`` (OpenAI's, the arguments as an object), ``tool_call_id`` and ``name``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from redraft.inputs import loads

Message = dict[str, Any]

SYSTEM, DEVELOPER, USER, ASSISTANT, TOOL, FUNCTION = "system", "developer", "user", "assistant", "tool", "function"
ROLES = (SYSTEM, DEVELOPER, USER, ASSISTANT, TOOL, FUNCTION)
RESULTS = (TOOL, FUNCTION)
ROLE_NAMES = {
    "human": USER,
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "bing", "bard", "model"), ASSISTANT),
    **dict.fromkeys(("observation", "tool_response", "function_response", "ipython"), TOOL),
}
CALLS = ("function_call", "tool_call")  # names of turns that are a call and nothing else
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA = "image images image_url image_urls video videos audio audios".split()
# Of a turn: present and not empty, they say that its text is not all there is to it.
UNREAD = [*MEDIA, "files", "attachments", "refusal", "prefix", "partial"]
UNTRAINED = ("train", "loss")  # set to false as a weight of 0 is set elsewhere


def excerpt(value: Any) -> str:
    """The beginning of a value, for a message."""
    return json.dumps(value, default=str)[:40]


def keys_of(item: Mapping[str, Any]) -> str:
    """The first keys of a row, for a message."""
    return ", ".join(sorted(map(str, item))[:8]) or "none"


def asked_by_user(text: str) -> Message:
    """A user's turn."""
    return {"role": USER, "content": text}


def exchange(question: str, answer: str) -> list[Message]:
    """A user's turn and the assistant's answer to it."""
    return [asked_by_user(question), {"role": ASSISTANT, "content": answer}]


def decoded(value: Any, name: str) -> Any:
    """A value that may be written as JSON text. Raises ``ValueError``."""
    if not isinstance(value, str):
        return value
    try:
        return loads(value)
    except ValueError as error:
        raise ValueError(f'"{name}" is neither an object nor its JSON text: {excerpt(value)}') from error


def parse_turns(turns: Any) -> list[Message]:
    """The turns of a list. Raises ``ValueError``."""
    if not isinstance(turns, list):
        raise ValueError("the turns of a conversation must be a list")
    return [parse_turn(turn) for turn in turns]


def parse_turn(turn: Any) -> Message:
    """One turn, under OpenAI's or ShareGPT's names. Raises ``ValueError`` that says what is wrong with it."""
    if not isinstance(turn, dict):
        raise ValueError(f"a turn must be a JSON object, not {excerpt(turn)}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    for key in UNREAD:
        if turn.get(key):
            raise ValueError(f'the key "{key}" of a turn is not read: only turns that are text can be used')
    if isinstance(role, str) and role in CALLS:
        calls = decoded(content, role)
        given = calls if isinstance(calls, list) else [calls]
        return {"role": ASSISTANT, "content": "", "tool_calls": [_call(call) for call in given]}
    found: Message = {"role": _role(role)}
    extra = _assistant(turn) if found["role"] == ASSISTANT else _named(turn)
    unsaid = content in (None, []) and extra.keys() & {"tool_calls", THOUGHTS[0]}
    found["content"] = "" if unsaid else text_of(content)
    return found | extra


def _role(role: Any) -> str:
    plain = ROLE_NAMES.get(role, role) if isinstance(role, str) else ""
    if plain not in ROLES:
        raise ValueError(f"unknown role {json.dumps(role)}; use {', '.join(ROLES)}")
    return plain


def text_of(content: Any) -> str:
    """Plain text, or the joined text parts of the list form of content."""
    if isinstance(content, str):
        return content
    if content and isinstance(content, list) and all(isinstance(part, dict) for part in content):
        other = next((part.get("type") for part in content if part.get("type", "text") not in TEXT_PARTS), None)
        if other is not None:
            raise ValueError(f"the content of a turn has a part of type {excerpt(other)}; only text can be used")
        if all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
    raise ValueError(f"the content of a turn must be text, not {excerpt(content)}")


def _named(turn: Mapping[str, Any]) -> Message:
    """What a turn that is not the assistant's may say beside its text."""
    if turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError("a call of a tool stands in a turn that is not the assistant's")
    return {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}


def _assistant(turn: Mapping[str, Any]) -> Message:
    """Thoughts, calls, and the weight that training gives to an assistant's turn."""
    name = {"name": turn["name"]} if isinstance(turn.get("name"), str) else {}
    parts = {THOUGHTS[0]: _thoughts(turn), "tool_calls": _calls(turn)}
    untrained = turn.get("weight") == 0 or any(turn.get(key) is False for key in UNTRAINED)
    return {**name, **{key: part for key, part in parts.items() if part}, **({"weight": 0} if untrained else {})}


def _thoughts(turn: Mapping[str, Any]) -> str:
    """What a server split from the answer; empty where there is nothing. Raises ``ValueError``."""
    found = {key: turn[key] for key in THOUGHTS if turn.get(key)}
    for key, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f'"{key}" of a turn must be text, not {excerpt(value)}')
    if len(set(found.values())) > 1:
        raise ValueError(f"a turn has two different thoughts, in {' and '.join(found)}; keep one")
    if not found and turn.get("reasoning_details"):
        raise ValueError('the key "reasoning_details" is not read; give the thoughts as "reasoning"')
    return next(iter(found.values()), "")


def _calls(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of an assistant's turn, from ``tool_calls`` or the older ``function_call``. ``ValueError``."""
    older = [turn["function_call"]] if turn.get("function_call") else []
    given = decoded(turn.get("tool_calls") or older, "tool_calls")
    if not isinstance(given, list):
        raise ValueError(f'"tool_calls" must be a list, not {excerpt(given)}')
    return [_call(call) for call in given]


def _call(call: Any) -> dict[str, Any]:
    """A call in OpenAI's form, its arguments as an object, which is how engines hand them to a template."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ValueError(f"a tool call must name its function, not be {excerpt(call)}")
    arguments = inner.get("arguments", inner.get("parameters")) or {}
    arguments = decoded(arguments, f"arguments of {inner['name']}")
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {inner['name']} must be an object, not {excerpt(arguments)}")
    id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**id, "type": "function", "function": {"name": inner["name"], "arguments": arguments}}
