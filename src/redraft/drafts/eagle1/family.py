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

Facts: vLLM 0.32, SGLang 0.5.23; docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from redraft.artifact import check_tensors
from redraft.drafts.base import Family
from redraft.drafts.eagle.suspects import suspects
from redraft.drafts.eagle1.engines import READERS, meaning_of, read_as
from redraft.drafts.eagle1.module import Eagle1Config, Eagle1Draft, fresh_eagle1
from redraft.drafts.eagle1.writing import ARCHITECTURES, WRITERS
from redraft.drafts.formats import others
from redraft.drafts.formats.embeddings import compare
from redraft.drafts.formats.layers import LayerReader, by_our_names
from redraft.drafts.formats.meaning import Reading
from redraft.drafts.formats.reading import (
    Checkpoint,
    build_untrained,
    facts_of,
    note_dropped,
    read_state,
    refuse_code,
)
from redraft.drafts.formats.rows import fit_rows, padded
from redraft.errors import UserError
from redraft.registries import FAMILIES
from redraft.target import Facts
from redraft.values import Values

EMBEDDING = "embed_tokens.weight"
WORDS = {"vllm": "vLLM's EAGLE", "sglang": "SGLang's EAGLE", "original": "SafeAILab's EAGLE"}
# Keys of a config.json that are read here.
READ = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("max_position_embeddings", "attention_bias", "qkv_bias", "model_type", "hidden_act", "mlp_bias", "layer_types"),
    *("sliding_window", "use_sliding_window", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    *("vocab_size", "num_hidden_layers", "bias", "quantization_config"),
)
ORIGINAL = "LlamaForCausalLM"
FEW = (1, 2, 3, 4)  # layers of a draft; with more a checkpoint is a language model


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
        or raw.get("num_hidden_layers", 1) not in FEW
        or "speculators_model_type" in raw
    ):
        return None
    found = set(read_state(checkpoint.folder, []))
    other = {"norm.weight", "midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight"}
    return "original" if "fc.weight" in found and not found & other else None


def read(
    checkpoint: Checkpoint, target: Facts | None, notes: list[str], trainer: str | None = None, values: bool = True
) -> tuple[Eagle1Draft, dict[str, Any]]:
    """The draft and its metadata; ``trainer`` is the kind, for a file that does not tell it.

    Without ``values`` the numbers are not looked at.

    Raises ``UserError`` for what our draft does not compute or hold.
    """
    raw, path, folder = checkpoint.config, checkpoint.path, checkpoint.folder
    kind = kind_of(checkpoint) if trainer is None else trainer
    if kind not in WORDS:
        raise UserError(f"unknown trainer {trainer!r}; of this family there are: {', '.join(WORDS)}")
    reading = Reading(WORDS[kind], notes=notes)
    refuse_code(checkpoint, reading)
    state = read_state(folder, notes)
    if (found := others.of_tensors(state)) is not None:
        raise UserError(f"{folder} has {found[0]}, which is not read; {found[1]}")
    keys = Values(raw, path)
    layer = LayerReader(keys, facts_of(state), reading)
    layer.refuse(layer.faults(("llama", "eagle")))
    said = keys.flag("bias")
    biased = {"vllm": False, "sglang": True}.get(kind, said is not False)
    fields = layer.sizes() | layer.attention(False)
    fields["num_layers"] = layer.layers()
    if any(layer.windows(fields["num_layers"])):
        layer.refuse(["sliding_attention"])
    rows = layer.size("vocab_size", EMBEDDING, 0, "target_vocab_size")
    fields["rope_parameters"] = layer.rope(fields["max_position_embeddings"], partial=kind != "original")
    config = Eagle1Config(**fields, target_vocab_size=rows, fc_bias=biased, own_embedding=EMBEDDING in state)
    if target is not None:
        config = _fitted(config, state, target, reading, values)
        config.check_fit(target)
    state = by_our_names(state, config.num_layers)
    draft = build_untrained(lambda: Eagle1Draft.untrained(config), path)
    check_tensors(state, draft.state_dict(), folder, values)
    check_state(state, draft, path)
    if biased and said is False and not state["fc.bias"].any():
        del state["fc.bias"]
        config = replace(config, fc_bias=False)
        draft = Eagle1Draft.untrained(config)
    how = "derived" if said is None or kind != "original" else "read"
    reading.take("fc_bias", config.fc_bias, how, "the kind of checkpoint" if how == "derived" else keys.word("bias"))  # type: ignore[arg-type]
    draft.fill(state)
    note_dropped(keys, READ, reading)
    return draft, {"format": kind, "verifier": None, "reading": reading}


def check_state(state: Mapping[str, Tensor], draft: Eagle1Draft, where: Any) -> None:
    """Raise ``UserError`` where rotary settings of a draft of our own format tell no angles."""
    if not draft.rotary.usable:
        raise UserError(f"{where}: rotary settings that tell no angles: {draft.config.rope_parameters}")


def _fitted(
    config: Eagle1Config, state: dict[str, Tensor], target: Facts, reading: Reading, values: bool
) -> Eagle1Config:
    """The config on the target's number of rows, and a note on whose embedding it is."""
    rows, wanted = config.target_vocab_size, target.vocab_size
    if rows != wanted and padded(rows, wanted):
        fit_rows(state, 0, rows, wanted, Path("the draft"), reading.notes)
        config = replace(config, target_vocab_size=wanted)
    if not config.own_embedding:
        reading.take("embedding", "target", "target", "the file has none")
        return config
    compare(state[EMBEDDING], target, reading, values)
    return config


FAMILIES.register("eagle1")(
    Family(
        name="eagle1",
        build=lambda config: Eagle1Draft.untrained(Eagle1Config.from_dict(config)),
        fresh=lambda target, vocabulary, seed: fresh_eagle1(target, seed),
        recognises=lambda checkpoint: kind_of(checkpoint) is not None,
        architectures=tuple(ARCHITECTURES),
        read=read,
        suspects=suspects,
        meaning=meaning_of,
        readers={engine: partial(read_as, engine) for engine in READERS},
        options=("trainer",),
        check_state=check_state,
        writers=WRITERS,
        refusal="an Eagle1 draft reads the target's states and has no file that all engines load alike, nor one of "
        "{format}; export it for vllm or for sglang",
    )
)
