"""What the starts without a gradient (ridge, delta, vocabulary) are worth on a real pair of targets.

Each start works on a few responses of the fine-tuned target. Then the greedy chain is walked over *other* responses,
before and after: tau with its interval, the paired difference from the stale draft, seconds and forward FLOPs. For
``ridge`` the whole path of strengths is walked too, from the old ``fc`` to the plain least squares, so that one sees
whether the strength that the features like best is the one that acceptance likes best. Responses of the base target
on general text, where given, say what a refreshed vocabulary loses there.

    python benchmarks/starts.py --responses out/quickstart/run/responses.jsonl \
        --heldout out/quickstart/run/heldout.jsonl --out benchmarks/results/starts.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.acceptance.simulate import simulate_greedy_chain
from redraft.adaptation.models import open_draft, open_target
from redraft.artifact import atomic_write_json
from redraft.attic.ridge import moments, resolved
from redraft.data.store import Row, read_rows
from redraft.drafts.base import Draft
from redraft.errors import UserError
from redraft.evaluate.speed import tau_interval
from redraft.evaluate.statistics import paired_difference
from redraft.features import FeatureStore
from redraft.rows import anchors
from redraft.starts.apply import StartContext, apply_start
from redraft.starts.leastsquares import RATIOS
from redraft.starts.vocabulary import coverage

Rounds = dict[str, list[int]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="src/redraft/assets/maths-lora")
    parser.add_argument("--base-target", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--draft", default="src/redraft/assets/general-draft")
    parser.add_argument("--responses", type=Path, required=True, help="greedy responses of the fine-tuned target")
    parser.add_argument(
        "--heldout", type=Path, help="greedy responses to measure on, beside what is left of the others"
    )
    parser.add_argument("--general", type=Path, help="responses of the base target to general prompts")
    parser.add_argument("--count", type=int, default=60, help="responses that the starts may use")
    parser.add_argument("--measured", type=int, default=100, help="responses to measure on")
    parser.add_argument("--starts", default="none,ridge,delta,vocabulary,vocabulary+ridge")
    parser.add_argument("--gamma", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--features", type=Path, help="folder of stored features (default: a temporary one)")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


class Bench:
    """The pair of targets, the stale draft, what starts may use and what is measured on."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options = options
        self.target = open_target(options.target, options.dtype, options.device)
        self.base = open_target(options.base_target, options.dtype, options.device)
        self.stale = open_draft(options.draft, self.target).draft.to(self.target.device)
        self.target.tap(self.stale.config.taps)
        rows = sorted(usable(options.responses), key=lambda row: row.key)
        self.used, rest = rows[: options.count], rows[options.count :]
        self.measured = [*(usable(options.heldout) if options.heldout else []), *rest][: options.measured]
        if not self.measured or {row.id for row in self.used} & {row.id for row in self.measured}:
            raise UserError("no responses are left to measure on, or some are used by the starts too; give others")
        self.general = usable(options.general) if options.general else []
        identity = {"target": self.target.content_hash(), "taps": list(self.target.taps)}
        self.store = FeatureStore(options.features or scratch, identity)
        self.store.build(self.target, self.measured)

    def rounds(self, draft: Draft) -> Rounds:
        """Accepted tokens of every round over the measured responses."""
        return simulate_greedy_chain(draft, self.target, self.measured, self.store, self.options.gamma)

    def context(self) -> StartContext:
        return StartContext(self.target, self.base, self.used, self.general, self.options.gamma)

    def record(self, rounds: Rounds, stale: Rounds) -> dict[str, Any]:
        """tau, and the gain over the stale draft on the same responses."""
        tokens = {row.key: anchors(row) for row in self.measured}
        keys = list(tokens)
        sums = [([tokens[k] for k in keys], [len(found[k]) for k in keys]) for found in (rounds, stale)]
        return {"tau": tau_interval(rounds, self.measured), "gain_over_stale": paired_difference(*sums).to_dict()}


def usable(path: Path) -> list[Row]:
    """Greedy rows that a draft is asked for. Raises ``UserError`` where there are others."""
    rows = [row for row in read_rows(path) if anchors(row)]
    if any(row.temperature for row in rows):
        raise UserError(f"{path} holds sampled responses; the greedy walk needs greedy ones")
    return rows


def measure(bench: Bench, names: Sequence[str]) -> dict[str, Any]:
    """Every start by itself, measured."""
    stale = bench.rounds(bench.stale)
    found = {}
    for name in names:
        began = time.monotonic()
        result = apply_start(name, bench.stale, bench.context())
        seconds = time.monotonic() - began
        entry = bench.record(bench.rounds(result.draft), stale)
        entry |= {"seconds": seconds, "tokens": result.tokens, "flops": result.flops}
        entry |= {"notes": list(result.notes), "details": result.details}
        if "vocabulary" in name and bench.general:
            shares = [coverage(draft, bench.general).share for draft in (bench.stale, result.draft)]
            entry["general_coverage"] = dict(zip(("before", "after"), shares, strict=True))
        found[name] = entry
        print(f"{name:18} tau {entry['tau']['value']:.3f} in {seconds:.0f} s; {'; '.join(result.notes)}", flush=True)
    return found


def strengths(bench: Bench) -> list[dict[str, Any]]:
    """The path of ridge strengths: held-out error of the features beside tau."""
    stale = bench.rounds(bench.stale)
    train, heldout = moments(bench.stale, bench.target, bench.base, bench.used)
    whole, path = train + heldout, []
    for ratio in RATIOS:
        draft = resolved(bench.stale, whole.solve(ratio))
        entry = {"ratio": ratio, "heldout_error": heldout.error(train.solve(ratio))}
        path.append(entry | bench.record(bench.rounds(draft), stale))
        print(f"ridge {ratio:8g} error {entry['heldout_error']:.3f} tau {path[-1]['tau']['value']:.3f}", flush=True)
    return path


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="redraft-starts-") as scratch:
        bench = Bench(options, Path(scratch))
        names = options.starts.split(",")
        result = {
            "schema": "redraft.starts/1",
            "provenance": provenance.collect(0, options.device),
            "setup": {
                "target": options.target,
                "base_target": options.base_target,
                "draft": options.draft,
                "dtype": options.dtype,
                "sampler": f"greedy, chain of {options.gamma}, walked over stored answers",
                "responses_used": len(bench.used),
                "tokens_used": sum(map(anchors, bench.used)),
                "responses_measured": len(bench.measured),
                "tokens_measured": sum(map(anchors, bench.measured)),
            },
            "starts": measure(bench, names),
            "ridge_path": strengths(bench) if any("ridge" in name for name in names) else [],
        }
    atomic_write_json(options.out, result)


if __name__ == "__main__":
    main()
