"""Writing an Eagle1 draft for vLLM (method ``eagle``) and for SGLang (algorithm EAGLE).

Neither file holds a head or, unless the draft has its own, an embedding: both engines lend the target's. Facts: vLLM
0.32, SGLang 0.5.23; docs/formats.md.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from redraft.drafts.eagle.writing import LayerWriter, dtype_name, layer_config, legacy_rope, prepare, to_layers
from redraft.drafts.eagle1.module import Eagle1Draft
from redraft.drafts.eagle1.reading import ARCHITECTURES
from redraft.drafts.formats.base import TargetInfo, serve_command, sglang_command
from redraft.errors import UserError


def check_vllm(draft: Eagle1Draft, target: TargetInfo) -> tuple[Eagle1Draft, list[str]]:
    """The dense draft without a bias in ``fc`` that is all zero; any other is refused: vLLM's ``fc`` has none."""
    dense, notes = prepare(draft, target)
    if not dense.config.fc_bias:
        return dense, notes
    state = dense.state_dict()
    if state.pop("fc.bias").any():
        raise UserError(
            "vLLM cannot run this draft: it has a bias in fc, which vLLM's eagle method does not load; "
            "export it for SGLang, or train a draft without it"
        )
    bare = dense.rebuilt(replace(dense.config, fc_bias=False), state)
    return bare, [*notes, "the bias of fc, all zero, was left out"]


def check_sglang(draft: Eagle1Draft, target: TargetInfo) -> tuple[Eagle1Draft, list[str]]:
    """The dense draft. Raises ``UserError`` where SGLang would compute something else."""
    dense, notes = prepare(draft, target)
    if dense.config.own_embedding:
        raise UserError(
            "SGLang cannot run this draft: it replaces the draft's own embeddings with the target's; "
            "export it for vLLM instead"
        )
    return dense, notes


def eagle1_config(name: str, draft: Eagle1Draft, target: TargetInfo, tokens: int) -> dict[str, Any]:
    """The whole config.json for the engine ``name``."""
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


def zero_bias(draft: Eagle1Draft) -> dict[str, Tensor]:
    """The bias that SGLang asks for where the draft has none."""
    return {} if draft.config.fc_bias else {"fc.bias": torch.zeros_like(draft.fc.weight[:, 0])}


WRITERS = {
    "vllm": LayerWriter(
        "vllm", check_vllm, partial(eagle1_config, "vllm"), partial(serve_command, method="eagle"), to_layers
    ),
    "sglang": LayerWriter(
        "sglang",
        check_sglang,
        partial(eagle1_config, "sglang"),
        partial(sglang_command, algorithm="EAGLE"),
        to_layers,
        zero_bias,
    ),
}
