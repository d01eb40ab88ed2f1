"""Writing an Eagle3 draft in the speculators format and in the plain one.

``vllm``: the speculators format, which vLLM loads with every option of an Eagle3 draft; keys and names of tensors
follow the speculators package (0.9). ``plain``: the format of SafeAILab and SpecForge, which vLLM and SGLang load;
``sglang`` is the same files, where SGLang computes them right. ``plain`` writes whatever vLLM loads and warns where
SGLang would compute something else; ``sglang`` refuses there. Facts: vLLM 0.32, SGLang 0.5.23; docs/formats.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from redraft.drafts.eagle.writing import LayerWriter, dtype_name, layer_config, legacy_rope, prepare, to_layers
from redraft.drafts.eagle3.maps import check_vocabulary_map
from redraft.drafts.eagle3.module import Eagle3Config, Eagle3Draft
from redraft.drafts.eagle3.reading import check_taps
from redraft.drafts.formats.base import Format, TargetInfo, path_warnings, serve_command, sglang_command
from redraft.errors import UserError
from redraft.registries import EXPORTERS

EXPORTERS.register("plain")(Format("plain"))


# -- checks ----------------------------------------------------------------------------------------------------------
def check_eagle3(draft: Eagle3Draft, target: TargetInfo) -> tuple[Eagle3Draft, list[str]]:
    """A dense draft that fits ``target`` and is sound in every tensor, and notes. Raises ``UserError``."""
    config = draft.config
    check_taps(config.taps)
    if config.norm_before_fc and config.fc_norm:
        raise UserError("norm_before_fc and fc_norm exclude each other in every engine; train a draft with one of them")
    dense, notes = prepare(draft, target)
    check_vocabulary_map({name: t.cpu() for name, t in dense.state_dict().items()}, config, "the draft to be exported")
    return dense, notes


def check_vllm(draft: Eagle3Draft, target: TargetInfo) -> tuple[Eagle3Draft, list[str]]:
    """As :func:`check_eagle3`, for a target that the file can name."""
    if not target.name:
        raise UserError("the export names the target for the engine; give the target's path or model id")
    return check_eagle3(draft, target)


def check_plain(draft: Eagle3Draft, target: TargetInfo) -> tuple[Eagle3Draft, list[str]]:
    """As :func:`check_eagle3`, with a note on what SGLang would not compute."""
    dense, notes = check_eagle3(draft, target)
    limits = sglang_limits(dense.config, target)
    return dense, notes + ([f"not for SGLang: {'; '.join(limits)}"] if limits else [])


def check_sglang(draft: Eagle3Draft, target: TargetInfo) -> tuple[Eagle3Draft, list[str]]:
    """As :func:`check_eagle3`. Raises ``UserError`` where SGLang would compute another draft."""
    dense, notes = check_eagle3(draft, target)
    if limits := sglang_limits(dense.config, target):
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


# -- config.json -----------------------------------------------------------------------------------------------------
def options(config: Eagle3Config) -> dict[str, bool]:
    """The four switches, always written: their defaults differ between the formats."""
    names = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    return {name: getattr(config, name) for name in names}


def speculators_config(draft: Eagle3Draft, target: TargetInfo, tokens: int) -> dict[str, Any]:
    """The whole config.json. It must carry no top-level ``model_type``: vLLM tells the format by that."""
    config = draft.config
    # Engines assume three features unless told otherwise here.
    layer = layer_config(draft) | {"num_aux_hidden_states": len(config.taps)}
    layer |= {"rope_parameters": dict(config.rope_parameters), "dtype": dtype_name(draft)}
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": tokens,
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


def plain_config(draft: Eagle3Draft, target: TargetInfo, tokens: int) -> dict[str, Any]:
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


WRITERS = {
    "vllm": LayerWriter(
        "vllm",
        check_vllm,
        speculators_config,
        partial(serve_command, method="eagle3"),
        to_layers,
        warnings=path_warnings,
    ),
    "plain": LayerWriter(
        "plain", check_plain, plain_config, partial(serve_command, method="eagle3"), warnings=path_warnings
    ),
    "sglang": LayerWriter("sglang", check_sglang, plain_config, partial(sglang_command, algorithm="EAGLE3")),
}
