"""A standalone draft on disk: an ordinary Hugging Face folder, which whatever loads a causal LM loads as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from redraft.drafts.standalone.module import StandaloneDraft
from redraft.errors import UserError

WEIGHTS_FILE = "model.safetensors"
GENERATION_FILE = "generation_config.json"
# What else such a folder may hold.
OTHER_FILES = (
    "config.json",
    GENERATION_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
# How much room these may take.
OTHER_BYTES = 16 << 20


def write_beside(folder: Path, draft: StandaloneDraft) -> None:
    """Config, special tokens and tokenizer as Hugging Face lays them out."""
    model = draft.model
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], str(draft.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if draft.tokenizer is not None:
        draft.tokenizer.save_pretrained(folder)


def read_beside(folder: Path, draft: StandaloneDraft) -> None:
    """Give the draft the special tokens and the tokenizer of its folder. Raises ``UserError``."""
    if (folder / GENERATION_FILE).is_file():
        draft.model.generation_config = GenerationConfig.from_pretrained(folder)
    draft.tokenizer = _tokenizer(folder)


def _tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{folder} has a tokenizer that cannot be loaded: {str(error).splitlines()[0]}") from error
