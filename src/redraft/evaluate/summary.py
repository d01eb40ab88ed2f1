"""From decoded prompts to figures: what the benchmark says of one draft, of its tasks, and of one draft over another.

Everything is a function of :class:`Generation` records; whoever measured them does not matter here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from redraft import metrics
from redraft.decode.engine import Generation
from redraft.drafts.base import Proposer
from redraft.evaluate.statistics import mean, paired_difference, paired_ratio, ratio_of_sums
from redraft.target import Target

Runs = Sequence[Generation]
PLAIN = "plain"  # the contestant that every other is held against


def seconds(generation: Generation) -> float:
    """Prefill and decoding together, in seconds."""
    return generation.prefill_seconds + generation.decode_seconds


def speed(runs: Runs) -> dict[str, float]:
    """Tokens a second over prefill and decoding, with its interval."""
    return ratio_of_sums(*_rates(runs)).to_dict()


def step_seconds(runs: Runs) -> float:
    """Mean seconds of one plain decoding step; ``nan`` where no prompt had one."""
    steps = sum(len(run.ids) - 1 for run in runs)
    return sum(run.decode_seconds for run in runs) / steps if steps else math.nan


def kept(runs: Runs) -> list[Generation]:
    """Those that had rounds: a response of one token comes from prefill alone."""
    return [run for run in runs if run.rounds]


def _tokens(runs: Runs) -> list[int]:
    """Tokens that the rounds produced: the first one, which prefill gives, counts nowhere."""
    return [len(run.ids) - 1 for run in runs]


def _tau(runs: Runs) -> dict[str, float]:
    return ratio_of_sums(*_rounds(kept(runs))).to_dict()


def _rounds(runs: Runs) -> tuple[list[int], list[int]]:
    return _tokens(runs), [len(run.rounds) for run in runs]


def speedup(runs: Runs, plain: Runs) -> dict[str, float]:
    return paired_ratio(_rates(runs), _rates(plain)).to_dict()


def _rates(runs: Runs) -> tuple[list[int], list[float]]:
    return [len(r.ids) for r in runs], [seconds(r) for r in runs]


def summarise(runs: Runs, plain: Runs, depth: int, expected: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The figures of one draft on all prompts; ``depth`` is the most tokens that a round can accept.

    ``expected`` are the texts of plain decoding in the draft's own data type.
    """
    records = [run.rounds for run in runs]
    accepted, drafted = ([[getattr(r, name) for r in rounds] for rounds in records] for name in ("accepted", "depth"))
    conditional, unconditional = metrics.acceptance_by_position(accepted, drafted, depth)
    draft_s = sum(record.draft_seconds for rounds in records for record in rounds)
    verify_s = sum(record.verify_seconds for rounds in records for record in rounds)
    return {
        "tau_pooled": _tau(runs),
        "tau_macro": mean([(len(run.ids) - 1) / len(run.rounds) for run in kept(runs)]).to_dict(),
        "acceptance_conditional": _plain_numbers(conditional),
        "acceptance_unconditional": _plain_numbers(unconditional),
        "tokens_per_second": speed(runs),
        "speedup": speedup(runs, plain),
        "time": {
            "draft": draft_s,
            "verify": verify_s,
            "prefill": sum(r.prefill_seconds for r in runs),
            "other": sum(r.decode_seconds for r in runs) - draft_s - verify_s,
        },
        "rounds": sum(len(run.rounds) for run in runs),
        "tokens": sum(_tokens(runs)),
        "identical_to_plain": sum(list(run.ids) == list(ids) for run, ids in zip(runs, expected, strict=True)),
    }


def costs(target: Target, draft: Proposer, runs: Runs, plain: Runs) -> dict[str, Any]:
    """``{"mbsu": {"time": ..., "bytes": ...}}``: tau / (c * gamma + 1) (Goel et al., arXiv 2403.00858) and c, the
    ``cost`` of a draft step in units of a target step, from measured seconds and from the bytes that a step reads.

    A draft step is one level of a round's proposal: a token of a chain, a level of a tree. Gamma is the mean number
    of levels a round. ``time`` is null when no round, or no plain step, was timed.
    """
    records = [record for run in runs for record in run.rounds]
    steps = sum(record.depth for record in records)
    if not steps:
        return {"mbsu": {}}
    tau, gamma = sum(_tokens(kept(runs))) / len(records), steps / len(records)
    # A draft decodes in its target's type, whatever type it came in.
    size = target.head.weight.element_size()
    found = {"bytes": metrics.cost_by_bytes(draft.parameters_per_token * size, target.parameters_per_token * size)}
    plain_step = step_seconds(plain)
    if plain_step > 0:
        drafting = sum(record.draft_seconds for record in records)
        found["time"] = metrics.cost_by_time(drafting, steps, plain_step, 1)
    return {"mbsu": {name: {"value": metrics.mbsu(tau, gamma, c), "cost": c} for name, c in found.items()}}


def by_task(runs: Runs, plain: Runs, tasks: Sequence[str]) -> dict[str, Any]:
    """Acceptance and speed of one draft on the prompts of each task; empty where prompts have none."""
    found: dict[str, Any] = {}
    for task in sorted(set(tasks) - {""}):
        rows = [i for i, name in enumerate(tasks) if name == task]
        part, base = [runs[i] for i in rows], [plain[i] for i in rows]
        if not any(run.rounds for run in part):
            continue
        found[task] = {
            "prompts": len(rows),
            "tau_pooled": _tau(part),
            "speedup": speedup(part, base),
            "tokens_per_second": speed(part),
            "plain_tokens_per_second": speed(base),
        }
    return found


def gains(runs: Mapping[str, Runs], names: Sequence[str]) -> dict[str, Any]:
    """Every later draft against the first, paired over the same prompts."""
    found: dict[str, Any] = {}
    for name in names[1:]:
        new, old = runs[name], runs[names[0]]
        found[f"{name} over {names[0]}"] = {
            "tau": paired_difference(_rounds(new), _rounds(old)).to_dict(),
            "speed": paired_ratio(_rates(new), _rates(old)).to_dict(),
        }
    return found


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
