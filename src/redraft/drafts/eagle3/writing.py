"""How Eagle3 drafts are written, in the formats that engines and other trainers load.

``vllm``: the speculators format, which vLLM and the speculators package load; keys and names of tensors follow that
package (0.9). ``plain``: the format of SafeAILab, which vLLM loads with every option that it computes, and SGLang where
it computes the draft as it is. ``sglang``: the same, in the form that SGLang alone needs. ``specforge``: to go on
training there. ``tensorrt-llm``: what NVIDIA's ModelOpt exports and TensorRT-LLM reads.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.artifact import dtype_name
from redraft.drafts.eagle.writing import (
    Dense,
    LayerWriter,
    layer_config,
    legacy_config,
    numbered,
    output_biased,
    with_biases,
    with_fc_bias,
)
from redraft.drafts.eagle3.engines import meaning_of, read_as
from redraft.drafts.eagle3.maps import check_vocabulary_map
from redraft.drafts.eagle3.reading import check_taps
from redraft.drafts.formats.base import serve_command, served_name
from redraft.drafts.formats.embeddings import table_of
from redraft.drafts.formats.meaning import Difference, Reading, TensorFacts
from redraft.errors import UserError
from redraft.pieces import Table, in_rows
from redraft.target import Facts

EMBEDDING = "embed_tokens.weight"
KEY = "eagle_aux_hidden_state_layer_ids"
# Yarn's numbers where a draft's settings leave them to their defaults, for a reader that has none.
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}


def check_sound(dense: Dense) -> Any:
    """The config of a draft that a file can tell, whoever reads it. Raises ``UserError``."""
    check_taps(dense.config.taps)
    if dense.config.norm_before_fc and dense.config.fc_norm:
        raise UserError("norm_before_fc and fc_norm exclude each other in every engine; train a draft with one of them")
    check_vocabulary_map(dense.state, dense.config, "the draft to be exported")
    return dense.config


class Eagle3Writer(LayerWriter):
    """What all formats share. This one is ``plain``."""

    family = "eagle3"

    def read_as(self, reader: str, config: Any, tensors: Mapping[str, TensorFacts], target: Facts) -> Reading:
        return read_as(reader, config, tensors, target)

    def meaning(self, config: Any) -> dict[str, Any]:
        return meaning_of(config)

    def fitted(self, dense: Dense, target: Facts) -> tuple[Dense, list[str]]:
        """vLLM's llama layers have no bias, that of the output or all, its qwen3 layers none of the output."""
        config = check_sound(dense)
        biased, output = bool(config.attention_bias), output_biased(config)
        if config.qk_norm:
            dense = with_biases(dense, attention=biased, output=False)
        elif biased:
            dense = with_biases(dense, attention=True, output=True)
        else:
            dense = with_biases(dense, attention=False, output=output)
        return with_fc_bias(dense, False), []

    def names(self, dense: Dense) -> dict[str, str]:
        """Of a layer behind the first, vLLM reads the norm under one name and SGLang under another: it stands twice."""
        return {numbered(name) if name.startswith("later.") else name: name for name in dense.facts} | later_norms(
            dense
        )

    def config(self, dense: Dense, target: Facts, tokens: int) -> dict[str, Any]:
        """Feature ids stand twice: vLLM reads those on top (after k layers), SGLang adds one to the others."""
        config = dense.config
        architecture = "Eagle3Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLMEagle3"
        nested = {"use_aux_hidden_state": True, KEY: [k - 1 for k in config.taps]}
        more = one_bias(config)
        return legacy_config(dense, architecture) | more | options(config) | {"eagle_config": nested}

    def serve(self, dense: Dense, folder: Path, target: Facts, tokens: int) -> str:
        return serve_command(folder, target, tokens, self.method, self.name)


def one_bias(config: Any) -> dict[str, Any]:
    """The keys of biases of the output projection alone, or of all but it, as vLLM's two kinds of layers read them."""
    output = output_biased(config)
    if output == bool(config.attention_bias):
        return {}
    return {"bias": True, "qkv_bias": False} if output else {"qkv_bias": True}


