"""From decoded prompts to figures: what the benchmark says of one draft.

Everything is a function of :class:`Generation` records; whoever measured them does not matter here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from redraft import metrics
from redraft.decode.requests import Generation
from redraft.drafts.base import Draft
from redraft.evaluate.figures import PLAIN, Tally
from redraft.target import Target

Runs = Sequence[Generation]


def seconds(generation: Generation) -> float:
    """Prefill and decoding together, in seconds."""
    return generation.prefill_seconds + generation.decode_seconds


def tally(runs: Runs) -> Tally:
    """Tokens, seconds and rounds of every prompt."""
    lengths = [len(run.ids) for run in runs]
    return Tally(lengths, [*map(seconds, runs)], [n - 1 for n in lengths], [len(run.rounds) for run in runs])


def summarise(runs: Runs, plain: Runs, depth: int, expected: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The figures of one draft on all prompts; ``depth`` is the most tokens that a round can accept.

    ``expected`` are the texts of plain decoding in the draft's own data type.
    """
    records = [run.rounds for run in runs]
    accepted, drafted = ([[getattr(r, name) for r in rounds] for rounds in records] for name in ("accepted", "depth"))
    conditional, unconditional = metrics.acceptance_by_position(accepted, drafted, depth)
    draft_s = sum(record.draft_seconds for rounds in records for record in rounds)
    verify_s = sum(record.verify_seconds for rounds in records for record in rounds)
    mine = tally(runs)
    return {
        "tau_pooled": mine.tau(),
        "tau_macro": mine.tau_macro(),
        "acceptance_conditional": _plain_numbers(conditional),
        "acceptance_unconditional": _plain_numbers(unconditional),
        "tokens_per_second": mine.rate(),
        "speedup": mine.speedup(tally(plain)),
        "time": {
            "draft": draft_s,
            "verify": verify_s,
            "prefill": sum(r.prefill_seconds for r in runs),
            "other": sum(r.decode_seconds for r in runs) - draft_s - verify_s,
        },
        "rounds": sum(mine.rounds),
        "tokens": sum(mine.of_rounds),
        "identical_to_plain": sum(list(run.ids) == list(ids) for run, ids in zip(runs, expected, strict=True)),
    }


def costs(target: Target, draft: Draft, runs: Runs, plain: Runs) -> dict[str, Any]:
    """``{"mbsu": {"time": ..., "bytes": ...}}``: tau / (c * gamma + 1) (Goel et al., arXiv 2403.00858) and c, the
    ``cost`` of a draft step in units of a target step, from measured seconds and from the bytes that a step reads.

    A draft step is one level of a round's proposal: a token of a chain, a level of a tree. Gamma is the mean number
    of levels a round. ``time`` is null when no round, or no plain step, was timed.
    """
    records = [record for run in runs for record in run.rounds]
    steps = sum(record.depth for record in records)
    if not steps:
        return {"mbsu": {}}
    tau, gamma = sum(len(run.ids) - 1 for run in runs if run.rounds) / len(records), steps / len(records)
    # A draft decodes in its target's type, whatever type it came in.
    size = target.head.weight.element_size()
    found = {"bytes": metrics.cost_by_bytes(draft.parameters_per_token * size, target.parameters_per_token * size)}
    plain_steps, plain_seconds = sum(len(run.ids) - 1 for run in plain), sum(run.decode_seconds for run in plain)
    if plain_steps and plain_seconds > 0:
        drafting = sum(record.draft_seconds for record in records)
        found["time"] = metrics.cost_by_time(drafting, steps, plain_seconds, plain_steps)
    return {"mbsu": {name: {"value": metrics.mbsu(tau, gamma, c), "cost": c} for name, c in found.items()}}


def per_prompt(runs: Mapping[str, Runs], ids: Sequence[str], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """One record a prompt: its task, and tokens, rounds and seconds of every contestant."""

    def entry(run: Generation) -> dict[str, Any]:
        return {
            "tokens": len(run.ids),
            "rounds": len(run.rounds),
            "seconds": round(seconds(run), 4),
            "accepted": [record.accepted for record in run.rounds],
        }

    found = []
    for i, (name, task) in enumerate(zip(ids, tasks, strict=True)):
        plain = runs[PLAIN][i]
        record: dict[str, Any] = {"id": name, "task": task} if task else {"id": name}
        record["plain"] = {"tokens": len(plain.ids), "seconds": round(seconds(plain), 4)}
        record["drafts"] = {name: entry(part[i]) for name, part in runs.items() if name != PLAIN}
        found.append(record)
    return found


def _plain_numbers(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(v) else float(v) for v in values]
