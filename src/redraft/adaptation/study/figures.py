"""From the rounds of a study's cells to its figures: tau, gain, recovery, what was lost outside the domain, cost.

Everything is a function of the raw results (schema ``redraft.study/1``, docs/studies/README.md), so that tables are
made again from the file alone. Rows that differ in the seed alone are pooled: a prompt's rounds are added up over the
seeds, prompts are resampled, and the spread over seeds stands beside the interval.

Shape legend: P prompts of an evaluation set, D bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from redraft.adaptation.study.records import SCHEMA, read_results
from redraft.artifact import atomic_write_bytes, atomic_write_json, atomic_write_text
from redraft.errors import UserError
from redraft.evaluate.statistics import (
    paired_difference,
    paired_ratio,
    paired_recovery,
    ratio_of_sums,
    resample_counts,
)
from redraft.reports.study import markdown, pictures

TABLES_FILE = "tables.md"
NONE, ANY, FULL, SCRATCH = "none", "-", "full", "scratch"
AXES = ("target", "method", "data", "selection", "loss", "start")
MAIN, SAMPLED = "greedy", "sampled"
OUTSIDE = ("general", "general-base")
DRAWS = 2000

Cell = Mapping[str, Any]
Sums = tuple[list[float], list[float]]


def derive(results: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of every cell, of cells pooled over seeds, and averages over targets.

    Raises ``UserError`` when the results are no study, or a cell lacks rounds.
    """
    if results.get("schema") != SCHEMA:
        raise UserError(f"these are no results of a study (schema {results.get('schema')!r}, expected {SCHEMA!r})")
    study = Study(results)
    groups: dict[tuple[str, ...], list[Cell]] = {}  # of cells that differ in the seed alone, in order
    for cell in study.cells:
        groups.setdefault(tuple(cell[axis] for axis in AXES), []).append(cell)
    pooled = [study.figures(group) for group in groups.values()]
    single = {cell["key"]: study.figures([cell]) for cell in study.cells}
    return {"cells": single, "pooled": pooled, "average": study.averages(groups)}


def registered(config: Mapping[str, Any], name: str) -> str:
    """The registered method behind a name of the study."""
    entry = config["methods"].get(name)
    return str((entry or {}).get("method") or name)


