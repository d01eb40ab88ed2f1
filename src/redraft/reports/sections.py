"""What the page says of a result: figures chosen, ordered and put into words. No markup here, and no pictures."""

from __future__ import annotations

from typing import Any

from redraft.reports import format as form
from redraft.reports.load import BenchResult, Costs, CurvePoint, Interval, PhaseSeconds, Score, Stage, Summary

PER_PROMPT_ROWS, CURVE_ROWS = 200, 14


def sampler_line(result: BenchResult) -> str:
    """How the figures were taken: sampler, proposal shape, prompts, batch size."""
    s = result.setup
    shape = f"chain of {s.gamma}" if s.shape == "chain" and s.gamma else s.shape
    return (
        f"{s.sampler}, {shape}, {s.prompts} prompts, up to {s.max_new_tokens} new tokens, batch {s.batch}, "
        f"seed {s.seed}"
    )


def is_tree(result: BenchResult) -> bool:
    """Whether proposals were trees: then a proposal's place in the list says nothing about acceptance."""
    return "tree" in result.setup.shape.lower()


def tiles(result: BenchResult) -> list[dict[str, Any]]:
    """The headline figures: before, after, and the interval of after. A figure that was not measured has no tile.

    Compared are stale and aligned where they are, else the first and the last draft.
    """
    names = list(result.drafts)
    before, after = ("stale" if "stale" in names else names[0]), ("aligned" if "aligned" in names else names[-1])
    drafts, apart = result.drafts, types_differ(result)
    shown_as = {name: f"{name} in {drafts[name].dtype}" if apart else name for name in (before, after)}
    baseline = f" ({result.plain.fastest})" if result.plain else ""
    shown = [
        ("acceptance length \N{GREEK SMALL LETTER TAU}, tokens a round", "tau_pooled", "", 2),
        (f"speed-up over the fastest plain decoding{baseline}", "speedup", "\N{MULTIPLICATION SIGN}", 2),
        ("tokens a second", "tokens_per_second", "", 1),
    ]
    found = []
    for label, field, unit, digits in shown:
        old: Interval | None = getattr(drafts[before], field) if before != after else None
        new: Interval | None = getattr(drafts[after], field)
        if new is not None:
            tile = {"label": label, "unit": unit, "before_name": shown_as[before], "after_name": shown_as[after]}
            tile |= {"after": form.number(new.value, digits), "after_bounds": form.bounds(new, digits)}
            tile["before"] = form.number(old.value, digits) if old else ""
            found.append(tile | {"before_bounds": form.bounds(old, digits)})
    return found


def gains(result: BenchResult) -> list[str]:
    """One sentence a measured gain, with its paired interval; without one where it is the same at every prompt."""
    words = {"tau": "acceptance length higher by {}", "speed": "{} times the tokens a second"}
    return [
        f"{pair}: {words.get(kind, kind + ' {}').format(form.number(gain.value))}{form.interval(gain)}"
        for pair, kinds in result.gains.items()
        for kind, gain in kinds.items()
    ]


def others_apart(result: BenchResult) -> str:
    """What the rows of plain decoding in other data types are over, as their rates alone say something else."""
    if result.plain is None or not result.plain.relative:
        return ""
    kinds = " and ".join(f"plain {kind}" for kind in result.plain.relative)
    return f"{kinds}: on the few prompts that chose the data type, and over {result.plain.fastest} on the same ones"


def types_differ(result: BenchResult) -> bool:
    """Whether a draft ran in another data type than plain decoding."""
    plain = result.plain
    return plain is not None and any(d.dtype not in ("", plain.fastest) for d in result.drafts.values())


def slower(result: BenchResult) -> list[str]:
    """One sentence a draft that does not make decoding faster, and whether its interval leaves that open."""
    found = []
    for name, draft in result.drafts.items():
        ratio = draft.speedup
        if ratio is None or ratio.value >= 1:
            continue
        sure = ratio.high is not None and ratio.high < 1
        verdict = "is slower than plain decoding" if sure else "was not faster than plain decoding here"
        found.append(f"{name} {verdict}: {form.times(ratio.value)}{form.interval(ratio)}")
    return found


def round_costs(result: BenchResult) -> dict[str, dict[str, Any]]:
    """The mean round of every draft that was timed, by name.

    The four phases and their ``total`` are in units of what plain decoding takes for one token, t seconds: a round
    costs draft + verify + other + its share of prefill and yields ``tau`` tokens, so the speed-up is close to
    tau * t / cost (not equal: a response's first token comes from prefill and belongs to no round). ``c`` is the cost
    of one draft step, and the ``ideal`` round verifies for the price of one plain token and has no other cost:
    tau / (1 + gamma * c) (speculative sampling, arXiv 2211.17192, theorem 3.8, with measured times), unless the result
    states its own. Without a plain baseline the unit is a millisecond, and there is no c and no ideal.
    """
    plain, gamma, found = result.plain, result.setup.gamma, {}
    unit = 1 / plain.tokens_per_second.value if plain else 0.001
    for name, draft in result.drafts.items():
        if draft.time is None:
            continue
        cost: dict[str, Any] = {
            phase: getattr(draft.time, phase) / (draft.rounds * unit) for phase in PhaseSeconds.model_fields
        }
        total, tau, ideal = sum(cost.values()), draft.tau_pooled.value, draft.ideal_speedup
        cost |= {"total": total, "round_ms": total * (1000 * unit), "tau": tau}
        cost["c"] = cost["draft"] / gamma if plain and gamma else None
        cost["ideal"] = tau / (1 + cost["draft"]) if ideal is None and plain else ideal
        found[name] = cost
    return found


