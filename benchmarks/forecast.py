"""The probe's forecast: fitted on every committed result of the default method, every target left out in turn.

    python benchmarks/forecast.py

reads the studies and benchmarks named below and benchmarks/results/forecast-targets.json, and writes
src/redraft/assets/forecast.json (coefficients with their provenance), benchmarks/results/forecast.json (every target's
outcome, every choice of observations that was tried, the leave-one-out table) and prints the table of docs/metrics.md.
Nothing is measured: the same files give the same figures.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from redraft.adaptation.probe import METHOD, PASSES, START
from redraft.adaptation.study.figures import MAIN, NONE, Study
from redraft.artifact import atomic_write_json, read_json
from redraft.evaluate.forecast import Fit, Seen, logit, observed, stepped

SCHEMA = "redraft.forecast/1"
WANTED = 0.9  # share of the targets whose outcome must lie in the interval of a fit without them
LEAST_STEP = 0.02  # a step of nothing has no logarithm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Choice: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]
ASSET = ROOT / "src" / "redraft" / "assets" / "forecast.json"
TARGETS = "forecast-targets"
# One row a target: of targets that several studies have, the one with the most answers and the default's data.
STUDIES = (
    ("selection", "maths"),
    ("maths-heavy", "gsm8k"),
    ("medical", "medical"),
    ("code", "code"),
    ("mild", "code"),
    ("mild", "medical"),
)
# Benchmarks of `redraft adapt`'s own drafts: (file, old draft, aligned draft).
BENCHES = (("patients-bench", "old", "lora"),)
# Choices of observations that were tried, each with its guards. A level means something only among drafts that were
# about as good on their base targets.
TRIED: tuple[Choice, ...] = (
    ((), ()),
    (("level",), ("base",)),
    (("lost",), ()),
    (("level", "lost"), ()),
    (("trial",), ()),
    (("level", "trial"), ("base",)),
)
# Those that ship, in the order in which the probe asks them.
SHIPPED = (TRIED[1], TRIED[0])


# -- the fit ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Known:
    """A target whose outcome is known."""

    name: str
    seen: Seen
    aligned_tau: float

    @property
    def step(self) -> float:
        """What the default method added to the logit, at the least ``LEAST_STEP``."""
        gained = logit(self.aligned_tau, self.seen.gamma) - logit(self.seen.tau, self.seen.gamma)
        return max(LEAST_STEP, gained)


def usable(known: Sequence[Known], names: Sequence[str]) -> list[Known]:
    """The targets that have all of the named observations."""
    return [one for one in known if observed(one.seen, names) is not None]


def least_squares(known: Sequence[Known], names: Sequence[str], guards: Sequence[str] = ()) -> Fit:
    """The fit on the targets that have these observations.

    Raises ``ValueError`` when they are too few to leave a degree of freedom.
    """
    rows = usable(known, (*names, *guards))
    if len(rows) < len(names) + 2:
        raise ValueError(f"{len(rows)} targets are too few for {len(names)} observations and a constant")
    x_NF = np.array([observed(one.seen, names) for one in rows])
    y_N = np.array([math.log(one.step) for one in rows])
    gram_FF = np.linalg.inv(x_NF.T @ x_NF)
    coefficients_F = gram_FF @ x_NF.T @ y_N
    left_N = y_N - x_NF @ coefficients_F
    spread = math.sqrt(float(left_N @ left_N) / (len(rows) - x_NF.shape[1]))
    gram = tuple(tuple(float(v) for v in row) for row in gram_FF)
    every_NF = np.array([observed(one.seen, (*names, *guards)) for one in rows])
    ranges = tuple((float(x_N.min()), float(x_N.max())) for x_N in every_NF.T[1:])
    return Fit(tuple(names), tuple(guards), ranges, tuple(float(c) for c in coefficients_F), gram, spread, len(rows))


def leave_one_out(known: Sequence[Known], names: Sequence[str], guards: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every target's outcome beside the forecast of a fit without it: logarithms of steps, half the width.

    A target that lies too far off from all others has no forecast, and is not in the list.
    """
    rows = usable(known, (*names, *guards))
    found = []
    for one in rows:
        fit = least_squares([other for other in rows if other is not one], names, guards)
        predicted = fit.log_step(one.seen)
        if predicted is None:
            continue
        found.append(
            {"name": one.name, "log_step": math.log(one.step), "predicted": predicted[0], "half": predicted[1]}
        )
    return found


