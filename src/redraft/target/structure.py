"""Where the parts of a model are: its text decoder, final norm, embedding table, experts, and what its config says."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from redraft.errors import UserError

NORMS = ("norm", "final_layernorm", "final_layer_norm", "norm_f", "embedding_norm")
# How configs name their experts, and how many of them a token is sent to.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")
# Parameters of routed experts: a list of modules, or stacked in one tensor [experts, ...].
ROUTED = re.compile(r"(?:^|\.)experts\.(?:\d+\.)?")
# Rotary types whose angles change once a text is longer than what the model was first trained on.
LENGTH_BOUND_ROPES = ("dynamic", "longrope")


def text_decoder(model: Any) -> Any:
    """The stack of decoder layers that reads text: the module itself, or the text part of a larger model.

    Raises ``UserError`` where there is none.
    """
    places = [model.get_decoder(), model.base_model]
    places += [getattr(place, name, None) for place in list(places) for name in ("model", "language_model")]
    for place in places:
        if place is not None and isinstance(getattr(place, "layers", None), nn.ModuleList) and _norm(place) is not None:
            return place
    raise UserError(
        f"{type(model).__name__} is not a dense decoder with .layers and .norm; "
        "use a Llama-, Qwen-, Mistral- or similarly shaped causal LM"
    )


def _norm(decoder: Any) -> Any:
    return next((getattr(decoder, name) for name in NORMS if hasattr(decoder, name)), None)


def final_norm(decoder: Any) -> Any:
    """The norm between the last layer and the head."""
    return _norm(decoder)


def plain_embedding(table: Any) -> Any:
    """The embedding table without a factor that the model puts on what it looks up (Gemma).

    Drafts read the table as it lies in the file: so do their trainers, and the engines that share it with the target.
    """
    if type(table) is nn.Embedding:
        return table
    rows, width = table.weight.shape
    plain = nn.Embedding(rows, width, device="meta")
    plain.weight = table.weight
    return plain.requires_grad_(False)


def context_length(config: Any) -> int:
    """Tokens of the longest text whose rotary angles are those that shorter ones have."""
    longest = int(config.max_position_embeddings)
    for rope in length_bound_ropes(config):
        first = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        # Without it, the config's own length is where the angles begin to change.
        longest = min(longest, int(first or longest))
    return longest


def length_bound_ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary settings whose angles follow the length of the text, of all kinds of layers that have some."""
    known = getattr(config, "rope_parameters", None) or {}
    ropes = list(known.values()) if known and all(isinstance(value, dict) for value in known.values()) else [known]
    return [rope for rope in ropes if rope.get("rope_type") in LENGTH_BOUND_ROPES]


def active_parameters(decoder: nn.Module, config: Any) -> int:
    """Parameters of a decoder that one token meets; of routed experts, the share that the router chooses."""
    experts, chosen = (_first(config, names) for names in (EXPERTS, CHOSEN))
    share = min(1.0, chosen / experts) if experts and chosen else 1.0
    whole = routed = 0
    for name, parameter in decoder.named_parameters():
        if ROUTED.search(name):
            routed += parameter.numel()
        else:
            whole += parameter.numel()
    return whole + round(routed * share)


def _first(config: Any, names: tuple[str, ...]) -> int:
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)
