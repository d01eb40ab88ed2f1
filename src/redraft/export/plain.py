"""The plain format of SafeAILab and SpecForge, which vLLM and SGLang load; and its subset that SGLang computes right.

The files of ``plain`` and ``sglang`` are the same. ``plain`` writes whatever vLLM loads from them and warns where
SGLang would compute something else; ``sglang`` refuses there. Facts: vLLM 0.32, SGLang 0.5.23; docs/formats.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redraft.drafts.base import Draft, family_of
from redraft.drafts.eagle1 import Eagle1Draft
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft
from redraft.errors import UserError
from redraft.export.base import (
    CHECKS,
    ExportReport,
    TargetInfo,
    check_formats,
    check_tokens,
    checks,
    dtype_name,
    layer_config,
    legacy_rope,
    options,
    path_warnings,
    prepare,
    serve_command,
    sglang_command,
    write_checkpoint,
)
from redraft.export.eagle1 import check_eagle1, export_eagle1
from redraft.export.importer import import_checkpoint
from redraft.registries import EXPORTERS


@EXPORTERS.register("plain")
def export_plain(draft: Draft, folder: str | Path, target: Any, *, speculative_tokens: int = 5) -> ExportReport:
    """Write the draft as a plain ``LlamaForCausalLMEagle3`` checkpoint, private expert merged.

    The format does not hold a draft length; ``speculative_tokens`` goes into the command of the report. Raises
    ``UserError`` where the draft does not fit the target or is incomplete.
    """
    return _export("plain", draft, Path(folder), TargetInfo.of(target), speculative_tokens)


@EXPORTERS.register("sglang")
def export_sglang(draft: Draft, folder: str | Path, target: Any, *, speculative_tokens: int = 5) -> ExportReport:
    """:func:`export_plain`, refused with ``UserError`` for a draft that SGLang would compute wrongly in silence.

    An Eagle1 draft is written as SGLang's algorithm EAGLE loads it, which is a format of its own.
    """
    return _export("sglang", draft, Path(folder), TargetInfo.of(target), speculative_tokens)


def _export(name: str, draft: Draft, folder: Path, info: TargetInfo, tokens: int) -> ExportReport:
    dense, notes = CHECKS[name](draft, info, tokens)
    if isinstance(dense, Eagle1Draft):
        return export_eagle1(name, draft, dense, notes, folder, info, tokens)
    counts = write_checkpoint(name, dense, folder, info, plain_config(dense), str, import_checkpoint)
    serve = serve_command(folder, info, tokens) if name == "plain" else sglang_command(folder, info, tokens, "EAGLE3")
    return ExportReport(
        name,
        folder,
        *counts,
        merged_private=bool(draft.config.private_width or draft.config.low_rank),
        serve=serve,
        warnings=(*notes, *(path_warnings(folder.absolute()) if name == "plain" else [])),
    )


@checks("plain")
def check_plain(draft: Any, info: TargetInfo, tokens: int) -> tuple[Any, list[str]]:
    """The dense draft of the plain format, and notes on what SGLang would not compute. Raises ``UserError``."""
    check_formats(["plain"], family_of(draft))
    check_tokens(tokens)
    dense, notes = prepare(draft, info)
    limits = sglang_limits(dense.config, info)
    return dense, notes + ([f"not for SGLang: {'; '.join(limits)}"] if limits else [])


@checks("sglang")
def check_sglang(draft: Any, info: TargetInfo, tokens: int) -> tuple[Any, list[str]]:
    """The dense draft as SGLang computes it. Raises ``UserError`` where it would compute another."""
    check_formats(["sglang"], family_of(draft))
    check_tokens(tokens)
    if isinstance(draft, Eagle1Draft):
        return check_eagle1("sglang", draft, info)
    dense, notes = prepare(draft, info)
    if limits := sglang_limits(dense.config, info):
        raise UserError(f"SGLang cannot run this draft: {'; '.join(limits)}; export it for vLLM instead")
    return dense, notes


def sglang_limits(config: Eagle3Config, target: TargetInfo) -> list[str]:
    """What SGLang would not compute as the draft does; it says nothing when that happens."""
    limits = []
    if config.norm_before_residual:
        limits.append("norm_before_residual is ignored")
    if config.attention_bias:
        limits.append("attention biases are dropped")
    if config.own_embedding:
        limits.append("the draft's own embeddings are replaced with the target's")
    if config.taps[0] < 1 or config.taps[-1] >= target.layers:
        limits.append(f"features can be read after layers 1 to {target.layers - 1} only")
    if len(config.taps) * config.target_hidden_size == config.hidden_size:
        limits.append("fc is skipped when its input is as wide as its output")
    return limits


def plain_config(draft: Eagle3Draft) -> dict[str, Any]:
    """The whole config.json. Feature ids stand twice: vLLM reads those on top (after k layers), SGLang adds one."""
    config = draft.config
    theta, scaling = legacy_rope(config.rope_parameters)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layer_config(draft),
        # Engines assume three features unless told otherwise here.
        "num_aux_hidden_states": len(config.taps),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "torch_dtype": dtype_name(draft),
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        **options(config),
        "eagle_aux_hidden_state_layer_ids": list(config.taps),
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [k - 1 for k in config.taps],
        },
    }
