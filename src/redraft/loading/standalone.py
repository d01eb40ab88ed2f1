"""Opening standalone drafts: causal language models that propose tokens by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from redraft.artifact import META_FILE, read_json
from redraft.errors import UserError
from redraft.loading.parts import read_config
from redraft.loading.places import locate, split_adapter
from redraft.loading.quiet import quiet
from redraft.loading.targets import load_target
from redraft.loading.tokenizers import check_tokenizers
from redraft.target import Target


def read_standalone(source: str | Path, base: str | Path | None = None) -> tuple[Any, dict[str, Any]]:
    """A standalone draft in the data type of its file, and its metadata: a folder of ours or any causal LM.

    A folder with private experts needs ``base``, the draft that they were trained on. Raises ``UserError`` when it
    cannot be loaded.
    """
    from redraft.drafts.experts import is_private
    from redraft.drafts.standalone import StandaloneDraft
    from redraft.drafts.standalone.files import load_experts, load_standalone

    place = Path(source)
    known = (place / META_FILE).is_file()
    if known and read_json(place / META_FILE).get("kind") == "private":
        if base is None:
            raise UserError(f"{source} is a private part; name the draft it belongs to with --base-draft")
        shared, _ = read_standalone(base)
        kept = shared.dtype
        # The experts were trained beside, and are tied by hash to, the float32 values of the base.
        draft, meta = load_experts(place, shared.float())
        for name, parameter in draft.named_parameters():
            kept = torch.promote_types(kept, parameter.dtype) if is_private(name) else kept
        return draft.to(kept), meta
    if known:
        draft, meta = load_standalone(place)
        _check_passes(Target(draft.model, taps=()), source)
        draft.model.requires_grad_(True)
        return draft, meta
    found = load_target(str(source), _file_dtype(str(source)))
    found.tap(())  # its hooks would stay on the model and keep states that nobody reads
    _check_passes(found, source)
    about = {"family": "standalone", "method": None, "source": str(source), "format": "huggingface"}
    meta = about | {"notes": list(found.notes)}
    return StandaloneDraft(found.model.requires_grad_(True), found.tokenizer), meta


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
    base, _ = split_adapter(spec)
    with quiet():
        config = read_config(locate(base), base)
    named = config.dtype or config.get_text_config().dtype
    return named if isinstance(named, torch.dtype) else torch.float32


def open_standalone(source: str | Path, target: Target, base: str | Path | None = None) -> tuple[Any, dict[str, Any]]:
    """A standalone draft in float32, bound to ``target``, and its metadata (:func:`read_standalone`).

    Raises ``UserError`` when it cannot be loaded or has another tokenizer or vocabulary than the target.
    """
    from redraft.drafts.standalone import check_fit

    draft, meta = read_standalone(source, base)
    check_fit(draft.config, target)
    check_tokenizers(draft.tokenizer, target.tokenizer)
    return draft.float().bind(target).to(target.device), meta
