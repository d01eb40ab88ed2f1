"""How few bits does a change need? tau of fully trained drafts whose change is told in 1 to 8 bits a weight.

The drafts are those that a study kept (``keep_drafts: true``), measured on its own answers by its own walks, so that
the figures stand beside its tables. Nothing is trained here.

    REDRAFT_DATA=folder python benchmarks/bits.py --config runs/studies/medical.yaml --study out/medical \
        --method full-1e-3 --beside lora --out benchmarks/results/bits-medical.json
    python benchmarks/bits.py --tables benchmarks/results/bits-medical.json

Seeds are pooled prompt by prompt, intervals are over prompts, paired; recovery is held against the same draft whole.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.adaptation.runs import half
from redraft.adaptation.study.cells import measure, private_bytes
from redraft.adaptation.study.run import StudyRun
from redraft.artifact import atomic_write_json, read_json
from redraft.drafts.files import load_draft
from redraft.drafts.groups import trainable_names
from redraft.drafts.scaling import coarse_change
from redraft.errors import UserError
from redraft.evaluate.statistics import paired_ratio, paired_recovery, ratio_of_sums
from redraft.progress import progress_bar
from redraft.reports.format import DASH
from redraft.reports.study import ranged
from redraft.reports.study import table as markdown
from redraft.settings.studies import Cell, read_study

STALE, WHOLE = "stale", "whole"
INSIDE, OUTSIDE = ("greedy", "sampled"), "general"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="the study's settings")
    parser.add_argument("--study", type=Path, help="its folder, with kept drafts")
    parser.add_argument("--target", help="one of its targets; needed where there are several")
    parser.add_argument("--method", default="full", help="the name, in the study, of what was trained in full")
    parser.add_argument("--beside", help="another method of the study whose figures are put beside")
    parser.add_argument("--bits", default="1,2,3,4,8")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tables", type=Path, help="print the table of a result file, and nothing else")
    options = parser.parse_args()
    if not (options.tables or (options.config and options.study and options.out)):
        parser.error("give --config, --study and --out, or --tables RESULT")
    return options


def cells_of(run: StudyRun, target: str, name: str) -> list[Cell]:
    """The cells of a method on all of the first data, from a refreshed vocabulary, that have a record."""
    first = next(iter(run.config.data))
    found = [
        cell
        for cell in run.cells
        if (cell.target, cell.method, cell.data, cell.selection) == (target, name, first, "none")
        and cell.start == "vocabulary"
        and run.record_path(cell).exists()
    ]
    if not found:
        raise UserError(f"the study has no finished cell of {name} on all of {first}")
    return found


def summed(parts: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Rounds of every prompt, added up over seeds."""
    return {name: [math.fsum(some) for some in zip(*(part[name] for part in parts), strict=True)] for name in parts[0]}


def result_of(options: argparse.Namespace) -> dict[str, Any]:
    """The whole result. Raises ``UserError``."""
    config = read_study(options.config)
    run = StudyRun(config, options.study)
    target = options.target or next(iter(config.targets))
    work = run.work(target)
    asked = cells_of(run, target, options.method)
    cells = [cell for cell in asked if (run.record_path(cell).parent / "draft").is_dir()]
    if not cells:
        raise UserError(f"the study kept no draft of {options.method}; run it with keep_drafts: true")
    old = half(work.opened("none").draft)
    names = trainable_names(old, "full")
    bits = [int(text) for text in options.bits.split(",")]
    rows: dict[str, list[dict[str, Any]]] = {WHOLE: [], **{str(b): [] for b in bits}}
    with progress_bar("measure", len(cells) * (len(bits) + 1), "drafts") as bar:
        for cell in cells:
            draft = load_draft(run.record_path(cell).parent / "draft")[0].float()
            rows[WHOLE].append({"rounds": measure(work, draft), "bytes": private_bytes(half(draft), old, names, {})})
            for b in bits:
                bar.update(sum(map(len, rows.values())), now=f"{cell.key} in {b} bits")
                rounded, parts = coarse_change(draft, old, names, b)
                size = private_bytes(rounded, old, names, parts)
                rows[str(b)].append({"rounds": measure(work, rounded), "bytes": size})
    beside = (
        [read_json(run.record_path(cell)) for cell in cells_of(run, target, options.beside)] if options.beside else []
    )
    stale = read_json(run.record_path(Cell(target, "none", "-", "-", "-", "none", 0)))
    sets = {name: found.to_dict() for name, found in work.sets.items()}
    return {
        "schema": "redraft.bits/1",
        "provenance": provenance.collect(seed=config.seed, device=config.device),
        "setup": {
            "study": config.name,
            "target": target,
            "method": options.method,
            "seeds": [cell.seed for cell in cells],
            "chain": f"chain of {config.gamma}",
            "beside": options.beside,
            "beside_seeds": [record["seed"] for record in beside],
        },
        "sets": sets,
        STALE: stale["rounds"],
        "cells": rows,
        "beside": [{"rounds": record["rounds"], "bytes": record["private_bytes"]} for record in beside],
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""

    def sums(parts: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
        tokens = [len(parts) * count for count in result["sets"][name]["tokens"]]
        return tokens, summed([part["rounds"] for part in parts])[name]

    stale, whole = [{"rounds": result[STALE]}], result["cells"][WHOLE]
    rows = {"the stale draft": stale, "whole, 16 bits": whole}
    rows |= {f"{bits} bits": parts for bits, parts in result["cells"].items() if bits != WHOLE}
    if result["beside"]:
        rows[f"`{result['setup']['beside']}`"] = result["beside"]
    head = ["change", "file", "tau greedy", "recovery", "tau sampled", "recovery", "elsewhere"]
    lines = []
    for label, parts in rows.items():
        cells = [label, f"{parts[0]['bytes'] / 1e6:.1f} MB" if "bytes" in parts[0] else DASH]
        for name in INSIDE:
            cells.append(ranged(ratio_of_sums(*sums(parts, name)).to_dict(), "{:.2f}".format))
            found = paired_recovery(sums(parts, name), sums(stale, name), sums(whole, name))
            cells.append(
                DASH if parts is stale else "100%" if parts is whole else ranged(found.to_dict(), "{:.0%}".format)
            )
        if OUTSIDE in result["sets"] and parts is not stale:
            ratio = paired_ratio(sums(parts, OUTSIDE), sums(stale, OUTSIDE))
            cells.append(ranged(ratio.to_dict(), _change))
        else:
            cells.append(DASH)
        lines.append(cells)
    return markdown(head, lines)


def _change(ratio: float | None) -> str:
    return DASH if ratio is None else f"{ratio - 1:+.1%}"


def main() -> None:
    options = arguments()
    if options.tables:
        print(table(read_json(options.tables)))
        return
    result = result_of(options)
    atomic_write_json(options.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
