"""A standalone draft on disk: an ordinary Hugging Face folder, which whatever loads a causal LM loads as it is.

Read is any causal language model whose proposals here would be its own. Written it is taken by every engine with a
draft-model method: by transformers as ``assistant_model``, by vLLM as its method ``draft_model``; llama.cpp's server
takes the format ``gguf``. The engines compare vocabularies by size, so a padded table is refused.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from redraft.artifact import check_tensors, tensors_bytes, tensors_hash, write_tensors
from redraft.drafts.formats.base import (
    CARD_FILE,
    MARK,
    ExportReport,
    Format,
    only_over,
    path_warnings,
    serve_command,
)
from redraft.drafts.formats.reading import Checkpoint
from redraft.drafts.standalone.module import StandaloneDraft
from redraft.errors import UserError
from redraft.files import atomic_folder
from redraft.loading import CACHE_FILES, check_tokenizers, load_target, load_tokenizer, locate, quiet
from redraft.loading.places import same_place, split_adapter
from redraft.loading.targets import read_config
from redraft.registries import EXPORTERS
from redraft.target import Facts, Target
from redraft.target.facts import SERVED, tensors_fingerprint
from redraft.values import LONGEST, Values

WEIGHTS_FILE = "model.safetensors"
# Sizes in a config.json.
WHOLE = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("num_hidden_layers", "max_position_embeddings"),
)
GENERATION_FILE = "generation_config.json"
# What else such a folder may hold.
OTHER_FILES = (*CACHE_FILES, "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt")
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
        draft.model.generation_config = GenerationConfig.from_pretrained(folder, trust_remote_code=False)
    draft.tokenizer = load_tokenizer(str(folder)) if (folder / "tokenizer_config.json").is_file() else None


# -- reading -----------------------------------------------------------------------------------------------------------
def recognises(checkpoint: Checkpoint) -> bool:
    """Whether this is a causal LM, an adapter of one or an embedded one; other families were asked before."""
    if not checkpoint.config:
        return True
    return any(name.endswith("ForCausalLM") for name in checkpoint.architectures)


def read(checkpoint: Checkpoint, target: Any, notes: list[str]) -> tuple[StandaloneDraft, dict[str, Any]]:
    """The model in the data type of its file. Raises ``UserError``."""
    source = checkpoint.source
    _check_values(Values(checkpoint.config, checkpoint.path))
    base, adapter = split_adapter(source)
    with quiet():
        config = read_config(locate(base), base)
    if adapter is not None:
        notes.append(f"the draft is an adapter, read as a language model of its own: {base} with the adapter merged in")
        _check_adapter(source, base, config, target)
    named = config.dtype or config.get_text_config().dtype
    found = load_target(source, named if isinstance(named, torch.dtype) else torch.float32)
    found.tap(())  # its hooks would stay on the model and keep states that nobody reads
    _check_passes(found, source)
    notes += found.notes
    return StandaloneDraft(found.model.requires_grad_(True), found.tokenizer), {"format": "huggingface"}


def _check_adapter(source: str, base: str, config: Any, target: Any) -> None:
    """Raise ``UserError`` for an adapter of the target, or of a model that is as large: no draft comes of it."""
    if target is None:
        return
    own = same_place(base, split_adapter(target.name.partition(" + ")[0])[0])
    if own or _shape(config.get_text_config(decoder=True)) == _shape(target.config):
        whose = "of the target itself" if own else f"of {base}, a model of the target's own size"
        raise UserError(
            f"{source} is an adapter {whose}, which is no draft: it would be as slow as the target; give the draft "
            "here, and an adapter that belongs to the target with --adapter"
        )


def _shape(config: Any) -> tuple[int, ...]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return tuple(int(getattr(config, name, 0) or 0) for name in names)


def remarks(draft: StandaloneDraft, source: str, target: Any) -> list[str]:
    """A note where the draft is the target itself: by its weights, or by its place where those are not at hand."""
    if _shape(draft.model.config) != _shape(target.config):
        return []
    known = target.content_hash()
    if known.startswith(SERVED):
        same = same_place(source, target.name)
    else:
        same = known == tensors_fingerprint(draft.model.state_dict())
    note = "the draft is the target itself: all that it proposes is accepted, and nothing is ever faster for it"
    return [note] if same else []


def _check_values(values: Values) -> None:
    """Raise ``UserError`` for values of a config that no model has, by their names: a loader would stop at what
    follows from them, or not at all. What differs from layer to layer is a list, and left to it."""
    for key in WHOLE:
        if not isinstance(values.get(key), list):
            values.whole(key, most=LONGEST)
    values.number("rms_norm_eps", most=1.0)
    for key in ("rope_parameters", "rope_scaling"):
        place = values.part(key)
        if place is not None:
            for name in ("rope_theta", "factor"):
                place.number(name)
            kind = place.text("rope_type") or place.text("type") or "default"
            if kind not in {"default", "su", "mrope", "proportional", *ROPE_INIT_FUNCTIONS}:
                raise place.refuse("rope_type", f"one of {', '.join(sorted(ROPE_INIT_FUNCTIONS))}")


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


# -- writing -----------------------------------------------------------------------------------------------------------
EXPORTERS.register("hf")(Format("hf"))


class ModelWriter:
    """The format ``hf``: the model complete with its tokenizer."""

    def check(self, draft: StandaloneDraft, target: Facts) -> tuple[StandaloneDraft, list[str]]:
        """The dense language model. Raises ``UserError`` where engines would refuse the pair."""
        return dense_model(draft, target), []

    def write(self, dense: StandaloneDraft, folder: Path, target: Facts, tokens: int) -> ExportReport:
        """Read back before it is in place."""
        state = dense.stored()
        size, names = tensors_bytes(state), {CARD_FILE, *OTHER_FILES}
        config = dense.model.config.to_dict() | {"architectures": [type(dense.model).__name__]}
        with atomic_folder(folder, size + OTHER_BYTES, names, only_over("hf", config)) as new:
            write_beside(new, dense)
            write_tensors(new / WEIGHTS_FILE, state, {MARK: "hf"})
            back = load_target(str(new), dense.dtype)
            if tensors_hash(StandaloneDraft(back.model).stored()) != tensors_hash(state):
                raise RuntimeError("the hf export does not read back as the draft that was written")
            check_tokenizers(back.tokenizer, dense.tokenizer)
        parameters, serve = sum(t.numel() for t in state.values()), serve_command(folder, target, tokens, "draft_model")
        warnings = tuple(path_warnings(folder.absolute()))
        return ExportReport("hf", folder, len(state), parameters, size, serve, warnings)


def dense_model(draft: StandaloneDraft, target: Facts) -> StandaloneDraft:
    """The draft without private parts, sound in every tensor.

    Raises ``UserError`` where engines would refuse the pair, or take it for one that it is not.
    """
    dense = draft.merged()
    config, state = dense.model.config, dense.stored()
    if dense.tokenizer is None:
        raise UserError("the draft has no tokenizer, and engines ask for one; give it the target's")
    check_tokenizers(dense.tokenizer, target.tokenizer)
    if dense.config.draft_vocab_size != target.vocab_size:
        raise UserError(
            f"the draft's table has {dense.config.draft_vocab_size} rows and the target's {target.vocab_size}; engines "
            "take such a pair for different vocabularies"
        )
    context = int(target.config.max_position_embeddings)
    if config.max_position_embeddings < context:
        raise UserError(
            f"the draft covers {config.max_position_embeddings} positions and the target {context}; engines cut "
            "the target's context to the draft's: train the draft with the target's length"
        )
    if dense.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"the draft is {dense.dtype}, which engines do not load; use float32, float16 or bfloat16")
    check_tensors(state, state, "the draft to be exported")
    return dense
