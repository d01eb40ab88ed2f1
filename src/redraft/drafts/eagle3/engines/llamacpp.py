"""How llama.cpp (PyPI's xllamacpp 2026.10.11549) reads an Eagle3 draft: one GGUF file, whose metadata and tensors are
read as they are named there.

A Hugging Face folder is not read but converted first, by llama.cpp's own script or by ``redraft export --format gguf``.
The script, as it was when it first took such drafts, writes the feature ids (2, n // 2, n - 3) of a target of n layers
whatever the folder's config says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redraft.drafts.formats.meaning import Reading, TensorFacts
from redraft.target import Facts

ARCHITECTURE = "eagle3"
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_layers": "block_count",
    "target_hidden_size": "target_hidden_size",
    "taps": "target_layers",
}
# What no word of the metadata changes.
FIXED = {
    "fc_norm": False,
    "norm_output": False,
    "head_norm": True,
    "fc_bias": False,
    "attention_bias": False,
    "output_bias": False,
    "qk_norm": False,
}


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], target: Facts) -> Reading:
    """``config`` is the file's metadata by its full keys. Angles are not compared: they stand in tensors."""
    reading = Reading("llama.cpp 2026.10")
    if config.get("general.architecture") != ARCHITECTURE:
        reading.stops.append(
            "llama.cpp reads GGUF files alone, which redraft export --format gguf writes; its own converter may take "
            "the features after layers 2, n // 2 and n - 3 whatever the config says"
        )
        return reading
    for what, key in SIZES.items():
        value = config.get(f"{ARCHITECTURE}.{key}")
        if value is None:
            reading.stops.append(f"{ARCHITECTURE}.{key} is not in the metadata")
        else:
            reading.take(what, tuple(value) if what == "taps" else value, "read", f"{ARCHITECTURE}.{key}")
    for what in ("norm_before_residual", "norm_before_fc"):
        told = config.get(f"{ARCHITECTURE}.{what}")
        how, word = ("defaulted", "llama.cpp's default") if told is None else ("read", f"{ARCHITECTURE}.{what}")
        reading.take(what, bool(told), how, word)  # type: ignore[arg-type]
    for what, value in FIXED.items():
        reading.take(what, value, "defaulted", "llama.cpp's model")
    if reading.stops:
        return reading
    _vocabulary(reading, config, tensors)
    meaning = reading.meaning
    reading.take("windows", (0,) * int(meaning["num_layers"]), "defaulted", "llama.cpp's model")
    if len(meaning["taps"]) != 3:
        reading.stops.append(f"three features are needed, not {len(meaning['taps'])}")
    if max(meaning["taps"]) >= target.layers:
        # After all layers it takes another state than the one before the final norm: such a draft is accepted less.
        reading.stops.append(
            f"features can be read after layers 0 to {target.layers - 1} only, not after {max(meaning['taps'])}"
        )
    if meaning["num_layers"] != 1:
        reading.stops.append(f"one layer is computed, not {meaning['num_layers']}")
    if meaning["target_hidden_size"] != target.hidden_size:
        reading.stops.append(f"the target's states are {target.hidden_size} wide, not {meaning['target_hidden_size']}")
    _tensors(reading, tensors)
    return reading


def _vocabulary(reading: Reading, config: Mapping[str, Any], tensors: Mapping[str, TensorFacts]) -> None:
    listed = config.get("tokenizer.ggml.tokens")
    reading.take("target_vocab_size", len(listed or ()), "derived", "tokenizer.ggml.tokens")
    if "d2t" in tensors:
        reading.take("draft_vocab_size", tensors["d2t"].shape[0], "derived", "the shape of d2t")
        if tensors["d2t"].dtype != "int64":
            reading.stops.append(f"d2t is {tensors['d2t'].dtype}; int64 is needed")
    else:
        reading.take("draft_vocab_size", len(listed or ()), "derived", "tokenizer.ggml.tokens")
    own = "token_embd.weight" in tensors
    reading.take("embedding", "own" if own else "target", "read" if own else "target", "token_embd.weight")


def _tensors(reading: Reading, tensors: Mapping[str, TensorFacts]) -> None:
    """Lay the tensors beside those that the loader asks for; one more or less stops it."""
    meaning = reading.meaning
    width, fused = meaning["hidden_size"], 3 * meaning["target_hidden_size"]
    queries, keys = (meaning[k] * meaning["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    wanted: dict[str, tuple[int, ...]] = {
        "fc": (width, fused),
        "output_norm": (width,),
        "output": (meaning["draft_vocab_size"], width),
        "blk.0.attn_norm": (width,),
        "blk.0.attn_norm_2": (width,),
        "blk.0.attn_q": (queries, 2 * width),
        "blk.0.attn_k": (keys, 2 * width),
        "blk.0.attn_v": (keys, 2 * width),
        "blk.0.attn_output": (width, queries),
        "blk.0.ffn_norm": (width,),
        "blk.0.ffn_gate": (meaning["intermediate_size"], width),
        "blk.0.ffn_up": (meaning["intermediate_size"], width),
        "blk.0.ffn_down": (width, meaning["intermediate_size"]),
    }
    if meaning["norm_before_fc"]:
        wanted["enc.output_norm"] = (fused,)
    if meaning["embedding"] == "own":
        wanted["token_embd"] = (meaning["target_vocab_size"], width)
    for name, shape in ((f"{place}.weight", shape) for place, shape in wanted.items()):
        if name not in tensors:
            # Without a head of its own it takes the target's.
            absent = reading.silent if name == "output.weight" and "d2t" not in tensors else reading.stops
            absent.append(f"{name} is not in the file")
        elif tensors[name].shape != shape:
            reading.stops.append(f"{name} has shape {list(tensors[name].shape)}, {list(shape)} is needed")
        else:
            reading.take(name, list(shape), "read", name)
    free = {f"{place}.weight" for place in wanted} | {"d2t", "rope_freqs.weight"}
    reading.stops += [f"there is no place for {name}" for name in sorted(tensors.keys() - free)]
