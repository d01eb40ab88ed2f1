"""A standalone draft on disk: an ordinary Hugging Face folder, which whatever loads a causal LM loads as it is."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import GenerationConfig

from redraft.drafts.standalone.module import StandaloneDraft
from redraft.loading import load_tokenizer

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
    draft.tokenizer = load_tokenizer(str(folder)) if (folder / "tokenizer_config.json").is_file() else None