def options(config: Any) -> dict[str, Any]:
    """The draft's own keys on top of a config.json.

    Switches are written whether on or off, since their defaults differ, but for ``norm_output``: false, it is
    absent, because one trainer means another thing by it.
    """
    switches = ("norm_before_residual", "norm_before_fc", "fc_norm")
    return {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        KEY: list(config.taps),
        # Engines assume three features unless told otherwise here.
        "num_aux_hidden_states": len(config.taps),
        **{name: getattr(config, name) for name in switches},
        **({"norm_output": True} if config.norm_output else {}),
    }


def later_norms(dense: Dense) -> dict[str, str]:
    """The norms before layers behind the first, under the name that SGLang and TensorRT-LLM read."""
    names = [name for name in dense.facts if name.startswith("later.") and name.endswith("input_layernorm.weight")]
    return {numbered(name).replace("input_layernorm", "hidden_norm"): name for name in names}


def llama_config(config: dict[str, Any]) -> dict[str, Any]:
    """For readers that know layers of a Llama alone, and give the key ``bias`` a meaning of their own."""
    return {k: v for k, v in config.items() if k not in ("bias", "qkv_bias")} | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
    }


class SglangWriter(Eagle3Writer):
    """As SGLang alone needs it: the only biases are that of the output, by one key, and that of ``fc``, by another."""

    def fitted(self, dense: Dense, target: Facts) -> tuple[Dense, list[str]]:
        check_sound(dense)
        dense = with_fc_bias(dense, False)
        # The key that gives fc a bias gives the output projection one too.
        output = dense.config.fc_bias or output_biased(dense.config)
        return with_biases(dense, attention=False, output=output), []

    def config(self, dense: Dense, target: Facts, tokens: int) -> dict[str, Any]:
        config = llama_config(super().config(dense, target, tokens))
        config |= {"attention_bias": True, "qkv_bias": False} if output_biased(dense.config) else {}
        return config | ({"bias": True} if dense.config.fc_bias else {})


class SpeculatorsWriter(Eagle3Writer):
    """The speculators format. It has no top-level ``model_type``: vLLM tells the format by that."""

    def fitted(self, dense: Dense, target: Facts) -> tuple[Dense, list[str]]:
        """With a copy of the target's embedding: the speculators package opens a file without one with zeros."""
        if not target.name:
            raise UserError("the export names the target for the engine; give the target's path or model id")
        dense, notes = super().fitted(dense, target)
        if dense.config.own_embedding:
            return dense, notes
        table = table_of(target)
        if table is None:
            note = (
                "the target's embedding is not at hand (its weights are elsewhere, or its adapter may change them), so "
                "that the file ships none: engines take the target's, the speculators package one of zeros; export for "
                "the folder of the whole target (redraft merge-target writes that of an adapter) to ship one"
            )
            return dense, [*notes, note]
        for kind in (dense.dtype, torch.float16):
            if all(torch.equal(rows.to(kind).to(rows.dtype), rows) for rows in in_rows(table)):
                table = Table(kind, table.shape, partial(_as_type, table, kind))
                break
        return dense.with_extra({EMBEDDING: table}), notes

    def told(self, difference: Difference, dense: Dense) -> bool:
        """An embedding that is the target's is the target's, whoever ships it; one of zeros has a note of its own."""
        return difference.what == "embedding" and (EMBEDDING in dense.extra or difference.theirs == "zeros")

    def names(self, dense: Dense) -> dict[str, str]:
        return {numbered(name): name for name in dense.facts}

    def config(self, dense: Dense, target: Facts, tokens: int) -> dict[str, Any]:
        config = dense.config
        rope, dtype = dict(config.rope_parameters), dtype_name(dense.dtype)
        proposal = {"proposal_type": "greedy", "speculative_tokens": tokens}
        verifier = {
            "name_or_path": served_name(target),
            "architectures": list(target.architectures or ("LlamaForCausalLM",)),
        }
        own = options(config)
        layer = layer_config(config) | {"num_aux_hidden_states": own.pop("num_aux_hidden_states")}
        layer |= one_bias(config)
        return {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            **own,
            "tie_word_embeddings": False,
            "transformer_layer_config": layer | {"rope_parameters": rope, "dtype": dtype},
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [proposal | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
                "verifier": verifier,
            },
        }


