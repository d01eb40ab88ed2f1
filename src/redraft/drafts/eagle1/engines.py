"""How engines read an Eagle1 checkpoint: vLLM 0.32 and 0.33, whose code is the same here, and SGLang 0.5.23.

Facts from ``models/llama_eagle.py`` of both, and from the layers that they build on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redraft.drafts.eagle.kinds import guarded
from redraft.drafts.eagle.look import Look, layer_meaning, layer_tensors
from redraft.drafts.eagle3.engines.sglang import RULES as SGLANG_RULES
from redraft.drafts.eagle3.engines.vllm import RULES as VLLM_RULES
from redraft.drafts.eagle3.engines.vllm import lent_window
from redraft.drafts.formats.meaning import Reading, TensorFacts
from redraft.errors import UserError
from redraft.target import Facts

READERS = ("vllm-0.32", "vllm-0.33", "sglang")


def meaning_of(config: Any) -> dict[str, Any]:
    """What a draft with this :class:`redraft.drafts.eagle1.Eagle1Config` means, in the terms of a ``Reading``."""
    return layer_meaning(config) | {"fc_bias": config.fc_bias}


def read_as(engine: str, config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], target: Facts) -> Reading:
    """What ``engine`` makes of this config.json and these tensors beside ``target``; nothing is loaded.

    Values of the wrong kind are a reason to stop. Raises ``UserError`` for a reader that there is not.
    """
    if engine not in READERS:
        raise UserError(f"no reader {engine!r} of Eagle1 drafts is known; there are {', '.join(READERS)}")

    def read() -> Reading:
        return _sglang(config, tensors, target) if engine == "sglang" else _vllm(engine, config, tensors, target)

    return guarded(engine, config, read)


def _vllm(engine: str, config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], target: Facts) -> Reading:
    look = _start(f"vLLM {engine.removeprefix('vllm-')}", "EagleLlamaForCausalLM", config, tensors, target)
    if look.reading.stops:
        return look.reading
    output = bool(config.get("attention_bias") or config.get("bias"))
    both = config.get("qkv_bias")
    look.reading.take(
        "attention_bias", output if both is None else bool(both), "read", "attention_bias, bias, qkv_bias"
    )
    look.reading.take("output_bias", output, "read", "config.json: attention_bias or bias")
    look.fixed("fc_bias", False, "vLLM's model")
    if config.get("layer_types"):
        look.stop("layer_types: it counts the draft's layers behind the target's and finds none of theirs there")
    windows = (0,) * int(look.meaning["num_layers"])
    look.reading.take("windows", windows, "defaulted", "vLLM's model")
    lent_window(look, windows)
    look.rope(VLLM_RULES)
    look.embedding("own", "target")
    look.check(_wanted(look), "keeps whatever its memory holds", "stop", ("lm_head.weight",))
    return look.reading


def _sglang(config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], target: Facts) -> Reading:
    look = _start("SGLang 0.5.23", "LlamaForCausalLMEagle", config, tensors, target)
    if look.reading.stops:
        return look.reading
    biased = bool(config.get("attention_bias") or config.get("bias"))
    for what in ("attention_bias", "output_bias"):
        look.reading.take(what, biased, "read", "config.json: attention_bias or bias")
    look.fixed("fc_bias", True, "SGLang's model")
    windows = look.windows()
    look.reading.take("windows", (0,) * len(windows), "defaulted", "SGLang's model")
    if any(windows):
        look.silent("sliding windows of the file are ignored")
    look.rope(SGLANG_RULES, lost="partial_rotary_factor")
    if config.get("tie_word_embeddings"):
        look.stop("tie_word_embeddings true: the embedding would be the head")
    look.embedding("target", "target")
    look.check(_wanted(look), "keeps what it was made with", "left out", ("lm_head.weight",))
    return look.reading


def _start(
    reader: str, architecture: str, config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], target: Facts
) -> Look:
    look = Look(reader, config, tensors, target)
    if architecture not in (config.get("architectures") or ()):
        look.stop(f"architectures {config.get('architectures')} are not known, {architecture} is")
    elif config.get("model_type") != "llama":
        look.stop(f"model_type {config.get('model_type')!r} is not read as that of a draft's layers")
    else:
        look.sizes("llama")
        look.fixed("qk_norm", False, "its llama layers")
        if look.meaning.get("max_position_embeddings", 0) < target.context:
            look.silent(f"texts beyond the draft's {look.meaning['max_position_embeddings']} positions have no angles")
    return look


def _wanted(look: Look) -> dict[str, tuple[int, ...]]:
    hidden, rows = int(look.meaning["hidden_size"]), int(look.meaning["target_vocab_size"])
    found: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, 2 * hidden)}
    if look.meaning["fc_bias"]:
        found["fc.bias"] = (hidden,)
    if look.meaning["embedding"] == "own":
        found["embed_tokens.weight"] = (rows, hidden)
    return found | layer_tensors(look.meaning, False)
