"""Writing an Eagle1 draft for vLLM (method ``eagle``) and for SGLang (algorithm EAGLE).

Neither file holds a head or, unless the draft has its own, an embedding: both engines lend the target's. Facts: vLLM
0.32, SGLang 0.5.23; docs/formats.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from redraft.drafts.base import Draft
from redraft.drafts.eagle1 import Eagle1Draft
from redraft.errors import UserError
from redraft.export.base import (
    ExportReport,
    TargetInfo,
    dtype_name,
    layer_config,
    legacy_rope,
    prepare,
    serve_command,
    sglang_command,
    to_layers,
    write_checkpoint,
)
from redraft.export.eagle1_format import ARCHITECTURES, zero_bias
from redraft.export.importer import import_checkpoint


def check_eagle1(name: str, draft: Eagle1Draft, target: TargetInfo) -> tuple[Eagle1Draft, list[str]]:
    """The dense draft as the engine ``name`` (``vllm`` or ``sglang``) computes it, and notes.

    Raises ``UserError`` where the draft does not fit the target, is incomplete, or the engine would compute something
    else.
    """
    dense, notes = prepare(draft, target)
    if name == "vllm":
        dense, dropped = without_bias(dense)
        notes += dropped
    elif dense.config.own_embedding:
        raise UserError(
            "SGLang cannot run this draft: it replaces the draft's own embeddings with the target's; "
            "export it for vLLM instead"
        )
    return dense, notes


def export_eagle1(
    name: str, draft: Draft, dense: Eagle1Draft, notes: list[str], folder: Path, target: TargetInfo, tokens: int
) -> ExportReport:
    """Write what :func:`check_eagle1` made of ``draft`` for the engine ``name``."""
    extra = zero_bias(dense) if name == "sglang" else {}
    counts = write_checkpoint(
        name, dense, folder, target, eagle1_config(dense, name), to_layers, import_checkpoint, extra
    )
    vllm = name == "vllm"
    return ExportReport(
        name,
        folder,
        *counts,
        merged_private=bool(draft.config.private_width or draft.config.low_rank),
        serve=serve_command(folder, target, tokens, "eagle")
        if vllm
        else sglang_command(folder, target, tokens, "EAGLE"),
        warnings=tuple(notes),
    )


def without_bias(draft: Eagle1Draft) -> tuple[Eagle1Draft, list[str]]:
    """The draft without a bias in ``fc`` that is all zero; any other raises ``UserError``: vLLM's ``fc`` has none."""
    if not draft.config.fc_bias:
        return draft, []
    state = draft.state_dict()
    if state.pop("fc.bias").any():
        raise UserError(
            "vLLM cannot run this draft: it has a bias in fc, which vLLM's eagle method does not load; "
            "export it for SGLang, or train a draft without it"
        )
    bare = Eagle1Draft(replace(draft.config, fc_bias=False))
    bare.load_state_dict(state, strict=True, assign=True)
    return bare, ["the bias of fc, all zero, was left out"]


def eagle1_config(draft: Eagle1Draft, name: str) -> dict[str, Any]:
    """The whole config.json."""
    theta, scaling = legacy_rope(draft.config.rope_parameters)
    architecture = next(architecture for architecture, kind in ARCHITECTURES.items() if kind == name)
    config = {
        "architectures": [architecture],
        **layer_config(draft),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "torch_dtype": dtype_name(draft),
    }
    return config if draft.config.fc_bias else config | {"bias": False}