class Study:
    """Raw results, with what is looked up in them."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.cells: list[Cell] = list(results["cells"])
        self.targets: Mapping[str, Any] = results["targets"]
        self.config: Mapping[str, Any] = results["config"]
        self.first_data = next(iter(self.config["data"]))

    # -- looking up --------------------------------------------------------------------------------------------
    def origin(self, cell: Cell) -> tuple[str | None, bool]:
        """The draft that a cell starts from, where it is not the target's stale one; whether it is left unchanged."""
        entry = self.config["starts"].get(cell["start"])
        return (entry["draft"] if entry else None), str(entry["start"] if entry else cell["start"]) == NONE

    def rivals(self, cell: Cell, method: str, same_start: bool = False) -> list[Cell]:
        """Cells of a method on the same target and old draft, from that draft as it is or from the cell's start."""
        found = [
            c for c in self.cells if c["target"] == cell["target"] and registered(self.config, c["method"]) == method
        ]
        found = [c for c in found if self.origin(c)[0] == self.origin(cell)[0]]
        return [c for c in found if (c["start"] == cell["start"] if same_start else self.origin(c)[1])]

    def stale(self, cell: Cell) -> list[Cell]:
        return self.rivals(cell, NONE)[:1]

    def reference(self, group: Sequence[Cell], method: str, same_data: bool) -> list[Cell]:
        """The cells of ``method`` that a group is held against: on its own data and from its own start (where that
        was run; else from the old draft as it is), or on the first data unselected. Of several settings of it, such as
        learning rates, the strongest.

        Those with the group's seeds where all are there, else all seeds.
        """
        cell = group[0]
        wanted = {"data": self.first_data, "selection": NONE}
        if same_data:
            wanted = {axis: cell[axis] for axis in ("data", "selection", "loss")}
        rivals = (self.rivals(cell, method, same_start) for same_start in ((True, False) if same_data else (False,)))
        asked = ([c for c in some if wanted.items() <= c.items()] for some in rivals)
        found = next(filter(None, asked), [])
        # A study of losses has several; the usual one is the reference.
        found = [c for c in found if c["loss"] == "kl"] or [c for c in found if c["loss"] == found[0]["loss"]]
        # What is rounded afterwards is measured by the whole, whichever came out ahead.
        named: dict[str, list[Cell]] = {}
        for c in found:
            if c["settings"].get("bits") is None:
                named.setdefault(c["method"], []).append(c)
        found = max(named.values(), key=lambda cells: _ratio(self.sums(cells, MAIN)), default=[])
        seeds = {c["seed"] for c in group}
        mine = [c for c in found if c["seed"] in seeds]
        return mine if {c["seed"] for c in mine} == seeds else found

    def sums(self, group: Sequence[Cell], name: str, task: str | None = None) -> Sums:
        """(tokens, rounds) of every prompt of a set, summed over the cells of a group."""
        cell = group[0]
        try:
            asked = self.targets[cell["target"]]["sets"][name]
            places = [i for i, found in enumerate(asked["tasks"]) if task is None or found == task]
            tokens = [len(group) * asked["tokens"][i] for i in places]
            rounds = [math.fsum(c["rounds"][name][i] for c in group) for i in places]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"the results lack the rounds of cell {cell['key']} on {name} ({error})") from error
        return tokens, rounds

    # -- figures -----------------------------------------------------------------------------------------------
    def figures(self, group: Sequence[Cell]) -> dict[str, Any]:
        """All figures of cells that differ in the seed alone."""
        cell = group[0]
        found: dict[str, Any] = {axis: cell[axis] for axis in AXES} | {"seeds": [c["seed"] for c in group]}
        names = list(cell["rounds"])
        found["tau"] = {name: interval(ratio_of_sums(*self.sums(group, name))) for name in names}
        found["tau_by_seed"] = [_ratio(self.sums([c], MAIN)) for c in group]
        found["tasks"] = self._tasks(group, [name for name in names if name not in OUTSIDE])
        stale = self.stale(cell)
        if stale:
            pairs = {name: (self.sums(group, name), self.sums(stale, name)) for name in names}
            found["gain"] = {n: interval(paired_difference(*p)) for n, p in pairs.items() if n not in OUTSIDE}
            found["outside"] = {n: interval(paired_ratio(*p)) for n, p in pairs.items() if n in OUTSIDE}
            for name, same in (("recovery", False), ("recovery_same_data", True)):
                found[name] = self._recovery(group, stale, same)
            if SAMPLED in names:
                found["recovery_sampled"] = self._recovery(group, stale, True, SAMPLED)
        return found | self._cost(group)

    def _tasks(self, group: Sequence[Cell], names: Sequence[str]) -> dict[str, Any]:
        """tau by task, where there are several."""
        tasks = list(dict.fromkeys(self.targets[group[0]["target"]]["sets"][MAIN]["tasks"]))
        if len(tasks) < 2:
            return {}
        return {task: {n: interval(ratio_of_sums(*self.sums(group, n, task))) for n in names} for task in tasks}

    def _recovery(
        self, group: Sequence[Cell], stale: Sequence[Cell], same_data: bool, name: str = MAIN
    ) -> dict[str, Any] | None:
        """Held against the ``full`` that is the strongest in greedy decoding, whatever the set."""
        full = self.reference(group, FULL, same_data)
        if not full or (same_data and group[0]["data"] == ANY):
            return None
        return interval(paired_recovery(self.sums(group, name), self.sums(stale, name), self.sums(full, name)))

    def _cost(self, group: Sequence[Cell]) -> dict[str, Any]:
        """Sizes and costs, the mean over seeds, and what training from scratch to the same tau costs."""
        cell, count = group[0], len(group)
        if len({c["trained_parameters"] for c in group}) > 1:
            raise UserError(f"the seeds of {cell['key']} trained parts of different sizes; they cannot be pooled")
        found: dict[str, Any] = {
            "trained_parameters": cell["trained_parameters"],
            "trained_share": cell["trained_parameters"] / cell["full_parameters"],
            "private_bytes": cell["private_bytes"],
            "private_width": cell["private_width"] or None,
            "kept_rows": cell.get("kept_rows"),
            "kept_tokens": cell.get("kept_tokens"),
            "trained_tokens": sum(c.get("trained_tokens", 0) for c in group) / count,
        }
        for name in ("flops", "seconds"):
            stages = {stage: sum(c[name].get(stage, 0) for c in group) / count for stage in cell[name]}
            found[name] = {**stages, "total": sum(stages.values())}
        scratch = self.reference(group, SCRATCH, False)
        if scratch and cell.get("heldout") and registered(self.config, cell["method"]) != SCRATCH:
            found["scratch"] = self._against_scratch(group, scratch, found["flops"]["total"])
        return found

    def _against_scratch(self, group: Sequence[Cell], scratch: Sequence[Cell], total: float) -> dict[str, Any]:
        """FLOPs, all stages, that a new draft needs to the same held-out tau; a bound where it never got there."""
        wanted = sum(max(tau for _, tau in c["heldout"]) for c in group) / len(group)
        costs, reached = [], True
        for rival in scratch:
            before = sum(flops for stage, flops in rival["flops"].items() if stage != "train")
            step = next((step for step, tau in rival["heldout"] if tau >= wanted), None)
            reached = reached and step is not None
            steps = max(1, rival["steps"])
            costs.append(before + rival["flops"]["train"] * (steps if step is None else step) / steps)
        flops = sum(costs) / len(costs)
        return {"heldout_tau": wanted, "flops": flops, "reached": reached, "share": total / flops}

    # -- over targets ------------------------------------------------------------------------------------------
    def averages(self, groups: Mapping[tuple[str, ...], list[Cell]]) -> list[dict[str, Any]]:
        """The mean over targets of every combination that all targets have; empty for one target.

        Prompts are resampled within their target.
        """
        combined: dict[tuple[str, ...], list[list[Cell]]] = {}
        for key, group in groups.items():
            combined.setdefault(key[1:], []).append(group)
        names = {cell["target"] for cell in self.cells}
        found = []
        for key, parts in combined.items():
            if len(names) > 1 and len(parts) == len(names):
                sets = [name for name in parts[0][0]["rounds"] if all(name in part[0]["rounds"] for part in parts)]
                taus = {name: mean_of_taus([self.sums(part, name) for part in parts]) for name in sets}
                row = dict(zip(AXES[1:], key, strict=True))
                found.append(row | {"targets": [part[0]["target"] for part in parts], "tau": taus})
        return found


