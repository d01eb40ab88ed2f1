"""Configs of tiny drafts that read the target's states, and the rotary settings that tests try on them.

The tests load it with ``runpy``, since test files cannot import each other.
"""

from __future__ import annotations

from typing import Any

from redraft.drafts.eagle1 import Eagle1Config
from redraft.drafts.eagle3 import Eagle3Config

LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}

# Heads of another width than a fourth of the state, and a rotary base that is nobody's default.
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "target_vocab_size": 40,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "max_position_embeddings": 64,
}
EAGLE1 = Eagle1Config(**SHAPE)
EAGLE3 = Eagle3Config(**SHAPE, target_hidden_size=16, draft_vocab_size=10, taps=(2, 4, 5))

# What drafts of other hands have beside the plain layer. Windows are shorter than the prompts of tests.
PARTIAL = {"rope_theta": 100000.0, "rope_type": "default", "partial_rotary_factor": 0.67}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 2, "windows": (0, 3)},
    "window": {"windows": (4,)},
    "narrow": {"num_layers": 3, "windows": (1, 2, 5)},
    "qk norms": {"qk_norm": True, "num_layers": 2},
    "biases": {"attention_bias": True, "fc_bias": True, "num_layers": 2, "own_embedding": True},
    "biases before": {"attention_bias": True, "output_bias": False},
    "bias behind": {"output_bias": True},
    "partial": {"rope_parameters": PARTIAL, "windows": (3,)},
}
EAGLE1_VARIANTS = LAYERS
OTHER_LAYERS = {"num_layers": 2, "windows": (3, 0), "qk_norm": True, "attention_bias": True, "output_bias": False}
VARIANTS = LAYERS | {
    "norms": {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True, "num_layers": 2},
    "feature norms": {"fc_norm": True, "norm_before_residual": True, "num_layers": 3, "windows": (2, 0, 4)},
    "no head norm": {"head_norm": False},
    "all": {
        "num_layers": 3,
        "windows": (3, 0, 4),
        "qk_norm": True,
        "attention_bias": True,
        "output_bias": False,
        "fc_bias": True,
        "norm_before_residual": True,
        "norm_before_fc": True,
        "norm_output": True,
        "head_norm": False,
        "own_embedding": True,
        "rope_parameters": PARTIAL,
    },
}
