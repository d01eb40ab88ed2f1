"""Eagle1 checkpoints: the keys and tensors of the three hands that write them, and how they are read.

==========  ==========================  =========================================================================
kind        ``architectures``           ``fc.bias``
==========  ==========================  =========================================================================
vllm        EagleLlamaForCausalLM       absent: vLLM's ``fc`` has none, and its loader stops at one
sglang      LlamaForCausalLMEagle       present: SGLang's ``fc`` always has one, random when the file has none
original    LlamaForCausalLM            as ``bias`` in the config says, true when it says nothing (EAGLE's code)
==========  ==========================  =========================================================================

All are Llama configs of one layer; tensors are ``fc.*``, ``layers.0.*`` without an input norm, and perhaps
``embed_tokens.weight``. Engines read a ``bias`` in a Llama config as biases of the *attention*, so it is never
written as true: in files of ours ``bias: false`` says that the draft has no bias in ``fc`` and the zeros that SGLang
needs are none of its tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.artifact import check_tensors, fill
from redraft.drafts.eagle1 import Eagle1Config, Eagle1Draft, check_fit
from redraft.errors import UserError
from redraft.export.base import CONFIG_FILE, TargetInfo
from redraft.export.reading import build_untrained, layer_faults, read_layer, read_rope, read_state

ARCHITECTURES = {"EagleLlamaForCausalLM": "vllm", "LlamaForCausalLMEagle": "sglang"}
ORIGINAL = "LlamaForCausalLM"


def kind_of(raw: dict[str, Any], folder: Path) -> str | None:
    """Whose Eagle1 checkpoint this is; none where it is no Eagle1 checkpoint.

    EAGLE's own name their target's architecture: those are told by an ``fc`` beside a layer and no norm behind it.
    """
    named = raw.get("architectures") or ()
    for architecture, kind in ARCHITECTURES.items():
        if architecture in named:
            return kind
    if ORIGINAL not in named or "speculators_model_type" in raw:
        return None
    found = set(read_state(folder, []))
    other = {"norm.weight", "midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight"}
    return "original" if "fc.weight" in found and not found & other else None


def read(raw: dict[str, Any], kind: str, target: TargetInfo, folder: Path, notes: list[str]) -> Eagle1Draft:
    """The draft of a checkpoint of this kind. Raises ``UserError`` for what our draft does not compute or hold."""
    path = folder / CONFIG_FILE
    faults = layer_faults(raw, raw, ("llama", "eagle"))
    if faults:
        raise UserError(f"{path} asks for what redraft does not compute: {', '.join(faults)}")
    state = read_state(folder, notes)
    biased = {"vllm": False, "sglang": True, "original": bool(raw.get("bias", True))}[kind]
    config = read_config(raw, path, fc_bias=biased, own_embedding="embed_tokens.weight" in state)
    check_fit(config, target)
    draft = build_untrained(lambda: Eagle1Draft(config), path)
    check_tensors(state, draft.state_dict(), folder)
    if biased and raw.get("bias") is False and not state["fc.bias"].any():
        del state["fc.bias"]
        draft = Eagle1Draft(read_config(raw, path, fc_bias=False, own_embedding=config.own_embedding))
    fill(draft, state)
    return draft


def read_config(raw: dict[str, Any], path: Path, *, fc_bias: bool, own_embedding: bool) -> Eagle1Config:
    """Our config from a Llama config. Raises ``UserError``."""
    llama = read_layer({key: value for key, value in raw.items() if key != "bias"}, path)
    return Eagle1Config(
        hidden_size=llama.hidden_size,
        intermediate_size=llama.intermediate_size,
        num_attention_heads=llama.num_attention_heads,
        num_key_value_heads=llama.num_key_value_heads,
        head_dim=llama.head_dim,
        target_vocab_size=llama.vocab_size,
        rms_norm_eps=float(llama.rms_norm_eps),
        rope_parameters=read_rope(llama.rope_parameters),
        max_position_embeddings=llama.max_position_embeddings,
        attention_bias=bool(llama.attention_bias),
        fc_bias=fc_bias,
        own_embedding=own_embedding,
    )


def zero_bias(draft: Eagle1Draft) -> dict[str, Tensor]:
    """The bias that SGLang asks for where the draft has none."""
    return {} if draft.config.fc_bias else {"fc.bias": torch.zeros_like(draft.fc.weight[:, 0])}