def mean_of_taus(parts: Sequence[Sums]) -> dict[str, float | None]:
    """The mean of several targets' tau with its interval; every target's prompts are resampled on their own."""
    draws_D = np.zeros(DRAWS)
    for seed, (tokens, rounds) in enumerate(parts):
        sums_D2 = resample_counts(len(tokens), DRAWS, seed) @ np.column_stack([tokens, rounds])
        draws_D += sums_D2[:, 0] / sums_D2[:, 1] / len(parts)
    low, high = np.quantile(draws_D, [0.025, 0.975])
    value = sum(map(_ratio, parts)) / len(parts)
    return {"value": value, "low": float(low), "high": float(high)}


def interval(found: Any) -> dict[str, float | None]:
    """An interval for JSON, which knows no NaN: what does not exist is null."""
    return {
        name: None if value is None or not math.isfinite(value) else value for name, value in found.to_dict().items()
    }


def _ratio(sums: Sums) -> float:
    return math.fsum(sums[0]) / math.fsum(sums[1])


# -- what is written -------------------------------------------------------------------------------------------------
def write_tables(results: Path, out: Path | None = None) -> Path:
    """Work the figures out of the raw results and write ``tables.md`` and the pictures to ``out``.

    ``out`` is by default the folder of the results. Returns the path of the tables. Raises ``UserError``.
    """
    found = read_results(results)
    figures = derive(found)
    folder = out if out is not None else results.parent
    drawn = pictures(found, figures)
    for name, (_, image) in drawn.items():
        atomic_write_bytes(folder / name, image)
    figures["plots"] = {name: about for name, (about, _) in drawn.items()}
    atomic_write_text(folder / TABLES_FILE, markdown(found, figures))
    return folder / TABLES_FILE


def write_full(results: dict[str, Any], path: Path, source: str) -> None:
    """Write the best that ``full`` reached, from any start and under any name, as the quickstart's summary reads it.

    Raises ``UserError`` when the study has no cell of ``full``, or several targets.
    """
    rows = [row for row in results["figures"]["pooled"] if registered(results["config"], row["method"]) == FULL]
    if len(results["targets"]) != 1 or not rows:
        raise UserError("the study must have one target and a cell of the method full")
    row = max(rows, key=lambda row: row["tau"]["greedy"]["value"])
    facts = results["targets"][row["target"]]
    same = (cell for cell in results["cells"] if all(cell[axis] == row[axis] for axis in AXES))
    kept, asked = next(same)["rows"], len(facts["sets"]["greedy"]["prompts"])
    start = "" if row["start"] == "none" else f", from start {row['start']}"
    told = (
        f"a committed run on {kept} answers to problems of the same kind{start}, "
        f"measured on {asked} others ({source}); the ten minutes do not allow it here"
    )
    atomic_write_json(path, {"tau": row["tau"]["greedy"]["value"], "from": told})