def calibrated(known: Sequence[Known], names: Sequence[str], guards: Sequence[str] = ()) -> Fit:
    """The fit with its interval widened until nine of ten targets lie in that of a fit without them."""
    table = leave_one_out(known, names, guards)
    misses = sorted(abs(row["log_step"] - row["predicted"]) / row["half"] for row in table)
    # Rounded up, so that what only just lies within goes on doing so.
    needed = math.ceil(100 * misses[math.ceil(WANTED * len(misses)) - 1]) / 100
    widened = max(1.0, needed)
    held = sum(miss <= widened for miss in misses)
    return replace(least_squares(known, names, guards), widened=widened, held=held)


# -- the evidence ----------------------------------------------------------------------------------------------------
def outcomes() -> list[Known]:
    """Every target with what a probe sees of it and what the default method made of it."""
    extra = read_json(RESULTS / f"{TARGETS}.json")["targets"]
    found = [of_study(study, target, extra.get(f"{study}/{target}", {})) for study, target in STUDIES]
    found += [of_bench(*names, extra.get(names[0], {})) for names in BENCHES]
    return found + [of_target(name, entry) for name, entry in extra.items() if "aligned_tau" in entry]


def _value(entry: dict[str, Any], key: str) -> float | None:
    return entry[key]["value"] if key in entry else None


def default_cells(study: Study, target: str) -> list[Any]:
    """The cells of the default method on all of the target's own answers, one a seed."""
    asked = {"target": target, "method": METHOD, "data": study.first_data, "selection": NONE, "start": START}
    return [c for c in study.cells if all(c[k] == v for k, v in asked.items()) and c["loss"] == "kl"]


def of_study(name: str, target: str, extra: dict[str, Any]) -> Known:
    """Pooled over seeds; tau of the study's greedy chain."""
    results = read_json(RESULTS / f"{name}.json")
    study, gamma = Study(results), results["config"]["gamma"]
    cells = default_cells(study, target)
    tokens, rounds = study.sums(cells, MAIN)
    old_tokens, old_rounds = study.sums(study.stale(cells[0]), MAIN)
    tau, aligned = math.fsum(old_tokens) / math.fsum(old_rounds), math.fsum(tokens) / math.fsum(rounds)
    # A trial is walked over a part of the prompts: what counts is its step from the old draft's tau on the same.
    tried = extra.get("trial")
    after = None
    if tried:
        step = logit(tried["tau"]["value"], gamma) - logit(
            tried.get("stale_tau", extra.get("stale_tau"))["value"], gamma
        )
        after = stepped(tau, gamma, step)
    return Known(f"{name}/{target}", Seen(gamma, tau, _value(extra, "reference_tau"), after), aligned)


def of_bench(name: str, old: str, aligned: str, extra: dict[str, Any]) -> Known:
    """From a benchmark's own figures."""
    result = read_json(RESULTS / f"{name}.json")
    tau = {draft: result["drafts"][draft]["tau_pooled"]["value"] for draft in (old, aligned)}
    return Known(name, Seen(result["setup"]["gamma"], tau[old], _value(extra, "reference_tau")), tau[aligned])


def of_target(name: str, entry: dict[str, Any]) -> Known:
    """From benchmarks/forecast_targets.py."""
    tried = entry["trial"]["tau"]["value"] if "trial" in entry else None
    seen = Seen(entry["gamma"], entry["stale_tau"]["value"], _value(entry, "reference_tau"), tried)
    return Known(name, seen, entry["aligned_tau"]["value"])


def costs() -> dict[str, float]:
    """Seconds of a trained position over those of a generated token, and the draft's share of the target's parameters:
    medians over the default cells of all studies, each on one machine."""
    ratios, shares = [], []
    for name, target in STUDIES:
        results = read_json(RESULTS / f"{name}.json")
        study = Study(results)
        for cell in default_cells(study, target):
            generated = results["targets"][target]["data"][study.first_data]["tokens"]
            ratios.append(
                cell["seconds"]["train"] / cell["trained_tokens"] / (cell["seconds"]["generation"] / generated)
            )
            shares.append(cell["full_parameters"] / results["targets"][target]["target_parameters_per_token"])
    return {"training_cost": statistics.median(ratios), "draft_share": statistics.median(shares)}


