"""Drafts of other kinds, told by name: what they are, and what would help whoever has one."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

PARALLEL = "a P-EAGLE draft (all guesses in one pass over mask tokens)"
LATENT = "an EAGLE-3 draft with latent attention (MLA, as DeepSeek and Kimi have it)"
EXPERTS = "an EAGLE-3 draft with a mixture of experts"

TRAIN_DENSE = "train a dense draft of Llama or Qwen3 layers for this target"
AS_IT_IS = "serve it as it is, in the engine that it was made for"

# Names of architectures, and of speculators_model_type; the first that fits counts.
KINDS: tuple[tuple[str, str, str], ...] = (
    (r"p-?eagle|parallel_?eagle", PARALLEL, "train an ordinary EAGLE-3 draft, or " + AS_IT_IS),
    (r"d-?flash|d-?spark|domino|d-?spine|jetspec|x-?press", "a block-parallel draft (DFlash and its kin)", AS_IT_IS),
    (r"eagle.*mtp|mtp|nextn|multi_?token", "a head of further tokens (MTP)", AS_IT_IS),
    (
        r"^LlamaEagleDraftModel",
        "an EAGLE-1 draft of NeMo Automodel, with norms that no engine has in such a draft",
        "train an EAGLE-3 draft with it",
    ),
    (r"medusa", "a set of Medusa heads", "train an EAGLE-3 draft instead"),
    (r"mlp_?speculator", "an MLP speculator", "train an EAGLE-3 draft instead"),
    (r"hydra", "a set of Hydra heads", "train an EAGLE-3 draft instead"),
    (
        r"vispec|eagle.*(vl|vision|omni)|(vl|vision|omni).*eagle",
        "a draft for pictures",
        "give the draft of a text model",
    ),
    (r"eagle3?.*(deepseek|kimi|mistrallarge)", LATENT, TRAIN_DENSE),
    (r"(moe|mixtral|gptoss).*eagle|eagle.*(moe|mixtral|gptoss)", EXPERTS, TRAIN_DENSE),
    (r"eagle.*(cohere|minicpm|llama4|gemma|mistral|minimax)", "an EAGLE draft of other layers", TRAIN_DENSE),
)

# Tensors that only such drafts have.
TENSORS: tuple[tuple[str, str, str], ...] = (
    (r"(^|\.)mask_hidden$", "the extra mask_hidden: it is " + PARALLEL, "train an ordinary EAGLE-3 draft instead"),
    (r"(^|\.)(kv_a_proj_with_mqa|kv_b_proj)\.", "latent attention: it is " + LATENT, TRAIN_DENSE),
    (r"\.experts\.|(^|\.)mlp\.gate\.weight$|block_sparse_moe", "experts: it is " + EXPERTS, TRAIN_DENSE),
    (r"(^|\.)parallel_draft_heads\.|(^|\.)medusa", "parallel heads, as Medusa has them", "train it without them"),
    (
        r"(_scale|_scale_inv|_scale_2|\.qweight|\.qzeros|\.g_idx|weight_packed|weight_shape|\.absmax)$",
        "scales or packed numbers: it is quantised",
        "give the checkpoint that it was made from",
    ),
    (r"\.lora_[AB]\.|\.base_layer\.", "an adapter's tensors", "merge the adapter and save the draft again"),
)


def of_name(names: Collection[str]) -> tuple[str, str] | None:
    """What kind an architecture or type of these names is, and what would help; none where the names tell nothing."""
    for pattern, what, help in KINDS:
        if any(re.search(pattern, name.replace("ForCausalLM", ""), re.IGNORECASE) for name in names):
            return what, help
    return None


def of_tensors(names: Collection[str]) -> tuple[str, str] | None:
    """What a tensor among these tells of a draft that is not read, and what would help; none where none does."""
    for pattern, what, help in TENSORS:
        found = next((name for name in sorted(names) if re.search(pattern, name)), None)
        if found is not None:
            return f"{what} ({found})", help
    return None


def of_config(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """What the keys of a config tell of a draft that is not read, and what would help; none where none does."""
    if config.get("parallel_drafting"):
        return PARALLEL, "train an ordinary EAGLE-3 draft instead"
    if isinstance(config.get("vision_config"), Mapping):
        return "a draft for pictures (vision_config)", "give the draft of a text model"
    return None
