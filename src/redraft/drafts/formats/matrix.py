"""Every option of a family of drafts beside every format: what each reader makes of it, from the writers' own code.

A page and a test print the same table. A family's options are those that change what is computed, one at a time and in
the pairs that meet in one key of a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from redraft.drafts.base import Draft
from redraft.errors import UserError
from redraft.registries import FAMILIES
from redraft.target import Facts

LAYERS, WIDTH, ROWS, CONTEXT = 8, 16, 264, 64

THETA: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "default"}
ROPES: dict[str, dict[str, Any]] = {
    "rope linear": {"rope_type": "linear", "factor": 2.0},
    "rope llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "rope yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    "rope yarn, attention_factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.8,
    },
    "rope yarn, truncate false": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "truncate": False,
    },
    "rope dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "partial_rotary_factor": {"partial_rotary_factor": 2 / 3},
    "partial_rotary_factor, rope linear": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 2 / 3},
}
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "target_vocab_size": ROWS,
    "rope_parameters": THETA,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "own_embedding": False,
}
SWITCHES = dict.fromkeys(("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"), False)
OF_LAYERS: dict[str, dict[str, Any]] = {
    "none": {},
    "num_layers 2": {"num_layers": 2},
    "windows": {"num_layers": 2, "windows": (16, 16)},
    "windows of two kinds": {"num_layers": 2, "windows": (16, 0)},
    "windows of two widths": {"num_layers": 2, "windows": (16, 8)},
    "qk_norm": {"qk_norm": True},
    "qk_norm, windows": {"qk_norm": True, "windows": (16,)},
    "qk_norm, num_layers 2": {"qk_norm": True, "num_layers": 2},
    "attention_bias": {"attention_bias": True},
    "attention_bias, no output_bias": {"attention_bias": True, "output_bias": False},
    "output_bias": {"output_bias": True},
    "qk_norm, attention_bias": {"qk_norm": True, "attention_bias": True, "output_bias": False},
    "qk_norm, output_bias": {"qk_norm": True, "output_bias": True},
    "fc_bias": {"fc_bias": True},
    "fc_bias, output_bias": {"fc_bias": True, "output_bias": True},
    "fc_bias, attention_bias": {"fc_bias": True, "attention_bias": True},
    "own embedding": {"own_embedding": True},
    "head_dim": {"head_dim": 8},
    **{name: {"rope_parameters": THETA | rope} for name, rope in ROPES.items()},
}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "eagle1": OF_LAYERS,
    "eagle3": OF_LAYERS
    | {
        "full vocabulary": {"draft_vocab_size": ROWS},
        "norm_before_residual": {"norm_before_residual": True},
        "norm_before_fc": {"norm_before_fc": True},
        "fc_norm": {"fc_norm": True},
        "norm_output": {"norm_output": True},
        "no head_norm": {"head_norm": False},
        "norm_before_residual, num_layers 2": {"norm_before_residual": True, "num_layers": 2},
        "norm_before_fc, norm_output": {"norm_before_fc": True, "norm_output": True},
        "fc_norm, four features": {"fc_norm": True, "taps": (1, 3, 5, 7)},
        "four features": {"taps": (1, 3, 5, 7)},
        "features from the first to the last": {"taps": (0, 4, 8)},
        "another width than the target's": {"hidden_size": 12, "own_embedding": True},
    },
}
MORE: dict[str, dict[str, Any]] = {
    "eagle1": {"fc_bias": False},
    "eagle3": {"target_hidden_size": WIDTH, "draft_vocab_size": 10, "taps": (2, 4, 5), **SWITCHES},
}


@dataclass(frozen=True)
class Row:
    """One option beside one format.

    ``verdict``: "equal", every reader of the format computes the draft as it is; "refused", and ``why`` says what
    differs. ``notes`` are what the export would tell. ``readers`` are those that were asked.
    """

    family: str
    option: str
    format: str
    readers: tuple[str, ...]
    verdict: str
    why: str = ""
    notes: tuple[str, ...] = ()


def tokenizer() -> PreTrainedTokenizerFast:
    """The 256 bytes, two special tokens and two merges: some formats hold the target's tokenizer."""
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "an"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("t", "h"), ("a", "n")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words[:2]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def facts() -> Facts:
    """A target that the drafts of the table fit."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=1,
        num_hidden_layers=LAYERS,
        vocab_size=ROWS,
        max_position_embeddings=CONTEXT,
        architectures=["LlamaForCausalLM"],
    )
    return Facts("target", config, tokenizer())


def made(family: str, changes: Mapping[str, Any]) -> Draft:
    """A draft of a family with these options, none of whose numbers is zero."""
    config: dict[str, Any] = SHAPE | MORE[family] | dict(changes)
    draft: Draft = FAMILIES.get(family).build(config)
    generator = torch.Generator().manual_seed(1)
    maps = {"d2t": torch.zeros(config.get("draft_vocab_size", 0), dtype=torch.int64), "t2d": torch.arange(ROWS) < 10}
    state = {
        name: torch.rand(tensor.shape, generator=generator) + 0.1 if tensor.is_floating_point() else maps[name]
        for name, tensor in draft.state_dict().items()
    }
    draft.fill(state)
    return draft


def rows(families: tuple[str, ...] = tuple(OPTIONS)) -> Iterator[Row]:
    """The whole table, of the formats that each family is written in."""
    target = facts()
    for family in families:
        for option, changes in OPTIONS[family].items():
            draft = made(family, changes)
            for name, writer in FAMILIES.get(family).writers.items():
                try:
                    notes = writer.check(draft, target)[1]
                except UserError as error:
                    yield Row(family, option, name, writer.readers, "refused", str(error))
                else:
                    yield Row(family, option, name, writer.readers, "equal", notes=tuple(notes))
