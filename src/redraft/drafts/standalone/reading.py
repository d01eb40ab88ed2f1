"""Reading standalone drafts: any causal language model whose proposals here would be its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from redraft.drafts.formats.reading import Checkpoint
from redraft.drafts.standalone.module import StandaloneDraft
from redraft.errors import UserError
from redraft.loading import ADAPTER_FILE, adapter_base, load_target, locate, one_line, quiet
from redraft.target import Target


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether this is a causal LM, an adapter of one or an embedded one; other families were asked before."""
    if not checkpoint.config:
        return True
    return any(name.endswith("ForCausalLM") for name in checkpoint.architectures)


def read(checkpoint: Checkpoint, target: Any, notes: list[str]) -> tuple[StandaloneDraft, dict[str, Any]]:
    """The model in the data type of its file. Raises ``UserError``."""
    source = checkpoint.source
    found = load_target(source, _file_dtype(source))
    found.tap(())  # its hooks would stay on the model and keep states that nobody reads
    _check_passes(found, source)
    notes += found.notes
    return StandaloneDraft(found.model.requires_grad_(True), found.tokenizer), {"format": "huggingface"}


def check_usable(draft: StandaloneDraft, source: str) -> None:
    """Raise ``UserError`` for a draft whose proposals here would not be its own."""
    _check_passes(Target(draft.model, taps=()), source)
    draft.model.requires_grad_(True)  # a target's weights are frozen


def _check_passes(model: Target, source: str | Path) -> None:
    """Raise ``UserError`` for a model whose proposals here would not be its own.

    A draft's logits are its head over its states, and rounds take tokens back from buffers of keys and values.
    """
    try:
        paths = model.paths
    except UserError as error:
        raise UserError(f"{source} cannot be a draft: {error}") from error
    if not paths.cached:
        raise UserError(
            f"{source} cannot be a draft: {type(model.model).__name__} cannot take tokens back ({paths.why}); give a "
            "language model of attention layers, as Llama and Qwen are"
        )


def _file_dtype(spec: str) -> torch.dtype:
    """The data type that a checkpoint's config names: that of its file."""
    base = adapter_base(spec) if (Path(spec) / ADAPTER_FILE).is_file() else spec
    with quiet(), one_line(f"the config of {base}"):
        config = AutoConfig.from_pretrained(**locate(base))
    named = config.dtype or config.get_text_config().dtype
    return named if isinstance(named, torch.dtype) else torch.float32
