"""The memory-bound speed-up of a measured draft: what its acceptance is worth when a pass costs what it reads.

Goel et al. (arXiv 2403.00858): tau / (c * gamma + 1), c the cost of a draft step in units of a target step. Here c is
taken twice: from the bytes of parameters that a step reads, and from measured seconds.
"""

from __future__ import annotations

from typing import Any

from redraft import metrics
from redraft.drafts.base import Draft
from redraft.evaluate.summary import Runs, step_seconds
from redraft.target import Target


def costs(target: Target, draft: Draft, runs: Runs, plain: Runs) -> dict[str, Any]:
    """``{"mbsu": {"time": ..., "bytes": ...}}``, each with its ``value`` and the ``cost`` of a draft step.

    A draft step is one level of a round's proposal: a token of a chain, a level of a tree. Gamma is the mean number
    of levels a round. ``time`` is null when no round, or no plain step, was timed.
    """
    records = [record for run in runs for record in run.rounds]
    steps = sum(record.depth for record in records)
    tokens = sum(len(run.ids) - 1 for run in runs if run.rounds)
    if not steps:
        return {"mbsu": {}}
    tau, gamma = tokens / len(records), steps / len(records)
    # A draft decodes in its target's type, whatever type it came in.
    size = target.head.weight.element_size()
    found = {"bytes": metrics.cost_by_bytes(draft.parameters_per_token * size, target.parameters_per_token * size)}
    plain_step = step_seconds(plain)
    if plain_step > 0:
        drafting = sum(record.draft_seconds for record in records)
        found["time"] = metrics.cost_by_time(drafting, steps, plain_step, 1)
    return {"mbsu": {name: {"value": metrics.mbsu(tau, gamma, c), "cost": c} for name, c in found.items()}}