def tasks(result: BenchResult) -> dict[str, dict[str, Any]]:
    """{task: {draft: its result on the task}}, tasks in the order they were met."""
    found: dict[str, dict[str, Any]] = {}
    for name, draft in result.drafts.items():
        for task, figures in draft.by_task.items():
            found.setdefault(task, {})[name] = figures
    return found


def task_figures(result: BenchResult, field: str) -> dict[str, dict[str, Interval]]:
    """{task: {draft: interval}} of one field of ``by_task``, where it was measured."""
    found = {
        task: {name: getattr(figures, field) for name, figures in drafts.items() if getattr(figures, field)}
        for task, drafts in tasks(result).items()
    }
    return {task: figures for task, figures in found.items() if figures}


def quality(result: BenchResult) -> dict[str, dict[str, Score]]:
    """{task: {"plain" or draft: score}}: the same scorer on plain and on speculative answers."""
    found = {task: {"plain": score} for task, score in result.plain_quality.items()}
    for name, draft in result.drafts.items():
        for task, score in draft.plain_quality.items():
            found.setdefault(task, {}).setdefault("plain", score)
        for task, score in draft.quality.items():
            found.setdefault(task, {})[name] = score
    return found


def quality_verdict(scores: dict[str, dict[str, Score]]) -> str:
    """Whether the scores of plain and speculative output differ, in one sentence."""
    apart, changed = [], 0
    for task, by_name in scores.items():
        plain = by_name.get("plain")
        for name, score in by_name.items():
            if plain is None or name == "plain":
                continue
            changed += score.changed or 0
            if (score.correct, score.scored) != (plain.correct, plain.scored):
                apart.append(f"{task} with {name} ({score.correct} of {score.scored}, plain {plain.correct})")
    if apart:
        return "Scores differ on " + ", ".join(apart) + "; weigh that against the intervals."
    same = "Plain and speculative answers score the same on every task"
    return f"{same}, though {changed} verdicts changed." if changed else f"{same}."


def mbsu(result: BenchResult) -> dict[str, Any] | None:
    """The kinds of cost that were counted, and by draft tau / (gamma c + 1) with each; None where there is none."""
    drafts = {name: draft.mbsu for name, draft in result.drafts.items() if draft.mbsu}
    kinds = list(dict.fromkeys(kind for figures in drafts.values() for kind in figures))
    rows = {name: [figures.get(kind) for kind in kinds] for name, figures in drafts.items()}
    return {"kinds": kinds, "rows": rows} if rows else None


def levels(result: BenchResult) -> dict[str, dict[str, list[tuple[float, Interval]]]]:
    """{"tokens_per_second" or "ttft": {contestant: [(concurrency, interval)]}} of the server benchmark."""
    found: dict[str, dict[str, list[tuple[float, Interval]]]] = {"tokens_per_second": {}, "ttft": {}}
    for level in sorted(result.server.levels, key=lambda each: each.concurrency) if result.server else []:
        for name, load in level.contestants.items():
            for field, curves in found.items():
                if interval := getattr(load, field):
                    curves.setdefault(name, []).append((level.concurrency, interval))
    return {field: curves for field, curves in found.items() if curves}


def prompt_rows(result: BenchResult) -> list[dict[str, Any]]:
    """One row a prompt: task, tau and speed-up of every draft; entries that lack what that takes show nothing."""
    rows = []
    for entry in result.per_prompt[:PER_PROMPT_ROWS]:
        drafts, cells, base = entry.get("drafts") or {}, {}, _rate(entry.get("plain") or {})
        for name in result.drafts:
            figures = drafts.get(name) or {}
            rounds, tokens, rate = figures.get("rounds"), figures.get("tokens"), _rate(figures)
            tau = (tokens - 1) / rounds if rounds and tokens else None
            cells[name] = {"tau": tau, "speedup": rate / base if rate and base else None}
        rows.append({"id": entry.get("id", ""), "task": entry.get("task"), "drafts": cells})
    return rows


def _rate(figures: dict[str, Any]) -> float | None:
    tokens, seconds = figures.get("tokens"), figures.get("seconds")
    return tokens / seconds if tokens and seconds else None


