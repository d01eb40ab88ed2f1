"""Tables and pictures of a study, from its results file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redraft.artifact import atomic_write_bytes, atomic_write_json, atomic_write_text, read_json
from redraft.errors import UserError
from redraft.evaluate.study import AXES, FULL, derive, registered
from redraft.reports.study import markdown
from redraft.reports.study_plots import pictures

TABLES_FILE = "tables.md"


def write_tables(results: Path, out: Path | None = None) -> Path:
    """Work the figures out of the raw results and write ``tables.md`` and the pictures to ``out``.

    ``out`` is by default the folder of the results. Returns the path of the tables. Raises ``UserError``.
    """
    found = read_json(results)
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
