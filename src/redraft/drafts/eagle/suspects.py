"""What may be read wrongly of any EAGLE draft: its rotary angles, its windows, its embedding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from redraft.drafts.base import rope_of
from redraft.drafts.layers import Rotary
from redraft.drafts.suspects import Suspect, twin
from redraft.features import FeatureSource
from redraft.rows import TokenRow
from redraft.target import Head

# What engines and trainers take where a file names no base of the angles.
USUAL_THETA = 10000.0


def suspects(
    draft: Any, target: Head, rows: Sequence[TokenRow] = (), features: FeatureSource | None = None
) -> Iterator[Suspect]:
    """See :data:`redraft.drafts.suspects.Suspecting`."""
    yield from angles(draft, target)
    if any(draft.config.reach):
        config = replace(draft.config, windows=())
        yield Suspect("window_lost", "every layer sees the whole text", twin(draft, config=config), "window_lost")
    if draft.embed_tokens is not None and draft.config.hidden_size == target.hidden_size:
        changed = twin(draft, config=replace(draft.config, own_embedding=False), embed_tokens=None)
        what = "the target's embedding in place of the draft's own"
        yield Suspect("embedding_replaced", what, changed, "embedding_replaced")
    if draft.embed_tokens is None:
        table = target.embedding.weight
        nothing = nn.Embedding.from_pretrained(torch.zeros_like(table))
        what = "an embedding of zeros"
        yield Suspect("embedding_replaced", what, twin(draft, embed_tokens=nothing), "embedding_replaced")


def angles(draft: Any, target: Head) -> Iterator[Suspect]:
    """Other rotary angles: plain ones, the usual base, the target's own."""
    config, own = draft.config, dict(draft.config.rope_parameters)
    theta, kind = own.get("rope_theta"), own.get("rope_type", "default")
    others = {
        f"plain angles of base {theta:g} in place of {kind}": {"rope_theta": theta, "rope_type": "default"},
        f"angles of the usual base {USUAL_THETA:g} in place of {theta:g}": own | {"rope_theta": USUAL_THETA},
        "the target's own angles": rope_of(target.config),
    }
    tried = [_plain(own)]
    for what, parameters in others.items():
        if _plain(parameters) in tried:
            continue
        tried.append(_plain(parameters))
        rotary = Rotary(parameters, config.head_dim, config.max_position_embeddings)
        changed = twin(draft, config=replace(config, rope_parameters=parameters), rotary=rotary)
        yield Suspect("rope_lost", what, changed, "rope_lost")


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"rope_type": "default"} | {key: value for key, value in parameters.items() if value is not None}
