"""The target's chat template: its arguments, the date that it writes, and text or token ids of messages through it.

What a run hands its template beside the messages is kept with the tokenizer (:func:`use_template`), so that prompts,
answers and measurements of the run all come through the same template. A template that writes the date (Llama 3,
gpt-oss, Granite, SmolLM3, Mistral) is shown one date for the whole run: that of its start, which a resumed run finds
again (:func:`kept_moment`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from redraft.data.shapes import RESERVED, Turns, with_turns
from redraft.data.turns import ASSISTANT, USER, Message
from redraft.errors import UserError
from redraft.files import atomic_write_text
from redraft.inputs import read_json, there, within
from redraft.settings.texts import kept_as_it_is

SENTINEL = "redraftturn"
CLOCK = "strftime_now"
# Words that people write for true and false. As texts all of them are true, unless the template compares them.
SWITCHES = ("true", "false", "yes", "no", "on", "off", "0", "1")
# Directives of strftime, first those of a C library with a mark; and those among all that tell the hour.
DIRECTIVES = [f"-{letter}" for letter in "dmHIMSjye"] + list("aAwdbBmyYHIMSpfzZjUWcxXGuVeDFTR")
# A template is somebody's program: what it may take for one conversation, and the text that it may make of it, which a
# tokenizer then goes through several times over.
MOST_SECONDS, MOST_TEXT = 10.0, 1 << 24
HOURS = re.compile(r"%-?[HIMSpfcXTR]")


@dataclass
class TemplateSettings:
    """What a template is handed beside the messages: arguments by name, and the date and time it may write, which is
    ``fixed`` when it is kept with a run."""

    arguments: dict[str, Any] = field(default_factory=dict)
    moment: datetime = field(default_factory=lambda: datetime.now().replace(microsecond=0))
    fixed: bool = False


# -- settings --------------------------------------------------------------------------------------------------------
def use_template(
    tokenizer: Any, arguments: Mapping[str, Any] | None = None, moment: datetime | None = None
) -> TemplateSettings:
    """Give the tokenizer's template these arguments from now on, and this moment as its date for good.

    Raises ``UserError`` for an argument that the template does not know, or that is none of a template's, and for a
    word such as "off" that the template would take for true.
    """
    given = dict(arguments or {})
    text = template_text(tokenizer)
    for name, value in given.items():
        if not kept_as_it_is(value):
            raise UserError(f"template argument {name} is {value!r}, which JSON cannot hold; give a number or a text")
        if name in RESERVED:
            raise UserError(f"{name} is no argument of a chat template; give only what the template itself asks for")
        if not any(_reads(tag, name) for tag in _tags(text)):
            raise UserError(f"the target's chat template knows no argument {name!r}; see its source for those it has")
        if isinstance(value, str) and value.strip().lower() in SWITCHES and not _compares(text, name, value):
            raise UserError(
                f"template argument {name} is the text {value!r}, which a template takes for true whatever it says; "
                "write true or false, without quotes"
            )
    known = settings_of(tokenizer)
    known.arguments = given
    if moment is not None:
        known.moment, known.fixed = moment, True
    return known


def _tags(template: str) -> list[str]:
    """What a template computes, without the text that it writes and its comments."""
    return re.findall(r"\{[%{].*?[%}]\}", template, re.S)


def _reads(tag: str, name: str) -> bool:
    """Whether a tag names an argument: not within a text, and not as a part of a turn (``message.thinking``)."""
    code = re.sub(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", "''", tag, flags=re.S)
    return re.search(rf"(?<![\w.]){re.escape(name)}\b", code) is not None


def _compares(template: str, name: str, value: str) -> bool:
    """Whether a template holds an argument, or what it sets from it, against this text."""
    tags = [tag for tag in _tags(template) if _reads(tag, name)]
    places = [template] if any(re.search(r"\bset\b", tag) for tag in tags) else tags
    return any(text in place for text in (f"'{value}'", f'"{value}"') for place in places)


def settings_of(tokenizer: Any) -> TemplateSettings:
    """What this tokenizer's template is handed. The first call fixes the date for this process."""
    known: TemplateSettings = vars(tokenizer).setdefault("redraft_template", TemplateSettings())
    return known


def template_record(tokenizer: Any) -> dict[str, Any]:
    """Arguments and date (none where the template writes none) for the record of a run."""
    if tokenizer is None:
        return {}
    known = settings_of(tokenizer)
    date = known.moment.isoformat(timespec="seconds") if writes_date(tokenizer) else None
    return {"template": {"arguments": known.arguments, "date": date}}


# -- the date --------------------------------------------------------------------------------------------------------
def template_text(tokenizer: Any) -> str:
    """The source of the template, or of all where there are several."""
    template = getattr(tokenizer, "chat_template", None)
    return "\n".join(template.values()) if isinstance(template, dict) else str(template or "")


def writes_date(tokenizer: Any) -> bool:
    """Whether the template may write the date of the day it is asked on."""
    return CLOCK in template_text(tokenizer)


def date_path(path: str | Path) -> Path:
    """Where a run's date lies: ``<name>.date.json`` beside its file ``<name>.jsonl``, ``date.json`` in its folder."""
    path = Path(path)
    return path / "date.json" if path.is_dir() else path.with_name(f"{path.name.removesuffix('.jsonl')}.date.json")


