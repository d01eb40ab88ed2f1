"""Features from a serving engine against the target's own: how near, what a draft's tau is on both, and their price.

    python benchmarks/scale/states.py --target MODEL --draft DRAFT --responses run/heldout.jsonl \\
        --plain http://127.0.0.1:8000 --server http://127.0.0.1:8001 --states /dev/shm/states \\
        --out benchmarks/results/scale-states.json

Two servers of the target, of which one writes hidden states (``redraft adapt --states`` without one prints its command
line). The rows of ``--responses`` are answered again by both in turns, greedily, as long as they were: answers a second
with states over those without. Then their features are asked of the server and computed here, and the draft walks its
rounds over both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from redraft import provenance
from redraft.acceptance.simulate import simulate_greedy_chain, tau_of
from redraft.adaptation.models import open_draft
from redraft.data.generate import Request
from redraft.data.server import ServerEngine
from redraft.data.states import ServedFeatures, StateFolder, StatesEngine
from redraft.data.store import Failure, Row, read_rows
from redraft.features import ComputedFeatures
from redraft.files import atomic_write_json
from redraft.loading import load_target
from redraft.rows import anchors
from redraft.settings.sampler import Sampler


class Kept(dict[str, tuple[torch.Tensor, torch.Tensor]]):
    """Features by the key of their row."""

    def get(self, row: Any) -> Any:  # type: ignore[override]
        return self[row.key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("target", "draft", "plain", "server"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--responses", type=Path, required=True)
    parser.add_argument("--states", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--gamma", type=int, default=5)
    parser.add_argument("--dtype", default="float32", help="what both servers compute in, and this process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    target = load_target(options.target, getattr(torch, options.dtype))
    draft = open_draft(options.draft, target).draft.eval().bind(target)
    target.tap(draft.taps)
    rows = [row for row in read_rows(options.responses) if anchors(row)][: options.limit]
    folder = StateFolder(options.states, target.head_part, draft.taps)
    served = StatesEngine(options.server, folder, concurrency=options.concurrency, vocab_size=target.vocab_size)
    plain = ServerEngine(options.plain, concurrency=options.concurrency, vocab_size=target.vocab_size)
    rates = []
    for number in range(options.repeats + 1):
        order = [("plain", plain), ("states", served)][:: -1 if number % 2 else 1]
        found = {name: rate(engine, target, rows, name == "states") for name, engine in order}
        if number:  # the first turn warms both up
            rates.append(found)
            print(found, flush=True)
    theirs = Kept({one.row.key: one[1:] for batch in ServedFeatures(served).batches(rows) for one in batch})
    ours = Kept({row.key: ComputedFeatures(target).get(row) for row in rows})
    taus = {
        name: tau_of(simulate_greedy_chain(draft, target, rows, source, options.gamma), rows)  # type: ignore[arg-type]
        for name, source in (("server", theirs), ("own", ours))
    }
    shares = [pair["states"] / pair["plain"] for pair in rates]
    result = {
        "schema": "redraft.states/1",
        "rows": len(rows),
        "tokens": sum(len(row.response_ids) for row in rows),
        "dtype": options.dtype,
        "distance": max(distance(theirs[row.key], ours[row.key]) for row in rows),
        "tau": taus,
        "tau_difference": abs(taus["server"] - taus["own"]),
        "rates": rates,
        "rate_share": {"median": statistics.median(shares), "range": [min(shares), max(shares)]},
        "provenance": provenance.collect(0, "cpu"),
    }
    print({key: result[key] for key in ("distance", "tau", "rate_share")})
    if options.out is not None:
        atomic_write_json(options.out, result)


def rate(engine: Any, target: Any, rows: list[Row], features: bool) -> float:
    """Tokens a second of answers as long as the stored ones at most."""
    requests = [Request(row.key, list(row.prompt_ids), Sampler(), 0) for row in rows]
    longest, tokens, began = max(len(row.response_ids) for row in rows), 0, time.monotonic()
    for found in engine.answer(requests, longest, target.tokenizer, target.eos_ids, features=features):
        if isinstance(found, Failure):
            raise SystemExit(f"{found.key}: {found.reason}")
        tokens += len(found.response_ids)
    return tokens / (time.monotonic() - began)


def distance(theirs: Any, ours: Any) -> float:
    """The larger distance of taps and final states over their norms."""
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(theirs, ours, strict=True))


if __name__ == "__main__":
    main()
