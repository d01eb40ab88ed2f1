"""How much of what a draft learned should go in? tau inside and outside the domain by the scale of its change.

One private part, trained once, is put in at several scales (``redraft merge --scale``). The target answers prompts of
its domain and general ones greedily; the chain is walked over these answers, exactly, for every scale. "Gain" is the
paired difference from the stale draft inside the domain, "elsewhere" the paired ratio to it on the general answers.
No answer is trained on, and nothing is trained here.

    REDRAFT_DATA=folder python benchmarks/scales.py --out benchmarks/results/scales.json
    python benchmarks/scales.py --tables benchmarks/results/scales.json

``--domain`` and ``--general`` name sources as studies do (docs/studies/README.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.acceptance.simulate import simulate_greedy_chain
from redraft.adaptation.models import open_draft, open_target
from redraft.adaptation.runs import Log, supervised_rows
from redraft.adaptation.sources import answer
from redraft.adaptation.study.targets import first_turn, read_source
from redraft.artifact import atomic_write_json, read_json
from redraft.data.prompts import Conversation
from redraft.data.regenerate import InProcessEngine
from redraft.data.store import Row
from redraft.drafts.base import Draft
from redraft.drafts.scaling import scale_change
from redraft.evaluate.statistics import paired_difference, paired_ratio, ratio_of_sums
from redraft.features import FeatureStore
from redraft.progress import progress_bar
from redraft.provenance import Ledger
from redraft.rows import anchors
from redraft.settings.sampler import Sampler
from redraft.target import Target

Rounds = dict[str, list[int]]  # by set, in the order of its prompts
STALE = "stale"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="src/redraft/assets/maths-lora")
    parser.add_argument("--draft", default="src/redraft/assets/general-draft", help="the stale draft")
    parser.add_argument("--private", default="src/redraft/assets/maths-private", help="what was trained on it")
    parser.add_argument("--domain", default="maths:2@24")
    parser.add_argument(
        "--general", default="data:general/alpaca_9k.test.jsonl.gz@16,data:general/dolly_3k.test.jsonl.gz@16"
    )
    parser.add_argument("--longest", type=int, default=800, help="characters of the longest general prompt")
    parser.add_argument("--scales", default="0,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1,1.1")
    parser.add_argument("--tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--gamma", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", type=Path, default=Path("out/scales"), help="folder for the target's answers")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tables", type=Path, help="print the table of a result file, and nothing else")
    options = parser.parse_args()
    if not (options.tables or options.out):
        parser.error("give --out, or --tables RESULT")
    return options


def own_answers(target: Target, prompts: list[Conversation], path: Path, most: int) -> list[Row]:
    """The target's greedy answers to these prompts, made once, in the file ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answer(path.stem, InProcessEngine(target), target, prompts, [Sampler()], path, most, 0, Log(Ledger()))
    return sorted(supervised_rows(path), key=lambda row: row.key)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The whole result."""
    target = open_target(options.target, options.dtype, options.device)
    stale, trained = (
        open_draft(name, target, base).draft.to(target.device).float()
        for name, base in ((options.draft, None), (options.private, options.draft))
    )
    target.tap(stale.config.taps)
    general = [c for name in options.general.split(",") for c in read_source(name, options.longest)]
    prompts = {"domain": read_source(options.domain), "general": general}
    sets = {
        name: own_answers(target, [first_turn(c) for c in found], options.work / f"{name}.jsonl", options.tokens)
        for name, found in prompts.items()
    }
    identity = {"target": target.content_hash(), "taps": list(target.taps)}
    store = FeatureStore(options.work / "features", identity)
    store.build(target, [row for rows in sets.values() for row in rows])

    def rounds(draft: Draft) -> Rounds:
        """Target calls per prompt."""
        walked = {k: simulate_greedy_chain(draft, target, rows, store, options.gamma) for k, rows in sets.items()}
        return {name: [len(walked[name][row.key]) for row in rows] for name, rows in sets.items()}

    cells = [{"scale": STALE, "rounds": rounds(stale)}]
    scales = [float(text) for text in options.scales.split(",")]
    with progress_bar("walk", len(scales), "scales") as progress:
        for scale in scales:
            cells.append({"scale": scale, "rounds": rounds(scale_change(trained, stale, scale).merged())})
            progress.update(len(cells) - 1)
    return {
        "schema": "redraft.scales/1",
        "provenance": provenance.collect(seed=0, device=options.device),
        "setup": {
            **{name: getattr(options, name) for name in ("target", "draft", "private", "domain", "general", "dtype")},
            "sampler": f"greedy, chain of {options.gamma}",
            "walk": "exact, over stored answers of the target",
        },
        "tokens": {name: [anchors(row) for row in rows] for name, rows in sets.items()},
        "cells": cells,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    cells = result["cells"]

    def sums(cell: dict[str, Any], name: str) -> tuple[list[int], list[int]]:
        """Tokens and rounds of every prompt of a set."""
        return result["tokens"][name], cell["rounds"][name]

    lines = [
        "| scale | tau in the domain | gain over stale | tau elsewhere | change elsewhere |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for cell in cells:
        inside, outside = (ratio_of_sums(*sums(cell, name)) for name in ("domain", "general"))
        change = gain = "–"
        if cell["scale"] != STALE:
            found = paired_difference(sums(cell, "domain"), sums(cells[0], "domain"))
            gain = f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
            ratio = paired_ratio(sums(cell, "general"), sums(cells[0], "general"))
            change = f"{ratio.value - 1:+.1%} [{ratio.low - 1:+.1%}, {ratio.high - 1:+.1%}]"
        lines.append(
            f"| {cell['scale']} | {inside.value:.2f} [{inside.low:.2f}, {inside.high:.2f}] | {gain} | "
            f"{outside.value:.2f} [{outside.low:.2f}, {outside.high:.2f}] | {change} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    if options.tables:
        print(table(read_json(options.tables)))
        return
    result = measure(options)
    atomic_write_json(options.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