# -- what is written -------------------------------------------------------------------------------------------------
def evidence() -> tuple[dict[str, Any], dict[str, Any]]:
    """(what ships, the record of how it came about)."""
    known = outcomes()
    files = sorted({f"{name}.json" for name, *_ in (*STUDIES, *BENCHES)} | {f"{TARGETS}.json"})
    origin = {
        "script": "benchmarks/forecast.py",
        "method": f"{METHOD} from {START}",
        "results": {name: hashlib.sha256((RESULTS / name).read_bytes()).hexdigest() for name in files},
        "targets": [one.name for one in known],
    }
    fits = [calibrated(known, *choice) for choice in SHIPPED]
    ships = {"schema": SCHEMA, "families": ["eagle3"], "fits": [asdict(fit) for fit in fits]}
    ships |= {**costs(), "trial_passes": PASSES, "provenance": origin}
    record = {
        "schema": f"{SCHEMA}-record",
        "provenance": origin,
        "targets": [row(one) for one in known],
        "tried": [attempt(known, *choice) for choice in TRIED if enough(known, *choice)],
        "shipped": [asdict(fit) for fit in fits],
    }
    return ships, record


def row(one: Known) -> dict[str, Any]:
    """One target's observations and outcome."""
    seen = one.seen
    figures = {"tau": seen.tau, "reference_tau": seen.reference_tau, "trial_tau": seen.trial_tau}
    return {"name": one.name, "gamma": seen.gamma, **figures, "aligned_tau": one.aligned_tau, "step": one.step}


def enough(known: list[Known], names: tuple[str, ...], guards: tuple[str, ...]) -> bool:
    """Whether a fit without one target has a degree of freedom."""
    return len(usable(known, (*names, *guards))) >= len(names) + 3


def attempt(known: list[Known], names: tuple[str, ...], guards: tuple[str, ...]) -> dict[str, Any]:
    """One choice of observations, left out in turn; ``held`` before and after the intervals were widened."""
    fit, table = calibrated(known, names, guards), leave_one_out(known, names, guards)
    by_name = {one.name: one for one in known}
    for entry in table:
        seen = by_name[entry["name"]].seen
        ends = {"value": 0.0, "low": -entry["half"] * fit.widened, "high": entry["half"] * fit.widened}
        entry["forecast"] = {
            end: stepped(seen.tau, seen.gamma, math.exp(entry["predicted"] + by)) for end, by in ends.items()
        }
        entry["aligned_tau"] = by_name[entry["name"]].aligned_tau
    errors = [entry["log_step"] - entry["predicted"] for entry in table]
    return {
        "observations": list(names),
        "guards": list(guards),
        "targets": fit.targets,
        "error": math.sqrt(statistics.fmean(e * e for e in errors)),
        "held_unwidened": sum(abs(e) <= entry["half"] for e, entry in zip(errors, table, strict=True)),
        "widened": fit.widened,
        "held": fit.held,
        "left_out": table,
    }


def table(record: dict[str, Any]) -> str:
    """The leave-one-out table of the fits that ship, as Markdown."""
    tried = {tuple(entry["observations"]): entry for entry in record["tried"]}
    columns = [tried[tuple(fit["observations"])] for fit in record["shipped"]]
    heads = ["forecast with the base pair", "forecast without"]
    lines = [
        f"| target | tau before | base pair | {' | '.join(heads)} | tau after |",
        f"| --- | ---: | ---: |{' ---: |' * (len(heads) + 1)}",
    ]
    for target in record["targets"]:
        cells = []
        for column in columns:
            found = next((entry for entry in column["left_out"] if entry["name"] == target["name"]), None)
            cells.append(shown(found))
        reference = f"{target['reference_tau']:.2f}" if target["reference_tau"] else "\N{EN DASH}"
        before, after = f"{target['tau']:.2f}", f"{target['aligned_tau']:.2f}"
        lines.append(f"| {target['name']} | {before} | {reference} | {' | '.join(cells)} | {after} |")
    return "\n".join(lines)


def shown(entry: dict[str, Any] | None) -> str:
    """A forecast with its interval; marked where the outcome lies outside."""
    if entry is None:
        return "\N{EN DASH}"
    found = entry["forecast"]
    missed = "" if found["low"] <= entry["aligned_tau"] <= found["high"] else " (missed)"
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]{missed}"


def main() -> None:
    ships, record = evidence()
    atomic_write_json(ASSET, ships)
    atomic_write_json(RESULTS / "forecast.json", record)
    for entry in record["tried"]:
        names = ", ".join(entry["observations"]) or "a constant"
        print(
            f"{names}: {entry['targets']} targets, error {entry['error']:.2f}, held {entry['held_unwidened']}, "
            f"widened {entry['widened']:.2f} times {entry['held']}"
        )
    print(table(record))


if __name__ == "__main__":
    main()