def facts(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """The provenance that a reader looks for first; the whole record stands below it on the page."""
    machine, versions, revision = (_record(provenance.get(key)) for key in ("machine", "versions", "revision"))
    argv = provenance.get("argv")
    commit = str(revision.get("commit") or "")[:12]
    cores = f"{machine['cores']} cores" if machine.get("cores") else ""
    memory = form.scaled(machine["memory_bytes"], "B") if machine.get("memory_bytes") else ""
    found = [
        ("measured", str(provenance.get("time") or "").replace("T", " ")),
        ("command", " ".join(map(str, argv)) if isinstance(argv, list) else ""),
        ("revision", commit + (" with uncommitted changes" if commit and revision.get("dirty") else "")),
        ("machine", ", ".join(filter(None, [str(machine.get("cpu") or ""), cores, memory]))),
        ("arithmetic", arithmetic(_record(provenance.get("arithmetic")))),
        ("device", str(provenance.get("device") or "")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [(key, value) for key, value in found if value]


def arithmetic(record: dict[str, Any]) -> str:
    """The level of instructions in force, whatever held it back, and the type that was chosen by trying."""
    held = [f"{name} held to {limit}" for name, limit in _record(record.get("limits")).items() if limit]
    chosen = []
    for choice in map(_record, _record(record.get("chosen")).values()):
        rates = {n: rate for n, rate in _record(choice.get("gflops")).items() if isinstance(rate, int | float)}
        figures = ", ".join(f"{rate:.3g} in {name}" for name, rate in rates.items())
        chosen.append(f"{choice.get('dtype')} chosen" + (f" (GFLOP/s: {figures})" if figures else ""))
    return ", ".join(filter(None, [str(record.get("instructions") or ""), *held, *chosen]))


def _record(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# -- training, cost, summary -----------------------------------------------------------------------------------------
def training(points: list[CurvePoint], result: BenchResult) -> dict[str, Any] | None:
    """The training section; nothing for an empty curve. The draft before training is step 0's, where that is known."""
    if not points:
        return None
    stale = None
    if points[0].step == 0 and points[0].heldout_tau is not None:
        stale = ("before training", points[0].heldout_tau)
    elif "stale" in result.drafts:
        stale = ("stale, in the benchmark", result.drafts["stale"].tau_pooled.value)
    held = [point for point in points if point.heldout_tau is not None]
    rows, most = held or points, CURVE_ROWS - 1
    if len(rows) > CURVE_ROWS:  # evenly, the first and the last among them
        rows = [rows[round(i * (len(rows) - 1) / most)] for i in range(CURVE_ROWS)]
    return {"points": points, "last": points[-1], "held": held, "rows": rows, "stale": stale}


def total_of(costs: Costs) -> Stage:
    """Sums of the ledger; the peak memory is the largest, not the sum."""

    peak = max((stage.peak_memory_bytes or 0 for stage in costs.stages), default=0) or None
    added = ("tokens", "flops", "seconds", "bytes_written")
    sums: dict[str, Any] = {name: sum(getattr(stage, name) or 0 for stage in costs.stages) for name in added}
    return Stage(stage="total", peak_memory_bytes=peak, **sums)


def ledger_cells(stage: Stage) -> dict[str, str]:
    """One stage of the ledger as text."""
    return {
        "stage": stage.stage,
        "tokens": form.count(stage.tokens),
        "flops": form.scaled(stage.flops, "FLOP"),
        "time": form.duration(stage.seconds),
        "memory": form.scaled(stage.peak_memory_bytes, "B"),
        "written": form.scaled(stage.bytes_written, "B"),
        "formula": stage.formula or "",
    }


def ledger_rows(costs: Costs) -> list[dict[str, Any]]:
    """The ledger's stages and, last, their total; ``share`` is a stage's part of all seconds."""
    seconds = sum(stage.seconds or 0 for stage in costs.stages)
    shares = [(stage.seconds or 0) / seconds if seconds else 0.0 for stage in costs.stages]
    stages = zip([*costs.stages, total_of(costs)], [*shares, None], strict=True)
    return [ledger_cells(stage) | {"share": share} for stage, share in stages]


def recovery(summary: Summary) -> float | None:
    """(aligned - stale) / (full - stale) of tau, from one run alone: figures of two runs are not paired.

    None when one is missing, comes from elsewhere, or full gained nothing.
    """
    if summary.tau_full_from:
        return None
    stale, aligned, full = (summary.tau.get(name) for name in ("stale", "aligned", "full"))
    if stale is None or aligned is None or full is None or full <= stale:
        return None
    return (aligned - stale) / (full - stale)


def summary_lines(summary: Summary) -> list[tuple[str, str]]:
    """The quickstart's own lines: recovery, trained share, minutes, and any note it carries."""
    share = recovery(summary)
    lines = [("acceptance length after training every weight", form.number(summary.tau.get("full")))]
    if summary.tau_full_from:
        lines.append(("where that comes from", summary.tau_full_from))
    if share is not None:
        lines.append(("share of that gain recovered", form.percent(share)))
    lines += [
        ("trained parameters, of those that full training changes", form.percent(summary.trained_fraction_of_full, 1)),
        ("minutes from start to end", form.number(summary.minutes, 1)),
    ]
    extra = summary.model_extra or {}
    return lines + [(key.replace("_", " "), value) for key, value in extra.items() if isinstance(value, str)]