def kept_moment(path: str | Path, began: datetime, fresh: bool = False) -> datetime:
    """The date and time of the run that writes to ``path``: as it was kept there, or ``began``, kept from now on, as a
    ``fresh`` run does whatever an earlier one left. Raises ``UserError`` for a file that holds no date."""
    place = date_path(path)
    if fresh or not there(place):
        atomic_write_text(place, json.dumps({"date": began.isoformat()}) + "\n")
        return began
    try:
        return datetime.fromisoformat(read_json(place)["date"])
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{place} holds no date ({error}); delete it together with the rows that it belongs to"
        ) from error


@contextmanager
def at_moment(tokenizer: Any, moment: datetime | None) -> Iterator[None]:
    """The template is shown this moment as its date within the block; None leaves it as it is."""
    known = settings_of(tokenizer)
    before = known.moment
    known.moment = moment or before
    try:
        yield
    finally:
        known.moment = before


def date_matters(tokenizer: Any, id: str, messages: Sequence[Message]) -> bool:
    """Whether the date of the day is in the text of these messages. Raises ``UserError``."""
    if not writes_date(tokenizer):
        return False
    texts = set()
    for day in (datetime(2001, 1, 1), datetime(2022, 12, 31, 23, 58, 59)):
        with at_moment(tokenizer, day):
            texts.add(render(tokenizer, id, messages, True))
    return len(texts) > 1


def _with_date(template: str, moment: datetime) -> str:
    """The template with the moment in place of the clock."""
    # A format that is not there to be read may hold any directive.
    literal = len(re.findall(rf"{CLOCK}\(\s*['\"]", template)) == template.count(f"{CLOCK}(")
    if literal and not HOURS.search(template):
        # One text a day: a template is compiled once for each.
        moment = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    used = [d for d in DIRECTIVES if not literal or f"%{d}" in template]
    written = {d: moment.strftime(f"%{d}").replace("%", "") for d in used}
    steps = "".join(f"|replace({'%' + d!r}, {text!r})" for d, text in written.items())
    return f"{{% macro {CLOCK}(format) -%}}{{{{ format{steps} }}}}{{%- endmacro %}}\n{template}"


# -- through the template --------------------------------------------------------------------------------------------
def template_ids(tokenizer: Any, id: str, messages: Sequence[Message]) -> list[int]:
    """Token ids of ``messages`` through the tokenizer's chat template, ready for the reply.

    Raises ``UserError`` when there is no template, when it refuses the messages of conversation ``id``, and when it
    leaves out a turn, the tools or a call.
    """
    ids = list(_apply(tokenizer, id, messages, add_generation_prompt=True, tokenize=True, return_dict=False))
    _refuse_dropped(tokenizer, id, messages)
    return ids


def render(tokenizer: Any, id: str, messages: Sequence[Message], opening: bool) -> str:
    """The text of ``messages`` through the template, with the ``opening`` of the assistant's turn behind.
    Raises ``UserError``."""
    return str(_apply(tokenizer, id, messages, add_generation_prompt=opening, tokenize=False))


def _apply(tokenizer: Any, id: str, messages: Sequence[Message], **how: Any) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("the target's tokenizer has no chat template; add one to its tokenizer_config.json")
    beside, known = with_turns(messages, ()), settings_of(tokenizer)
    arguments = known.arguments | beside.arguments | ({"tools": beside.tools} if beside.tools else {})
    try:
        if writes_date(tokenizer):
            template = tokenizer.get_chat_template(None, beside.tools or None)
            arguments["chat_template"] = _with_date(template, known.moment)
        turns = [_for_template(message) for message in messages]
        with within(MOST_SECONDS, f"the chat template on conversation {id}"):
            text = tokenizer.apply_chat_template(turns, **{**how, "tokenize": False}, **arguments)
        if len(text) > MOST_TEXT:
            raise UserError(
                f"conversation {id} comes to {len(text):,} characters through the chat template, and at most "
                f"{MOST_TEXT:,} are taken; shorten it, or mend the template"
            )
        return tokenizer.apply_chat_template(turns, **how, **arguments) if how["tokenize"] else text
    except UserError:
        raise
    except Exception as error:  # templates raise what they like, among it their own errors of the template engine
        raise UserError(f"the chat template refuses conversation {id}: {' '.join(str(error).split())}") from error


def _for_template(message: Message) -> Message:
    """A turn under the names that templates read: gpt-oss's calls thoughts ``thinking``."""
    plain = {key: value for key, value in message.items() if key != "weight"}
    thoughts = plain.get("reasoning_content")
    return plain | {"thinking": thoughts, "reasoning": thoughts} if thoughts else plain


def _refuse_dropped(tokenizer: Any, id: str, messages: Sequence[Message]) -> None:
    """Raise ``UserError`` where the template leaves out the tools, a turn that is no plain question, or a call."""
    marked = with_turns(messages, messages)
    wanted: dict[str, str] = {}
    for number, message in enumerate(messages):
        mark = f"{SENTINEL}{number}x"
        if message["role"] not in (USER, ASSISTANT):
            marked[number] = message | {"content": mark}
            wanted[mark] = f"its {message['role']} turn"
        elif message.get("tool_calls"):
            calls = [call | {"function": call["function"] | {"name": mark}} for call in message["tool_calls"]]
            marked[number] = message | {"tool_calls": calls}
            wanted[mark] = "the tool call in its history"
    if not wanted and not marked.tools:
        return
    text = render(tokenizer, id, marked, True)
    lost = next((what for mark, what in wanted.items() if mark not in text), None)
    if lost is None and marked.tools and text == render(tokenizer, id, Turns(marked, (), marked.arguments), True):
        lost = "its tools"
    if lost is not None:
        raise UserError(
            f"the chat template leaves out {lost} (conversation {id}), so the model would never see it; leave it out "
            "of the data, or use a template that writes it"
        )
