"""The family ``eagle1``, as the registry holds it: how its checkpoints are read, and written for engines.

They are the work of three hands:

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

Drafts are written for vLLM (method ``eagle``) and for SGLang (algorithm EAGLE). Neither file holds a head or, unless
the draft has its own, an embedding: both engines lend the target's. Facts: vLLM 0.32, SGLang 0.5.23; docs/formats.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from redraft.artifact import check_tensors
from redraft.drafts.base import Family
from redraft.drafts.eagle.suspects import suspects
from redraft.drafts.eagle.writing import LayerWriter, in_layers, legacy_config, prepare
from redraft.drafts.eagle1.module import Eagle1Config, Eagle1Draft, fresh_eagle1
from redraft.drafts.formats.reading import Checkpoint, build_untrained, check_layer, layer_fields, read_state
from redraft.errors import UserError
from redraft.registries import FAMILIES
from redraft.target import Facts

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


def read(checkpoint: Checkpoint, target: Facts, notes: list[str]) -> tuple[Eagle1Draft, dict[str, Any]]:
    """The draft and its metadata. Raises ``UserError`` for what our draft does not compute or hold."""
    raw, path, kind = checkpoint.config, checkpoint.path, kind_of(checkpoint)
    check_layer(raw, raw, ("llama", "eagle"), path)
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


class Eagle1Writer(LayerWriter):
    """The files of one engine."""

    def check(self, draft: Eagle1Draft, target: Facts) -> tuple[Eagle1Draft, list[str]]:
        """As of every writer. A bias in ``fc`` that is all zero is left out for vLLM, whose ``fc`` has none."""
        dense, notes = prepare(draft, target)
        config = dense.config
        if self.name == "sglang" and config.own_embedding:
            raise UserError(
                "SGLang cannot run this draft: it replaces the draft's own embeddings with the target's; "
                "export it for vLLM instead"
            )
        if self.name == "sglang" or not config.fc_bias:
            return dense, notes
        state = dense.state_dict()
        if state.pop("fc.bias").any():
            raise UserError(
                "vLLM cannot run this draft: it has a bias in fc, which vLLM's eagle method does not load; "
                "export it for SGLang, or train a draft without it"
            )
        return dense.rebuilt(replace(config, fc_bias=False), state), [*notes, "the bias of fc, all zero, was left out"]

    def config(self, draft: Eagle1Draft, target: Facts, tokens: int) -> dict[str, Any]:
        architecture = next(architecture for architecture, kind in ARCHITECTURES.items() if kind == self.name)
        return legacy_config(draft, architecture) | ({} if draft.config.fc_bias else {"bias": False})

    def tensors(self, draft: Eagle1Draft) -> dict[str, Tensor]:
        """As of every writer; SGLang asks for a bias where the draft has none."""
        bias = self.name == "sglang" and not draft.config.fc_bias
        return in_layers(draft) | ({"fc.bias": torch.zeros_like(draft.fc.weight[:, 0])} if bias else {})


FAMILIES.register("eagle1")(
    Family(
        name="eagle1",
        build=lambda config: Eagle1Draft(Eagle1Config.from_dict(config)),
        fresh=lambda target, vocabulary, seed: fresh_eagle1(target, seed),
        recognises=lambda checkpoint: kind_of(checkpoint) is not None,
        architectures=tuple(ARCHITECTURES),
        read=read,
        suspects=suspects,
        writers={"vllm": Eagle1Writer("vllm", "eagle"), "sglang": Eagle1Writer("sglang", "EAGLE")},
        refusal="an Eagle1 draft reads the target's states and has no file that all engines load alike, nor one of "
        "{format}; export it for vllm or for sglang",
    )
)
