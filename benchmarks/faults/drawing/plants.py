"""Faults planted in decoding, one at a time, to show that the tests see them.

Shape legend: B chains or trees, G drafted tokens, R siblings, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import batched
import torch
from torch import Tensor

from redraft.data import generate
from redraft.decode import accept, engine, requests
from redraft.sampling import draw, warp
from redraft.target.cache import KeyValueCache

Keep = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Uniforms, the target's and the draft's probabilities of the proposals -> which are kept."""


def kept_rightly(uniforms: Tensor, target: Tensor, draft: Tensor) -> Tensor:
    return uniforms * draft < target


def kept_inverted(uniforms: Tensor, target: Tensor, draft: Tensor) -> Tensor:
    return uniforms * target < draft


def kept_always(uniforms: Tensor, target: Tensor, draft: Tensor) -> Tensor:
    return draft > 0


def chains(keep: Keep = kept_rightly, draft_bonus: bool = False) -> Any:
    """The rule of chains with its parts exchanged; without arguments it is right."""

    def rule(target_BGV: Tensor, draft_BGV: Tensor, ids_BG: Tensor, uniforms_BG: Tensor) -> tuple[Tensor, Tensor]:
        drafted = ids_BG.shape[1]
        target_BG = target_BGV[:, :drafted].gather(-1, ids_BG[..., None])[..., 0].double()
        draft_BG = draft_BGV.gather(-1, ids_BG[..., None])[..., 0].double()
        keep_BG = keep(uniforms_BG[:, :drafted], target_BG, draft_BG) & (draft_BG > 0)
        accepted_B = keep_BG.long().cumprod(1).sum(1)
        rows, last_B = torch.arange(len(ids_BG)), accepted_B.clamp(max=drafted - 1)
        next_BV, draft_BV = target_BGV[rows, accepted_B], draft_BGV[rows, last_B]
        # What pads a short row of a batch has no probability: there the target's own row is the bonus.
        proposed_B = draft_BG[rows, last_B] > 0
        rejected_B = (accepted_B < drafted) & proposed_B
        next_BV = torch.where(rejected_B[:, None], accept._residual(next_BV, draft_BV), next_BV)
        if draft_bonus:
            next_BV = torch.where((accepted_B == drafted)[:, None], draft_BV, next_BV)
        return accepted_B, draw(next_BV, uniforms_BG[:, drafted])

    return rule


def siblings(keep: Keep) -> Any:
    """The rule of siblings with another test."""

    def rule(target_BV: Tensor, draft_BV: Tensor, ids_BR: Tensor, uniforms_BR: Tensor) -> tuple[Tensor, Tensor]:
        accepted_B = torch.full_like(ids_BR[:, 0], -1)
        for rank, id_B in enumerate(ids_BR.unbind(1)):
            target_B, draft_B = (
                probs.gather(-1, id_B.clamp(min=0)[:, None])[:, 0].double() for probs in (target_BV, draft_BV)
            )
            open_B = (accepted_B < 0) & (id_B >= 0) & (draft_B > 0)
            keep_B = open_B & keep(uniforms_BR[:, rank], target_B, draft_B)
            accepted_B = torch.where(keep_B, rank, accepted_B)
            lost_B1 = (open_B & ~keep_B)[:, None]
            target_BV = torch.where(lost_B1, accept._residual(target_BV, draft_BV), target_BV)
            draft_BV = torch.where(lost_B1, accept._without(draft_BV, id_B), draft_BV)
        return accepted_B, target_BV

    return rule


def unnormalised(target_BV: Tensor, draft_BV: Tensor) -> Tensor:
    return (target_BV - draft_BV).clamp(min=0)


def not_renormalised(draft_BV: Tensor, id_B: Tensor) -> Tensor:
    return draft_BV.scatter(-1, id_B.clamp(min=0)[:, None], 0.0)


def rolled_back_short(cache: Any, length: int) -> None:
    """One key of a rejected token stays."""
    for layer in cache.layers:
        layer.length = min(layer.length, length + 1)


def last_end(ids: list[int], ends: frozenset[int], room: int) -> tuple[list[int], str | None]:
    """Only the last token of a round is looked at."""
    kept = ids[:room]
    if kept[-1] in ends:
        return kept, "stop"
    return kept, "length" if len(ids) >= room else None


class Reused(requests.Uniforms):
    """Every portion begins with the same numbers: what decides about a proposal is what it was drawn with."""

    def take(self, count: int) -> Tensor:
        found = super().take(count)
        self.put_back(count)
        return found


class Shared(requests.Uniforms):
    """Neighbouring seeds have the same numbers."""

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__(seed // 2, device)


def without_top_p(logits: Tensor, sampler: Any) -> Tensor:
    return warp(logits, replace(sampler, top_p=1.0))


def shared_key(request: generate.Request, count: int) -> Tensor:
    number = int(request.key.split("@")[0]) // 2
    return torch.rand(count, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


@dataclass(frozen=True)
class Plant:
    """What is put in place of what, and the decoders that show it; ``sampler`` and ``draft`` number the settings."""

    patches: tuple[tuple[Any, str, Any], ...]
    decoders: tuple[str, ...]
    sampler: int = 0
    draft: str = "uniform"

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The fault, for as long as the context lasts."""
        with ExitStack() as stack:
            for place, name, fault in self.patches:
                stack.enter_context(patch.object(place, name, fault))
            yield


def in_chains(rule: Any) -> tuple[tuple[Any, str, Any], ...]:
    return ((engine, "accept_chains", rule), (batched, "accept_chains", rule))


INVERTED = (*in_chains(chains(kept_inverted)), (accept, "accept_siblings", siblings(kept_inverted)))
EVERYTHING = (*in_chains(chains(kept_always)), (accept, "accept_siblings", siblings(kept_always)))
PLANTS = {
    "accept with min(1, draft / target)": Plant(INVERTED, ("chain", "tree", "batched")),
    "accept everything": Plant(EVERYTHING, ("chain", "tree", "batched")),
    "correction from the target": Plant(
        ((accept, "_residual", lambda target, draft: target),), ("chain", "tree", "batched"), 0, "adversarial"
    ),
    "residual not normalised": Plant(((accept, "_residual", unnormalised),), ("tree",)),
    "siblings not renormalised": Plant(((accept, "_without", not_renormalised),), ("tree",), 1, "adversarial"),
    "bonus from the draft": Plant(in_chains(chains(draft_bonus=True)), ("chain", "batched")),
    "numbers used twice": Plant(((engine, "Uniforms", Reused),), ("chain", "tree")),
    "numbers shared by rows": Plant(((batched, "Uniforms", Shared), (engine, "Uniforms", Shared)), ("batched",)),
    "top-p left out": Plant(((engine, "warp", without_top_p), (batched, "warp", without_top_p)), ("chain",), 1),
    "one key not rolled back": Plant(((KeyValueCache, "rollback", rolled_back_short),), ("chain",)),
    "end inside a proposal": Plant(((engine, "trim", last_end), (batched, "trim", last_end)), ("chain", "batched")),
    "requests share numbers": Plant(((generate.Request, "uniforms", shared_key),), ("generate",)),
}
