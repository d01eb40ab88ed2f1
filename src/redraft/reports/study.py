"""A study's figures as markdown tables. Reads results and their figures, measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from redraft.reports.format import DASH, count, duration, number, percent, scaled

Row = Mapping[str, Any]
RECOVERIES = ("recovery", "recovery_same_data", "recovery_sampled")
_flops, _one = partial(scaled, unit="FLOP"), partial(number, digits=1)
SETS = {
    "greedy": "τ greedy",
    "sampled": "τ sampled",
    "greedy-tree": "τ greedy, tree",
    "sampled-tree": "τ sampled, tree",
    "general": "general τ, this target",
    "general-base": "general τ, base target",
}


def markdown(results: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """All tables of a study. ``figures`` are those that were worked out from ``results``."""
    parts = [f"# {results['name']}", results["about"], "", _setup(results)]
    parts += [f"![{about}]({name})" for name, about in figures.get("plots", {}).items()]
    pooled = figures["pooled"]
    for target, facts in results["targets"].items():
        rows = [row for row in pooled if row["target"] == target]
        if not rows:
            continue
        sets = [name for name in SETS if name in facts["sets"]]
        parts += [f"## {target}", _facts(facts), "### Acceptance", _acceptance(rows, sets)]
        parts += _section("### By task", _tasks(rows))
        parts += ["### Size and cost", _sizes(rows), "### FLOPs by stage", _stages(rows, "flops", _flops)]
        parts += ["### Seconds by stage", _stages(rows, "seconds", duration)]
        parts += _section("### Speed", _speed(facts.get("speed", [])))
    parts += _section("## Mean over targets", _average(figures["average"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, table: str) -> list[str]:
    return [title, table] if table else []


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column is text, the others are figures. Empty for no rows."""
    if not rows:
        return ""
    rule = ["---", *["---:"] * (len(head) - 1)]
    lines = [list(head), rule, *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def ranged(found: Mapping[str, float | None] | None, form: Callable[[float | None], str] = number) -> str:
    """``1.95 [1.90, 2.01]``; a dash where there is none."""
    if found is None or found["value"] is None:
        return DASH
    if found["low"] is None or found["low"] == found["high"]:
        return form(found["value"])
    return f"{form(found['value'])} [{form(found['low'])}, {form(found['high'])}]"


def label(row: Row, method_only: bool = False) -> str:
    """What tells a row from the others: method, and whatever is not the usual choice."""
    parts = [row["method"]]
    if not method_only and row["data"] != "-":
        parts.append(row["data"] + ("" if row["selection"] == "none" else f", {row['selection']}"))
    if row["loss"] not in ("-", "kl"):
        parts.append(f"loss {row['loss']}")
    if row["start"] != "none":
        parts.append(f"start {row['start']}")
    return "; ".join(parts)


# -- parts -----------------------------------------------------------------------------------------------------------
def _setup(results: Mapping[str, Any]) -> str:
    setup, config = results["setup"], results["config"]
    lines = [
        f"{setup['chain'].capitalize()}; {setup['walk']}. Sampled text at temperature {config['temperature']:g}. "
        "Square brackets: 95% bootstrap intervals over prompts, paired where two drafts are compared; a row with "
        "several seeds pools them, and the range behind it is over the seeds.",
        f"Budget: {setup['budget']} ({setup['train']['epochs']:g} epochs, steps of {setup['train']['batch_anchors']}).",
        "Recovery is (τ - τ stale) / (τ full - τ stale), full on all of the first data; gain is τ - τ stale.",
    ]
    if not results["finished"]:
        lines.append("**Not finished: some cells are missing.**")
    return "\n".join(lines)


def _facts(facts: Mapping[str, Any]) -> str:
    data = "; ".join(f"{n}: {d['rows']:,} rows, {d['tokens']:,} supervised tokens" for n, d in facts["data"].items())
    asked = ", ".join(f"{name} {len(found['prompts'])}" for name, found in facts["sets"].items())
    return f"Target `{facts['target']}`, draft `{facts['draft']}`. Data: {data or 'none'}. Evaluation prompts: {asked}."


def _acceptance(rows: Sequence[Row], sets: Sequence[str]) -> str:
    outside = [name for name in sets if name.startswith("general")]
    inside = [name for name in sets if name not in outside]
    head = [
        "method; data",
        *(SETS[n] for n in inside),
        "over seeds",
        "gain",
        "recovery",
        "recovery, same data and start",
        "the same, sampled",
    ]
    head += [f"{SETS[name]} (change)" for name in outside]
    lines = []
    for row in rows:
        line = [label(row), *(ranged(row["tau"].get(name)) for name in inside), _seeds(row)]
        line += [ranged(row.get("gain", {}).get("greedy")), *(ranged(row.get(n), percent) for n in RECOVERIES)]
        lines.append(line + [_outside(row, name) for name in outside])
    return table(head, lines)


def _seeds(row: Row) -> str:
    found = row["tau_by_seed"]
    return f"{number(min(found))} to {number(max(found))}" if len(found) > 1 else DASH


def _outside(row: Row, name: str) -> str:
    change = row.get("outside", {}).get(name)
    tau = number(row["tau"][name]["value"])
    if change is None or change["value"] is None:
        return tau
    return f"{tau} ({ranged(change, lambda ratio: DASH if ratio is None else f'{100 * (ratio - 1):+.1f}%')})"


def _tasks(rows: Sequence[Row]) -> str:
    tasks = list(rows[0]["tasks"])
    if not tasks:
        return ""
    names = list(rows[0]["tasks"][tasks[0]])
    head = ["method; data", *(f"{task}, {SETS[name]}" for task in tasks for name in names)]
    return table(head, [[label(r), *(ranged(r["tasks"][t][n]) for t in tasks for n in names)] for r in rows])


def _sizes(rows: Sequence[Row]) -> str:
    head = ["method; data", "trained", "share of full", "private file", "kept rows", "kept tokens", "trained on"]
    head += ["FLOPs, training", "FLOPs, all", "from scratch to this τ", "seconds, all"]
    lines = []
    for row in rows:
        scratch, flops = row.get("scratch"), row["flops"]
        against = DASH
        if scratch:
            against = f"{percent(scratch['share'])} of " + ("" if scratch["reached"] else "more than ")
            against += _flops(scratch["flops"])
        line = [label(row), count(row["trained_parameters"]), percent(row["trained_share"], 1)]
        line += [scaled(row["private_bytes"], "B"), percent(row["kept_rows"]), percent(row["kept_tokens"])]
        line += [count(round(row["trained_tokens"])), _flops(flops.get("train")), _flops(flops["total"]), against]
        lines.append([*line, duration(row["seconds"]["total"])])
    return table(head, lines)


def _stages(rows: Sequence[Row], name: str, form: Callable[[float | None], str]) -> str:
    stages = list(dict.fromkeys(stage for row in rows for stage in row[name] if stage != "total"))
    head = ["method; data", *stages, "total"]
    return table(head, [[label(r), *(form(r[name].get(s)) for s in [*stages, "total"])] for r in rows])


def _speed(runs: Sequence[Mapping[str, Any]]) -> str:
    head = ["decoding", "draft", "τ", "tokens/s", "speed-up over plain"]
    lines = []
    for run in runs:
        setup, plain = run["setup"], run["plain"]
        how = f"{setup['shape']} of {setup['gamma']}, {setup['sampler']}"
        lines.append([how, "plain", "1.00", ranged(plain[plain["fastest"]]["tokens_per_second"], _one), "1.00"])
        for name, found in run["drafts"].items():
            rate = ranged(found["tokens_per_second"], _one)
            if found.get("dtype", plain["fastest"]) != plain["fastest"]:
                name = f"{name} ({found['dtype']}, plain {plain['fastest']})"
            lines.append([how, name, ranged(found["tau_pooled"]), rate, ranged(found["speedup"])])
    return table(head, lines)


def _average(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    names = list(rows[0]["tau"])
    head = ["method; data", *(SETS[name] for name in names)]
    return table(head, [[label(row), *(ranged(row["tau"].get(name)) for name in names)] for row in rows])
