"""A standalone draft as a plain Hugging Face causal LM, which every engine with a draft-model method loads.

transformers takes it as ``assistant_model``, vLLM as its method ``draft_model``, llama.cpp's server
takes the format ``gguf``. The engines compare vocabularies by size, so a padded table is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from redraft.artifact import atomic_folder, check_tensors, tensors_bytes, tensors_hash
from redraft.drafts.base import Draft, family_of
from redraft.drafts.standalone import StandaloneDraft, merge_experts
from redraft.drafts.standalone.files import FOLDER_FILES, plain_state, write_model
from redraft.errors import UserError
from redraft.export.base import (
    ExportReport,
    TargetInfo,
    check_formats,
    check_tokens,
    checks,
    holds_standalone,
    path_warnings,
    serve_command,
)
from redraft.loading import check_tokenizers, load_target
from redraft.registries import EXPORTERS


@EXPORTERS.register("hf")
@holds_standalone("hf")
def export_hf(
    draft: Draft | StandaloneDraft, folder: str | Path, target: Any, *, speculative_tokens: int = 5
) -> ExportReport:
    """Write a standalone draft complete with its tokenizer, private experts merged; read back before it is in place.

    ``target`` with a tokenizer (a ``Target``) has it compared with the draft's. Raises ``UserError`` for a draft of
    another family, without a tokenizer, with another one than the target's, of another vocabulary or shorter context,
    and for tensors that are not sound.
    """
    folder, info = Path(folder), TargetInfo.of(target)
    dense, notes = check_hf(draft, info, speculative_tokens)
    state = plain_state(dense.model)
    with atomic_folder(folder, tensors_bytes(state) + (16 << 20), FOLDER_FILES) as new:
        write_model(new, dense)
        back = load_target(str(new), dense.dtype)
        if tensors_hash(plain_state(back.model)) != tensors_hash(state):
            raise RuntimeError("the hf export does not read back as the draft that was written")
        check_tokenizers(back.tokenizer, dense.tokenizer)
    return ExportReport(
        "hf",
        folder,
        len(state),
        sum(tensor.numel() for tensor in state.values()),
        tensors_bytes(state),
        merged_private=bool(draft.config.private_width),
        serve=serve_command(folder, info, speculative_tokens, "draft_model"),
        warnings=(*notes, *path_warnings(folder.absolute())),
    )


@checks("hf")
def check_hf(draft: Any, info: TargetInfo, tokens: int) -> tuple[StandaloneDraft, list[str]]:
    """The dense language model, and notes. Raises ``UserError`` where engines would refuse the pair."""
    return dense_language_model("hf", draft, info, tokens)


def dense_language_model(name: str, draft: Any, info: TargetInfo, tokens: int) -> tuple[StandaloneDraft, list[str]]:
    """What the formats of language models ask for: a dense draft that fits the target, sound in every tensor."""
    check_tokens(tokens)
    check_formats([name], family_of(draft))
    assert isinstance(draft, StandaloneDraft)
    dense = merge_experts(draft)
    check_language_model(dense, info)
    state = plain_state(dense.model)
    check_tensors(state, state, "the draft to be exported")
    width = draft.config.private_width
    return dense, [f"private experts of width {width} were merged into the MLPs"] if width else []


def check_language_model(draft: StandaloneDraft, target: TargetInfo) -> None:
    """Raise ``UserError`` where engines would refuse the pair, or take it for one that it is not."""
    config = draft.model.config
    if draft.tokenizer is None:
        raise UserError("the draft has no tokenizer, and engines ask for one; give it the target's")
    check_tokenizers(draft.tokenizer, target.tokenizer)
    if draft.config.draft_vocab_size != target.vocab_size:
        raise UserError(
            f"the draft's table has {draft.config.draft_vocab_size} rows and the target's {target.vocab_size}; engines "
            "take such a pair for different vocabularies"
        )
    if config.max_position_embeddings < target.context:
        raise UserError(
            f"the draft covers {config.max_position_embeddings} positions and the target {target.context}; engines cut "
            "the target's context to the draft's: train the draft with the target's length"
        )
    if draft.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"the draft is {draft.dtype}, which engines do not load; use float32, float16 or bfloat16")
