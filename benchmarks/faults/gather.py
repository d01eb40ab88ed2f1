"""What the fault harnesses found, in one result file: the counts of each, added up.

    python benchmarks/faults/gather.py

reads ``faults-inputs.json``, ``mutations.json``, ``faults-damage.json`` (files with something wrong in them),
``faults-kills.json``, ``faults-server.json``, ``faults-draws.json`` and ``faults-checks.json`` beside it in
``benchmarks/results``, and writes ``faults.json`` there. What has not been measured is left out and named.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from redraft.files import atomic_write_json
from redraft.inputs import read_json

SCHEMA = "redraft.faults/1"
RESULTS = Path(__file__).resolve().parents[1] / "results"


def mutations(inputs: dict[str, Any], drafts: dict[str, Any], damage: dict[str, Any]) -> dict[str, Any]:
    """Files with one thing wrong: of every reader, of drafts of all trainers and formats, of run directories."""
    right = ("clear", "same", "as_written")
    faults = ("tracebacks", "hangs", "silent", "half", "unnamed")
    parts = {
        "inputs": {name: inputs[name] for name in ("tried", *right, *faults)},
        "drafts": {
            "tried": drafts["tried"],
            "clear": drafts["refused"],
            "same": drafts["same"],
            "as_written": drafts["other"],
            "tracebacks": drafts["tracebacks"],
            "hangs": drafts["late"],
            "silent": drafts["wrong_in_silence"],
            "half": 0,
            "unnamed": drafts["unnamed"],
        },
        "damage": {
            "tried": damage["tried"],
            "clear": damage["verdicts"].get("clear", 0),
            "same": damage["verdicts"].get("same", 0),
            "as_written": damage["verdicts"].get("told", 0),
            "tracebacks": damage["tracebacks"],
            "hangs": damage["hangs"],
            "silent": damage["silent"],
            "half": 0,
            "unnamed": damage["unnamed"],
        },
    }
    return {name: sum(part[name] for part in parts.values()) for name in ("tried", *right, *faults)} | {"by": parts}


def gathered(folder: Path) -> dict[str, Any]:
    """The whole result. Raises ``UserError`` for a file that is no result."""
    names = ("inputs", "damage", "kills", "server", "draws", "checks")
    found = {name: read_json(folder / f"faults-{name}.json") for name in names if _there(folder, f"faults-{name}.json")}
    drafts = read_json(folder / "mutations.json")
    result: dict[str, Any] = {"schema": SCHEMA, "missing": [name for name in names if name not in found]}
    if {"inputs", "damage"} <= found.keys():
        result["mutations"] = mutations(found["inputs"], drafts, found["damage"])
    if "kills" in found:
        kinds = ("tried", "different", "lost", "doubled", "untold", "by")
        result["kills"] = {name: found["kills"][name] for name in kinds}
    if "server" in found:
        kinds = ("kinds", "runs", "odd_answers", "ended", "bad_rows", "tracebacks", "hangs")
        result["server"] = {name: found["server"][name] for name in kinds}
    if "draws" in found:
        told = ("decoder", "sampler", "draft", "draws", "test", "p")
        result["draws"] = [{name: one[name] for name in told} for one in found["draws"]["draws"]]
        result["least_p_corrected"] = found["draws"]["least_p_corrected"]
    if "checks" in found:
        result["checks"] = {name: found["checks"][name] for name in ("ratio", "seconds_a_gibibyte")}
    return result


def _there(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = gathered(options.results)
    atomic_write_json(options.results / "faults.json", result)
    print(json.dumps({name: part for name, part in result.items() if name != "draws"}, indent=1)[:3000])
    if result["missing"]:
        print(f"not measured: {', '.join(result['missing'])}")


if __name__ == "__main__":
    main()
