"""Tokenizers: reading them, comparing two, and fitting one to a model's vocabulary."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import transformers

from redraft.errors import UserError
from redraft.loading.places import first_line, one_line

# Files with the words of a tokenizer, of any kind.
VOCABULARIES = ("tokenizer.json", "*.model", "*vocab*", "*.tiktoken", "tekken.json", "*.spm", "*.bpe")

MODALITY_MARK = re.compile(r"image|img|vision|video|audio", re.IGNORECASE)


def read_tokenizer(adapter: str | None, place: dict[str, Any], spec: str) -> Any:
    """The adapter's own tokenizer where it ships one, else the base model's. Raises ``UserError``."""
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        place, spec = place | {"pretrained_model_name_or_path": adapter, "local_files_only": True}, adapter
    # The tokenizer is read with the config beside it, and a config of an unknown kind is no fault of a tokenizer.
    where = {key: place[key] for key in ("pretrained_model_name_or_path", "local_files_only")}
    with one_line(f"the tokenizer of {spec}"):
        settings = get_tokenizer_config(**where)
        auto = settings.get("auto_map")
        named = str(settings.get("tokenizer_class") or "")
        if auto and not any(hasattr(transformers, name) for name in (named, named + "Fast") if name):
            raise UserError(
                f"the tokenizer of {spec} asks to run Python code of its own (auto_map, {named or 'no class named'}), "
                "which redraft never does; save it as a tokenizer.json that transformers reads itself"
            )
    folder = Path(where["pretrained_model_name_or_path"])
    if folder.is_dir() and not any(True for name in VOCABULARIES for _ in folder.glob(name)):
        # transformers makes a tokenizer of a few special tokens then, and says nothing
        raise UserError(f"{spec} has no tokenizer that can be loaded: there is no tokenizer.json or other vocabulary")
    try:
        return AutoTokenizer.from_pretrained(**place)
    except Exception as error:  # tokenizer files of strangers raise every kind of error
        raise UserError(f"{spec} has no tokenizer that can be loaded: {first_line(error)}") from error


def tokenizer_hash(tokenizer: Any) -> str:
    """A fingerprint of what token ids mean: every token with its id, and which of them are special (16 hex digits).

    The chat template and the choice of end and padding tokens are left out: fine-tuning changes them, and a draft
    that guesses ids does not mind.
    """
    added = tokenizer.added_tokens_decoder if hasattr(tokenizer, "added_tokens_decoder") else {}
    special = sorted(int(id) for id, token in added.items() if token.special)
    text = json.dumps([sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])), special])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_tokenizers(draft: Any, target: Any) -> None:
    """Raise ``UserError`` that names the first difference between two tokenizers; what one lacks cannot be compared."""
    if draft is None or target is None or draft is target or tokenizer_hash(draft) == tokenizer_hash(target):
        return
    mine, other = draft.get_vocab(), target.get_vocab()
    wrong = sorted((i, token) for token, i in other.items() if mine.get(token) != i)
    if wrong:
        number, token = wrong[0]
        where = f"{token!r} is {number} in the target's and {mine.get(token, 'absent')} in the draft's"
    else:
        where = f"the draft's has {len(mine)} tokens and the target's {len(other)}, or they mark others as special"
    raise UserError(f"the draft has another tokenizer than the target: {where}; give a draft of this model family")


def check_rows(tokenizer: Any, model: Any, name: str) -> list[str]:
    """Raise ``UserError`` for a tokenizer with ids that the model has no row for; rows without a token are padding.

    Marks of images and sound beyond the last row, as the text-only Gemma 3 has one, are noted instead: no text has
    them, and no head of this size says them.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    rows = min(int(part.weight.shape[0]) for part in (head, embedding) if part is not None)
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if not beyond:
        return []
    template = str(tokenizer.chat_template or "")
    if all(MODALITY_MARK.search(token) and token not in template for _, token in beyond):
        return [f"the tokenizer of {name} has {beyond[0][1]} and the model no row for it; prompts must not hold it"]
    last, token = beyond[-1]
    raise UserError(
        f"the tokenizer of {name} has ids up to {last} ({token!r}) and the model {rows} rows in its embedding and "
        f"head; resize the model to at least {last + 1} rows and train them, or take its first tokenizer"
    )
