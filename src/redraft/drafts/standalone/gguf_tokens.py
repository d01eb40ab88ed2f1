"""The tokenizer of a GGUF file: copied from the target's own file, or written from ``tokenizer.json``.

Engines compare the vocabularies of draft and target token by token, so every id must say the same in both. Written are
byte-level vocabularies alone, where llama.cpp needs nothing but tokens, merges and the name of how text is split
beforehand; that name is refused where it is not known, since a wrong one splits text differently and says nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redraft.errors import UserError

PREFIX = "tokenizer."
# Numbers of the format: types of values, and of tokens.
UINT32, INT32, BOOL, STRING, ARRAY = 4, 5, 7, 8, 9
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# How a well-known family of tokenizers splits text; they differ in how many digits make a piece.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SPLITS = {r"\p{N}{1,3}".join(WORDS): "llama-bpe", r"\p{N}".join(WORDS): "qwen2"}


@dataclass(frozen=True)
class TokenFields:
    """Metadata by key as (value, type, type of an array's items or 0), and where it comes from, in words."""

    values: dict[str, tuple[Any, int, int]]
    origin: str


def token_fields(tokenizer: Any, rows: int, source: Path | None) -> TokenFields:
    """The tokenizer for a table of ``rows`` rows; ``source`` is the target's GGUF file.

    Raises ``UserError`` when the file's tokens are not the tokenizer's, or the tokenizer cannot be expressed.
    """
    need_gguf()
    if source is None:
        return _written(tokenizer, rows)
    fields = _copied(source)
    listed = fields.values.get("tokenizer.ggml.tokens", ([], 0, 0))[0]
    mine = _tokens(tokenizer, rows)
    wrong = next((i for i, (a, b) in enumerate(zip(listed, mine, strict=False)) if b is not None and a != b), None)
    if len(listed) != rows or wrong is not None:
        what = f"token {wrong} is {listed[wrong]!r}" if wrong is not None else f"it has {len(listed)} tokens"
        raise UserError(
            f"{source} has another vocabulary than the draft: {what}, the draft's table has {rows} rows"
            + (f" and says {mine[wrong]!r}" if wrong is not None else "")
        )
    return fields


def need_gguf() -> None:
    """Raise ``UserError`` when the package gguf is not installed."""
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise UserError("GGUF files need the package gguf: pip install redraft[quickstart]")


def _tokens(tokenizer: Any, rows: int) -> list[str | None]:
    """The text of every row, as the vocabulary spells it; none for rows without a token."""
    found: list[str | None] = [None] * rows
    for token, number in tokenizer.get_vocab().items():
        if number >= rows:
            raise UserError(f"the tokenizer has a token {number} ({token!r}), the draft's table only {rows} rows")
        found[number] = token
    return found


def _copied(source: Path) -> TokenFields:
    import gguf

    try:
        fields = gguf.GGUFReader(source).fields
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise UserError(f"{source} is no GGUF file that can be read ({error}); remove it or copy it again") from error
    values = {}
    for name, field in fields.items():
        if name.startswith(PREFIX):
            part = int(field.types[-1]) if len(field.types) > 1 else 0
            values[name] = (field.contents(), int(field.types[0]), part)
    return TokenFields(values, f"copied from {source.name}")


# -- written from tokenizer.json -------------------------------------------------------------------------------------
def _written(tokenizer: Any, rows: int) -> TokenFields:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(_unknown("it has no tokenizer.json"))
    spec = json.loads(backend.to_str())
    name, model = split_name(spec), spec["model"]
    added = {token["id"]: bool(token["special"]) for token in spec["added_tokens"]}
    tokens = _tokens(tokenizer, rows)
    kinds = [
        UNUSED if token is None else CONTROL if added.get(i) else USER_DEFINED if i in added else NORMAL
        for i, token in enumerate(tokens)
    ]
    texts = [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    values: dict[str, tuple[Any, int, int]] = {
        "tokenizer.ggml.model": ("gpt2", STRING, 0),
        "tokenizer.ggml.pre": (name, STRING, 0),
        "tokenizer.ggml.tokens": (texts, ARRAY, STRING),
        "tokenizer.ggml.token_type": (kinds, ARRAY, INT32),
        "tokenizer.ggml.merges": (merges, ARRAY, STRING),
        "tokenizer.ggml.add_space_prefix": (False, BOOL, 0),
        "tokenizer.ggml.add_bos_token": (_begins_texts(tokenizer), BOOL, 0),
    }
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    values |= {f"tokenizer.ggml.{k}_token_id": (int(v), UINT32, 0) for k, v in ids.items() if v is not None}
    if isinstance(tokenizer.chat_template, str):
        values["tokenizer.chat_template"] = (tokenizer.chat_template, STRING, 0)
    return TokenFields(values, f"written from tokenizer.json, text split as {name}")


def _begins_texts(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its first token before every text."""
    begin = tokenizer.bos_token_id
    return begin is not None and tokenizer("a")["input_ids"][:1] == [begin]


def split_name(spec: dict[str, Any]) -> str:
    """llama.cpp's name of how a ``tokenizer.json`` splits text before merging. Raises ``UserError`` for others."""
    if spec["model"].get("type") != "BPE" or spec.get("normalizer") not in (None, {"type": "NFC"}):
        raise UserError(_unknown("it is no byte-level BPE"))
    steps = _steps(spec.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise UserError(_unknown("it is no byte-level BPE"))
    by_words = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_words:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and by_words and steps[0].get("individual_digits"):
        return "smollm"
    pattern = str(steps[0].get("pattern", {}).get("Regex", "")) if kinds == ["Split", "ByteLevel"] else ""
    if pattern in SPLITS and not by_words:
        return SPLITS[pattern]
    raise UserError(_unknown("llama.cpp's name of its splitting is not known here"))


def _steps(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre is None:
        return []
    return list(pre["pretokenizers"]) if pre.get("type") == "Sequence" else [pre]


def _unknown(why: str) -> str:
    return f"the tokenizer cannot be written into a GGUF file ({why}); put the target's own GGUF into its folder"