class SpecForgeWriter(Eagle3Writer):
    """To go on training in SpecForge 0.2: both maps whatever the vocabulary, its own meaning of ``norm_output``."""

    trains = True

    def fitted(self, dense: Dense, target: Facts) -> tuple[Dense, list[str]]:
        check_sound(dense)
        dense = with_fc_bias(with_biases(dense, attention=False, output=False), False)
        config = dense.config
        if config.draft_vocab_size == config.target_vocab_size:
            return dense.with_extra(whole_maps(config.target_vocab_size)), []
        note = (
            "SpecForge counts a new vocabulary map from its data and lays it over the old rows of the head, unless "
            "model.vocab_mapping_path names a file with this one; docs/warm-start.md says how it is made"
        )
        return dense, [note]

    def names(self, dense: Dense) -> dict[str, str]:
        return {numbered(name) if name.startswith("later.") else name: name for name in dense.facts}

    def config(self, dense: Dense, target: Facts, tokens: int) -> dict[str, Any]:
        config = llama_config(super().config(dense, target, tokens))
        for key in ("norm_output", "norm_before_residual", "norm_before_fc"):
            config.pop(key, None)
        if (config["rope_scaling"] or {}).get("rope_type") == "yarn":
            config["rope_scaling"] = YARN | config["rope_scaling"]
        switches = ("norm_before_residual", "norm_before_fc")
        on = {name: True for name in switches if getattr(dense.config, name)}
        return config | on | ({} if dense.config.head_norm else {"norm_output": False})

    def serve(self, dense: Dense, folder: Path, target: Facts, tokens: int) -> str:
        """The command that trains on, with what the run's own config must say."""
        model = {"target_model_path": target.name, "draft_model_config": str(folder)}
        model |= {"draft_checkpoint_path": str(folder)}
        more = {"load_target_embedding": False} if dense.config.own_embedding else {}
        return f"specforge train --config RUN.yaml  # its model: {json.dumps(model | more)}"


class TensorRtWriter(Eagle3Writer):
    """As ModelOpt exports it, with what TensorRT-LLM reads beyond that; feature ids stand in the command."""

    def fitted(self, dense: Dense, target: Facts) -> tuple[Dense, list[str]]:
        check_sound(dense)
        both = bool(dense.config.attention_bias) or output_biased(dense.config)
        return with_fc_bias(with_biases(dense, attention=both, output=both), False), []

    def names(self, dense: Dense) -> dict[str, str]:
        return {numbered(name): name for name in dense.facts} | later_norms(dense)

    def config(self, dense: Dense, target: Facts, tokens: int) -> dict[str, Any]:
        config = llama_config(super().config(dense, target, tokens))
        eagle = config["eagle_config"] | {"norm_before_fc": dense.config.norm_before_fc}
        return config | {"eagle_config": eagle} | ({"bias": True} if dense.config.fc_bias else {})

    def told(self, difference: Difference, dense: Dense) -> bool:
        return difference.what == "taps"

    def serve(self, dense: Dense, folder: Path, target: Facts, tokens: int) -> str:
        config = {"decoding_type": "Eagle3", "max_draft_len": tokens, "speculative_model": str(folder.absolute())}
        config |= {"eagle3_one_model": True, "eagle3_layers_to_capture": [k - 1 for k in dense.config.taps]}
        text = json.dumps({"speculative_config": config})
        start = shlex.join(["trtllm-serve", target.name, "--extra_llm_api_options", "draft.yaml"])
        return f"echo {shlex.quote(text)} > draft.yaml && {start}"


def _as_type(table: Table | Tensor, kind: torch.dtype) -> Iterator[Tensor]:
    """Some rows of a table at a time, in another type."""
    return (rows.to(kind) for rows in in_rows(table))


def whole_maps(rows: int) -> dict[str, Tensor]:
    """The maps of a whole vocabulary onto itself, for a reader that asks for them all the same."""
    return {"d2t": torch.zeros(rows, dtype=torch.int64), "t2d": torch.ones(rows, dtype=torch.bool)}


VLLM = ("vllm-0.32", "vllm-0.33")
WRITERS: dict[str, Eagle3Writer] = {
    "vllm": SpeculatorsWriter("vllm", "eagle3", VLLM, ("speculators",), warns=True),
    "plain": Eagle3Writer("plain", "eagle3", VLLM, ("sglang",), warns=True),
    "sglang": SglangWriter("sglang", "EAGLE3", ("sglang",)),
    "specforge": SpecForgeWriter("specforge", "", ("specforge",), trainer="specforge"),
    "tensorrt-llm": TensorRtWriter("tensorrt-llm", "Eagle3", ("tensorrt-llm",)),
}
