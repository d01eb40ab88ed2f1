"""How many planted faults `redraft check` names, and whether it is silent where there is none.

    python benchmarks/causes.py
    python benchmarks/causes.py "window read as none"

plants every fault of tests/unit/check_rig.py (drafts as somebody wrote them, servers of a good draft) on four sets of
prompts, and writes benchmarks/results/causes.json: "planted" and "named" count faults and controls alike, "rows" says
of each what was planted and what was named. With names of faults those alone are planted anew, and the other rows
stay; "planted_later" says so. The pair is the trained tiny one of tests/artifacts/check; minutes on one core.
"""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import redraft
from redraft import provenance
from redraft.artifact import atomic_write_json, read_json
from redraft.progress import progress_bar

SCHEMA = "redraft.causes/1"
ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "causes.json"
# The prompts of the tests, a set that two rules were mended after, and two sets that nothing was chosen on.
SEEDS = (11, 21, 31, 41)

Case = tuple[str, str, str | None, Callable[[Path], Any]]


def cases(rig: Any, prompts: Path) -> Iterator[Case]:
    """(side, what is planted, its cause or none, the check of it in a folder of its own)."""

    def check(draft: Any, **more: Any) -> Any:
        given = {"prompts": prompts, "limit": rig.PROMPTS, "max_new_tokens": rig.TOKENS, "gamma": rig.GAMMA}
        quiet = io.StringIO()
        with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
            return redraft.check(draft, rig.model("target"), **(given | more))

    def of_file(one: Any) -> Callable[[Path], Any]:
        def run(folder: Path) -> Any:
            asked = {"prompts": rig.other_prompts(folder / "other.jsonl")} if one.other else {}
            return check(one.write(folder / "draft"), **one.more, **asked)

        return run

    def of_engine(name: str) -> Callable[[Path], Any]:
        def run(folder: Path) -> Any:
            _, draft, fault = rig.served(name, folder / "draft")
            engine = rig.Engine(**fault)
            try:
                return check(draft, server=engine.url)
            finally:
                engine.stop()

        return run

    for name, one in rig.FILES.items():
        yield "file", name, one.cause, of_file(one)
    for name, (cause, _) in rig.ENGINES.items():
        yield "server", name, cause, of_engine(name)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    rig = SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "unit" / "check_rig.py")))
    maker = SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "artifacts" / "make_check.py")))
    rows: list[dict[str, Any]] = []
    total = len(SEEDS) * (len(names) or len(rig.FILES) + len(rig.ENGINES))
    with tempfile.TemporaryDirectory() as place, progress_bar("causes", total, "checks") as progress:
        for seed in SEEDS:
            prompts = Path(place) / f"{seed}.jsonl"
            maker.write_prompts(prompts, rig.PROMPTS, seed)
            for side, name, cause, run in cases(rig, prompts):
                if names and name not in names:
                    continue
                folder = Path(place) / f"{seed}-{len(rows)}"
                folder.mkdir()
                found = run(folder)
                row = {"seed": seed, "side": side, "planted": name, "cause": cause, "named": found.cause}
                rows.append(row | {"others": [one.cause for one in found.findings[1:]]})
                progress.update(len(rows), now=name)
    kept = [row for row in read_json(RESULT)["rows"] if row["planted"] not in names] if names else []
    rows = sorted([*kept, *rows], key=lambda row: row["seed"])
    named = [row["named"] == row["cause"] for row in rows]
    result = {
        "schema": SCHEMA,
        "planted": len(rows),
        "named": sum(named),
        "controls": sum(row["cause"] is None for row in rows),
        "causes": len({row["cause"] for row in rows} - {None}),
        "rows": rows,
        "provenance": provenance.collect(0, "cpu", {}) if not names else read_json(RESULT)["provenance"],
    }
    if names:
        result["planted_later"] = {"names": names, "provenance": provenance.collect(0, "cpu", {})}
    atomic_write_json(RESULT, result)
    print(f"{sum(named)} of {len(rows)} named; {RESULT}")
    for row in (row for row, right in zip(rows, named, strict=True) if not right):
        print(row)


if __name__ == "__main__":
    main(sys.argv[1:])
