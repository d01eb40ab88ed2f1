"""A standalone draft as a plain Hugging Face causal LM, which every engine with a draft-model method loads.

transformers takes it as ``assistant_model``, vLLM as its method ``draft_model``, llama.cpp's server
takes the format ``gguf``. The engines compare vocabularies by size, so a padded table is refused.
"""

from __future__ import annotations

from pathlib import Path

import torch

from redraft.artifact import check_tensors, tensors_bytes, tensors_hash, write_tensors
from redraft.drafts.formats.base import ExportReport, Format, path_warnings, serve_command
from redraft.drafts.standalone.folder import OTHER_BYTES, OTHER_FILES, WEIGHTS_FILE, write_beside
from redraft.drafts.standalone.module import StandaloneDraft
from redraft.errors import UserError
from redraft.files import atomic_folder
from redraft.loading import check_tokenizers, load_target
from redraft.registries import EXPORTERS
from redraft.target import Facts

EXPORTERS.register("hf")(Format("hf"))


class ModelWriter:
    """The format ``hf``: the model complete with its tokenizer."""

    def check(self, draft: StandaloneDraft, target: Facts) -> tuple[StandaloneDraft, list[str]]:
        """The dense language model. Raises ``UserError`` where engines would refuse the pair."""
        return dense_model(draft, target), []

    def write(self, dense: StandaloneDraft, folder: Path, target: Facts, tokens: int) -> ExportReport:
        """Read back before it is in place."""
        state = dense.stored()
        known = {WEIGHTS_FILE, "README.md", *OTHER_FILES}
        with atomic_folder(folder, tensors_bytes(state) + OTHER_BYTES, known) as new:
            write_beside(new, dense)
            write_tensors(new / WEIGHTS_FILE, state)
            back = load_target(str(new), dense.dtype)
            if tensors_hash(StandaloneDraft(back.model).stored()) != tensors_hash(state):
                raise RuntimeError("the hf export does not read back as the draft that was written")
            check_tokenizers(back.tokenizer, dense.tokenizer)
        parameters, size = sum(t.numel() for t in state.values()), tensors_bytes(state)
        serve, warnings = serve_command(folder, target, tokens, "draft_model"), path_warnings(folder.absolute())
        return ExportReport("hf", folder, len(state), parameters, size, serve, tuple(warnings))


def dense_model(draft: StandaloneDraft, target: Facts) -> StandaloneDraft:
    """The draft without private parts, sound in every tensor. Raises ``UserError`` where engines refuse the pair."""
    dense = draft.merged()
    check_language_model(dense, target)
    state = dense.stored()
    check_tensors(state, state, "the draft to be exported")
    return dense


def check_language_model(draft: StandaloneDraft, target: Facts) -> None:
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
    context = int(target.config.max_position_embeddings)
    if config.max_position_embeddings < context:
        raise UserError(
            f"the draft covers {config.max_position_embeddings} positions and the target {context}; engines cut "
            "the target's context to the draft's: train the draft with the target's length"
        )
    if draft.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"the draft is {draft.dtype}, which engines do not load; use float32, float16 or bfloat16")
