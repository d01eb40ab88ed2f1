"""Decoding steps of a target of 1 billion parameters: plain, chains and trees, with recorded graphs and without.

Weights are random, so what is measured is cost and not acceptance: seconds of a round whatever of it is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from onecard.common import Section, Shape, make_draft, make_target
from redraft.decode.auto import Costs, _plain_step, _round, make_decoder, measure_costs
from redraft.decode.engine import PlainDecoder
from redraft.decode.static import StaticTarget
from redraft.drafts.base import Draft
from redraft.settings.shapes import ChainShape, DynamicTree, parse_shape
from redraft.target import Target

SHAPE = Shape(2048, 32, 8, 8192, 128256, 32000, layers=16)
TINY = Shape(32, 4, 2, 64, 128, 64, layers=6)
GAMMAS = (3, 5)
TREES = (DynamicTree(depth=4, top_k=4, nodes=12), DynamicTree(depth=5, top_k=10, nodes=60))


def run(section: Section) -> None:
    shape, length, repeats = (TINY, 12, 1) if section.tiny else (SHAPE, 512, 15)
    target = make_target(shape, section.device, torch.bfloat16)
    draft = make_draft(shape, section.device)
    draft = draft.to(torch.bfloat16)
    target.tap(draft.taps)
    prompt = torch.arange(length).remainder(shape.draft_vocabulary).tolist()
    section.put("parameters", sum(p.numel() for p in target.model.parameters()))

    def dynamic() -> dict[str, Any]:
        return told(measure_costs(target, draft, prompt, GAMMAS, TREES, repeats=repeats))

    def recorded() -> dict[str, Any]:
        found = {}
        for gamma in GAMMAS:
            static = StaticTarget(target, (1, gamma + 1), length + gamma + 2)
            found |= told(measure_costs(static, draft, prompt, (gamma,), repeats=repeats))
        return found | {"trees": "a tree's mask has no fixed shape, so its rounds are not recorded"}

    section.attempt("as they come", dynamic)
    section.attempt("recorded", recorded)
    if section.cuda:
        section.attempt("waits for the device", lambda: waits(target, draft, prompt))


def told(costs: Costs) -> dict[str, Any]:
    """Milliseconds."""
    found: dict[str, Any] = {"plain_ms": round(1000 * costs.plain, 4)}
    for shape, cost in costs.rounds.items():
        split = {"draft_ms": 1000 * cost.draft, "verify_ms": 1000 * cost.verify, "round_ms": 1000 * cost.seconds}
        found[shape.describe()] = {name: round(value, 4) for name, value in split.items()} | {
            "round_in_plain_steps": round(cost.seconds / costs.plain, 3)
        }
    return found


def waits(target: Target, draft: Draft, prompt: list[int]) -> dict[str, Any]:
    """How often one step or round makes the CPU wait for the device, as torch counts it."""
    static = StaticTarget(target, (1, GAMMAS[-1] + 1), len(prompt) + GAMMAS[-1] + 2)
    chain = ChainShape(GAMMAS[-1])
    rounds: dict[str, Callable[[], Any]] = {
        "plain": _plain_step(PlainDecoder(target), prompt),
        f"{chain.describe()}": _round(make_decoder(target, draft, chain), prompt),
        f"{chain.describe()}, recorded": _round(make_decoder(static, draft, chain), prompt),
        TREES[-1].describe(): _round(make_decoder(target, draft, TREES[-1]), prompt),
        "a static tree": _round(make_decoder(target, draft, parse_shape("[[0],[1],[0,0],[0,1]]")), prompt),
    }
    return {name: counted(once) for name, once in rounds.items()}


def counted(once: Callable[[], Any]) -> int:
    """The waits in one call, behind one that warms up."""
    once()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            once()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in told)
