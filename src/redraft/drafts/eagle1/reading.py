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

from dataclasses import replace
from typing import Any

from redraft.artifact import check_tensors
from redraft.drafts.eagle1.module import Eagle1Config, Eagle1Draft
from redraft.drafts.formats.base import TargetInfo
from redraft.drafts.formats.reading import Checkpoint, build_untrained, layer_faults, layer_fields, read_state
from redraft.errors import UserError

ARCHITECTURES = {"EagleLlamaForCausalLM": "vllm", "LlamaForCausalLMEagle": "sglang"}
ORIGINAL = "LlamaForCausalLM"


def kind_of(checkpoint: Checkpoint) -> str | None:
    """Whose Eagle1 checkpoint this is; none where it is no Eagle1 checkpoint.

    EAGLE's own, of one layer, name their target's architecture: those are told by an ``fc`` beside the layer and no
    norm behind it.
    """
    raw = checkpoint.config
    for architecture, kind in ARCHITECTURES.items():
        if architecture in checkpoint.architectures:
            return kind
    if (
        ORIGINAL not in checkpoint.architectures
        or raw.get("num_hidden_layers", 1) != 1
        or "speculators_model_type" in raw
    ):
        return None
    found = set(read_state(checkpoint.folder, []))
    other = {"norm.weight", "midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight"}
    return "original" if "fc.weight" in found and not found & other else None


def read(checkpoint: Checkpoint, target: TargetInfo, notes: list[str]) -> tuple[Eagle1Draft, dict[str, Any]]:
    """The draft and its metadata. Raises ``UserError`` for what our draft does not compute or hold."""
    raw, path, kind = checkpoint.config, checkpoint.path, kind_of(checkpoint)
    faults = layer_faults(raw, raw, ("llama", "eagle"))
    if faults:
        raise UserError(f"{path} asks for what redraft does not compute: {', '.join(faults)}")
    state = read_state(checkpoint.folder, notes)
    biased = {"vllm": False, "sglang": True}.get(str(kind), bool(raw.get("bias", True)))
    fields = layer_fields({key: value for key, value in raw.items() if key != "bias"}, path)
    config = Eagle1Config(**fields, fc_bias=biased, own_embedding="embed_tokens.weight" in state)
    config.check_fit(target)
    draft = build_untrained(lambda: Eagle1Draft(config), path)
    check_tensors(state, draft.state_dict(), checkpoint.folder)
    if biased and raw.get("bias") is False and not state["fc.bias"].any():
        del state["fc.bias"]
        draft = Eagle1Draft(replace(config, fc_bias=False))
    draft.fill(state)
    return draft, {"format": kind, "verifier": None}
