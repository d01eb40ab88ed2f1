"""Keys of a data row that would change the prompt and that redraft does not read: each is refused by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from redraft.data.turns import THOUGHTS, excerpt

MEDIA = ("image", "images", "image_url", "image_urls", "video", "videos", "audio", "audios")
BEGINNING = "an answer that goes on from a given beginning is no answer of its own; leave it out"
PAIR = "a pair of answers says not which one counts; keep the prompt, and one answer as completion"
# By what to do about them.
REFUSED = {
    **dict.fromkeys(MEDIA, "only text can be trained on; leave such rows out"),
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


def refuse_keys(item: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for the first such key of a row."""
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


def refuse_parts(item: Mapping[str, Any], key: str, texts: Sequence[str]) -> None:
    """Raise ``ValueError`` for a text or choices beside ``key`` that belong to what its ``texts`` ask and lack."""
    whole = key in ONE_TEXT and isinstance(item.get(key), str)
    parts = PARTS if whole else PARTS_OF_AN_INSTRUCTION if key == "instruction" else PARTS_OF_TURNS
    for name in parts:
        value = item.get(name)
        if _says_something(value) and not (isinstance(value, str) and _within(value, texts)):
            raise ValueError(f'the key "{name}" beside "{key}" is not read; write what is asked into one text')


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


def refuse_second_text(item: Mapping[str, Any], other: str, key: str, texts: Sequence[str]) -> None:
    """Raise ``ValueError`` where ``other`` asks something that the ``texts`` of ``key`` do not hold.

    Data sets often repeat a question, and logs a whole prompt with its marks, so either may be within the other.
    """
    said = item.get(other)
    if not isinstance(said, str) or not said.strip() or not texts:
        return
    if not _within(said, texts) and not all(_within(text, [said]) for text in texts):
        raise ValueError(f'both "{other}" and "{key}" ask something; write what is asked into one of them')
