"""For vLLM: the speculators format, which it loads with every option of an Eagle3 draft.

Config keys and tensor names follow the speculators package (0.9) and vLLM (0.32); see docs/formats.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redraft.drafts.base import Draft, family_of
from redraft.drafts.eagle1 import Eagle1Draft
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.errors import UserError
from redraft.export.base import (
    ExportReport,
    TargetInfo,
    check_formats,
    check_tokens,
    checks,
    dtype_name,
    layer_config,
    options,
    path_warnings,
    prepare,
    serve_command,
    to_layers,
    write_checkpoint,
)
from redraft.export.eagle1 import check_eagle1, export_eagle1
from redraft.export.importer import import_checkpoint
from redraft.registries import EXPORTERS


@EXPORTERS.register("vllm")
def export_vllm(draft: Draft, folder: str | Path, target: Any, *, speculative_tokens: int = 5) -> ExportReport:
    """Write the draft in the speculators format, private expert merged, for the fine-tuned ``target``.

    An Eagle1 draft is written for vLLM's method ``eagle``, which is a format of its own. ``speculative_tokens`` is the
    draft length that vLLM takes by default. Raises ``UserError`` where the draft does not fit the target, is
    incomplete, or the target has no name for the engine to load.
    """
    info, folder = TargetInfo.of(target), Path(folder)
    dense, notes = check_vllm(draft, info, speculative_tokens)
    if isinstance(dense, Eagle1Draft):
        return export_eagle1("vllm", draft, dense, notes, folder, info, speculative_tokens)
    config = speculators_config(dense, info, speculative_tokens)
    counts = write_checkpoint("vllm", dense, folder, info, config, to_layers, import_checkpoint)
    return ExportReport(
        "vllm",
        folder,
        *counts,
        merged_private=bool(draft.config.private_width or draft.config.low_rank),
        serve=serve_command(folder, info, speculative_tokens),
        warnings=(*notes, *path_warnings(folder.absolute())),
    )


@checks("vllm")
def check_vllm(draft: Any, info: TargetInfo, tokens: int) -> tuple[Any, list[str]]:
    """The dense draft as vLLM computes it, and notes. Raises ``UserError``."""
    check_formats(["vllm"], family_of(draft))
    check_tokens(tokens)
    if isinstance(draft, Eagle1Draft):
        return check_eagle1("vllm", draft, info)
    if not info.name:
        raise UserError("the export names the target for the engine; give the target's path or model id")
    return prepare(draft, info)


def speculators_config(draft: Eagle3Draft, target: TargetInfo, speculative_tokens: int) -> dict[str, Any]:
    """The whole config.json. It must carry no top-level ``model_type``: vLLM tells the format by that."""
    config = draft.config
    # Engines assume three features unless told otherwise here.
    layer = layer_config(draft) | {"num_aux_hidden_states": len(config.taps)}
    layer |= {"rope_parameters": dict(config.rope_parameters), "dtype": dtype_name(draft)}
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": speculative_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": list(config.taps),
        **options(config),
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": target.name, "architectures": list(target.architectures)},
        },
    }
