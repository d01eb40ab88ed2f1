"""A standalone draft on disk: an ordinary Hugging Face folder, and ``redraft.json`` beside it.

Whatever loads a causal LM loads the folder as it is. A private part (experts beside the MLPs) is a file of its own
(:func:`redraft.artifact.save_private`), tied to its base draft by hash.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from redraft.artifact import (
    META_FILE,
    SCHEMA,
    atomic_folder,
    atomic_write_json,
    check_tensors,
    load_private,
    read_meta,
    read_tensors,
    save_private,
    tensors_bytes,
    tensors_hash,
    write_tensors,
)
from redraft.drafts.experts import is_private
from redraft.drafts.standalone import StandaloneConfig, StandaloneDraft, merge_experts, untrained
from redraft.errors import UserError

WEIGHTS_FILE = "model.safetensors"
# What a folder of ours may hold; anything else is somebody's work and not replaced.
FOLDER_FILES = (
    META_FILE,
    WEIGHTS_FILE,
    "config.json",
    "generation_config.json",
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def plain_state(model: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint of ``model``: a head that is the embedding table is left out, as loaders expect."""
    state = dict(model.state_dict())
    shared = model.get_output_embeddings().weight
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is shared]
    for name in names[1:]:
        del state[name]
    return state


def write_model(folder: Path, draft: StandaloneDraft) -> dict[str, Tensor]:
    """Config, weights, special tokens and tokenizer as Hugging Face lays them out, into an empty folder.

    Returns the tensors that were written.
    """
    model, state = draft.model, plain_state(draft.model)
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], str(draft.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    write_tensors(folder / WEIGHTS_FILE, state)
    if draft.tokenizer is not None:
        draft.tokenizer.save_pretrained(folder)
    return state


def save_standalone(folder: str | Path, draft: StandaloneDraft, meta: Mapping[str, Any]) -> None:
    """Write a whole draft. ``meta`` holds what the caller knows: method, target, tokenizer_hash, provenance.

    Private experts are merged. Raises ``UserError`` on NaN, a full disk, or a folder that holds other files.
    """
    draft = merge_experts(draft)
    state = plain_state(draft.model)
    check_tensors(state, state, "the draft to be saved")
    fixed = {"schema": SCHEMA, "kind": "draft", "family": draft.family, "config": draft.config.to_dict()}
    fixed["content_hash"] = tensors_hash(state)
    known = {"method": None, "target": {"name": None, "hash": None}, "tokenizer_hash": None, "provenance": {}}
    stale = {"base_draft_hash", "tensors", "by_rows", *fixed}
    known |= {key: value for key, value in meta.items() if key not in stale}
    with atomic_folder(folder, tensors_bytes(state) + (16 << 20), FOLDER_FILES) as new:
        write_model(new, draft)
        atomic_write_json(new / META_FILE, fixed | known)


def load_standalone(folder: str | Path) -> tuple[StandaloneDraft, dict[str, Any]]:
    """The draft in a folder that :func:`save_standalone` wrote, in the dtypes of its file, and its metadata.

    Strict: raises ``UserError`` for every missing, extra, misshaped or non-finite tensor, and a changed file.
    """
    folder = Path(folder)
    meta = read_meta(folder, "draft")
    if meta["family"] != StandaloneDraft.family:
        raise UserError(f"{folder} holds a draft of family {meta['family']}, where a standalone one is needed")
    config = StandaloneConfig.from_dict(meta["config"])
    path = folder / WEIGHTS_FILE
    state = read_tensors(path)
    model = untrained(config.huggingface())
    check_tensors(state, plain_state(model), path)
    if tensors_hash(state) != meta["content_hash"]:
        raise UserError(f"{path} is not the file that {META_FILE} describes (content hash differs); copy both again")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return StandaloneDraft(model, _tokenizer(folder)), meta


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{folder} has a tokenizer that cannot be loaded: {str(error).splitlines()[0]}") from error


def save_experts(folder: str | Path, draft: StandaloneDraft, base_hash: str, meta: Mapping[str, Any]) -> None:
    """Write only the private experts; ``base_hash`` is :func:`redraft.artifact.tensors_hash` of the base draft's state.

    Raises ``UserError`` when there are none, and as :func:`redraft.artifact.save_private`.
    """
    names = [name for name in draft.state_dict() if is_private(name)]
    if not names:
        raise UserError("the draft has no private experts to save; attach them first, or save the whole draft")
    save_private(folder, draft, names, base_hash, meta)


def load_experts(folder: str | Path, base: StandaloneDraft) -> tuple[StandaloneDraft, dict[str, Any]]:
    """``base`` with the private experts of a folder beside its MLPs. Raises ``UserError`` for another base."""
    draft, meta = load_private(folder, base, tensors_hash(base.state_dict()))
    if not isinstance(draft, StandaloneDraft):
        raise UserError(f"{folder} holds a private part of family {meta['family']}, where a standalone one is needed")
    draft.tokenizer = base.tokenizer
    draft.model.generation_config = copy.deepcopy(base.model.generation_config)
    return draft, meta
