"""What kind of value a config.json must have where readers compute with it, told by key.

A reader that fails over a file has met either such a value, which is the file's fault and a reason to stop, or a
defect of ours, which must not pass for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from redraft.drafts.formats.meaning import Reading

SIZES = frozenset(
    """vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim num_hidden_layers
    max_position_embeddings draft_vocab_size target_hidden_size num_aux_layers num_aux_hidden_states
    original_max_position_embeddings""".split()
)
COUNTS = frozenset("sliding_window max_window_layers".split())
NUMBERS = frozenset(
    """rms_norm_eps rope_theta partial_rotary_factor logit_scale factor beta_fast beta_slow attention_factor mscale
    mscale_all_dim low_freq_factor high_freq_factor""".split()
)
LISTS: dict[str, type] = {
    "architectures": str,
    "layer_types": str,
    "layer_ids": int,
    "eagle_aux_hidden_state_layer_ids": int,
    "short_factor": float,
    "long_factor": float,
}
PARTS = frozenset("eagle_config transformer_layer_config rope_parameters rope_scaling".split())
TEXTS = frozenset("model_type speculators_model_type rope_type type hidden_act".split())
FAILURES = (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, OverflowError)


def guarded(reader: str, config: Mapping[str, Any], read: Callable[[], Reading]) -> Reading:
    """What ``read`` makes of a file with this ``config``; a value of the wrong kind over which it fails is a reason to
    stop. Where every value is of its kind the failure is ours and goes on."""
    try:
        return read()
    except FAILURES:
        wrong = list(wrong_kinds(config))
        if not wrong:
            raise
        return Reading(reader, stops=[f"config.json has a value of the wrong kind: {'; '.join(wrong)}"])


def wrong_kinds(config: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    """Every value of the wrong kind, by its key. What is null counts as absent, but among rotary settings, where
    transformers takes it for a value."""
    for key, value in config.items():
        place, kept = f"{inside}{key}", "rope_" in inside
        if key in PARTS and isinstance(value, Mapping):
            yield from wrong_kinds(value, f"{place}.")
        elif (value is not None or kept) and not _fits(key, value):
            yield f"{place} {value!r}"


def _fits(key: str, value: Any) -> bool:
    if key in SIZES | COUNTS:
        return type(value) is int and (0 if key in COUNTS else 1) <= value < 2**63
    if key in NUMBERS:
        return _number(value) and value > 0
    if key in LISTS:
        kind = LISTS[key]
        return isinstance(value, list | tuple) and all(
            _number(one) if kind is float else type(one) is kind for one in value
        )
    if key in PARTS:
        return isinstance(value, Mapping)
    return key not in TEXTS or isinstance(value, str)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e30
