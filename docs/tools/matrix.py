"""The table of docs/serve/options.md: which option of a draft each format holds, found by asking the exporters.

Every option is put on a tiny draft with random weights, which each exporter then checks for a tiny target as it checks
any draft before it is written. Nothing is written, and no model is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from redraft.drafts.eagle1 import Eagle1Config, Eagle1Draft
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft
from redraft.errors import UserError
from redraft.registries import EXPORTERS, FAMILIES
from redraft.target import Facts

WIDTH, LAYERS, CONTEXT, VOCABULARY = 16, 12, 64, 256
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "target_vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# Options in words, and what they are of a config.
EAGLE3: dict[str, dict[str, Any]] = {
    "none of those below": {},
    "whole vocabulary": {"draft_vocab_size": VOCABULARY},
    "two decoder layers": {"num_layers": 2},
    "a sliding window (`windows`)": {"windows": (32,)},
    "norms of queries and keys (`qk_norm`)": {"qk_norm": True},
    "biases in the attention (`attention_bias`)": {"attention_bias": True},
    "a bias of its output alone (`output_bias`)": {"output_bias": True},
    "a bias in `fc` (`fc_bias`)": {"fc_bias": True},
    "one norm before `fc` (`norm_before_fc`)": {"norm_before_fc": True},
    "a norm of each feature (`fc_norm`)": {"fc_norm": True},
    "`norm_before_residual`": {"norm_before_residual": True},
    "state handed on behind the norm (`norm_output`)": {"norm_output": True},
    "no norm before the head (`head_norm: false`)": {"head_norm": False},
    "an embedding of its own": {"own_embedding": True},
    "heads of another width": {"head_dim": 6},
    "two features": {"taps": (3, 9)},
    "four features": {"taps": (2, 4, 6, 9)},
    "a feature before the first layer": {"taps": (0, 6, 9)},
    "a feature behind the last layer": {"taps": (2, 6, LAYERS)},
    "linear angles": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
    "dynamic angles": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}},
    "yarn angles": {"rope_parameters": {"rope_theta": 10000.0, **YARN}},
    "llama3 angles": {"rope_parameters": {"rope_theta": 10000.0, **LLAMA3, "original_max_position_embeddings": 32}},
    "a part of each head turned": {
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    },
}
EAGLE1: dict[str, dict[str, Any]] = {
    "none of those below": {},
    "a bias in `fc` (`fc_bias`)": {"fc_bias": True},
    "biases in the attention (`attention_bias`)": {"attention_bias": True},
    "two decoder layers": {"num_layers": 2},
    "an embedding of its own": {"own_embedding": True},
    "yarn angles": {"rope_parameters": {"rope_theta": 10000.0, **YARN}},
}
COLUMNS = {
    "eagle3": ("vllm", "plain", "sglang", "gguf", "tensorrt-llm", "specforge"),
    "eagle1": ("vllm", "sglang"),
}
READERS = {
    "vllm": "vLLM",
    "plain": "vLLM",
    "sglang": "SGLang",
    "gguf": "llama.cpp",
    "tensorrt-llm": "TensorRT-LLM",
    "specforge": "SpecForge",
}
YES, NO = "yes", "–"


@cache
def target() -> Facts:
    """The facts about a target that the tiny drafts fit."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
    )
    return Facts("target", config, tokenizer())


def tokenizer() -> Any:
    """The bytes, one token each; llama.cpp's file holds the target's tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: id for id, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def drafts() -> Iterator[tuple[str, str, Any]]:
    """(family, option, a draft with it)."""
    taps = {"target_hidden_size": WIDTH, "draft_vocab_size": 10, "taps": (2, 6, 9)}
    for option, changes in EAGLE3.items():
        yield "eagle3", option, filled(Eagle3Draft(replace(Eagle3Config(**SHAPE, **taps), **changes)))
    for option, changes in EAGLE1.items():
        yield "eagle1", option, filled(Eagle1Draft(replace(Eagle1Config(**SHAPE), **changes)))


def filled(draft: Any) -> Any:
    """The draft with a number other than zero and one in every weight: what is zero may be left out of a file."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(0.5 + 0.1 * torch.rand(parameter.shape, generator=generator))
    return draft


def reason(name: str, draft: Any) -> str:
    """Why a format does not hold a draft; empty where it does."""
    try:
        EXPORTERS.get(name).check(draft, target())
    except UserError as error:
        text = str(error).partition(": ")[2] or str(error)
        parts = (text.rpartition(";")[0] or text).split("; ")
        # Beside what is taken otherwise the tensors that follow from it need not be told.
        told = [part for part in parts if not part.startswith("there is no place for") and " has shape " not in part]
        return "; ".join(told or parts[:1])
    return ""


def options_page(written: str) -> str:
    """The page; ``written`` is the comment that says where it comes from."""
    lines = [
        "# Which options each format holds",
        "",
        written,
        "",
        "A draft has the options that it was trained with. What an engine would compute otherwise is refused at",
        "export, by the name of the option; nothing is dropped. This table is what the exporters say of a tiny draft",
        "with each option. A bias that is zero throughout is left out, or filled in, as the engine needs it; here none",
        "is zero.",
    ]
    found: dict[str, dict[str, dict[str, str]]] = {}
    for family, option, draft in drafts():
        names = COLUMNS[family]
        found.setdefault(family, {})[option] = {name: reason(name, draft) for name in names}
    titles = {"eagle3": "EAGLE-3", "eagle1": "EAGLE-1"}
    for family, options in found.items():
        names = COLUMNS[family]
        missing = set(FAMILIES.get(family).writers) - set(names)
        assert not missing, f"{family} has formats that the page does not show: {missing}"
        heads = [f"`{name}` ({READERS[name]})" for name in names]
        lines += ["", f"## {titles[family]}", "", f"| option | {' | '.join(heads)} |"]
        lines.append("| --- |" + " --- |" * len(names))
        for option, reasons in options.items():
            lines.append(f"| {option} | {' | '.join(NO if reasons[name] else YES for name in names)} |")
        lines += ["", "Why not:", ""]
        for name in names:
            for option, reasons in options.items():
                if reasons[name]:
                    lines.append(f"- `{name}`, {option}: {reasons[name]}")
    lines += [
        "",
        "A **standalone** draft has no options of this kind: `hf` writes the whole model, `gguf` one of Llama's shape",
        "([what is refused](../formats.md#what-is-refused-and-why)).",
    ]
    return "\n".join(lines) + "\n"
