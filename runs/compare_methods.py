"""Every method from the same draft on the same data and budget: acceptance on the evaluation prompts, and recovery.

Takes the run directory of a quickstart (its responses, selection and features) and trains each method in a folder
of its own. Acceptance is that of a greedy chain, walked over the target's stored greedy answers to the evaluation
prompts (equal to decoding, see docs/metrics.md). Writes one result file.

    python runs/compare_methods.py --quickstart out/quickstart \
        --out benchmarks/results/quickstart-methods.json --full src/redraft/assets/quickstart-full.json
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from redraft import provenance
from redraft.artifact import atomic_write_json
from redraft.data.store import read_rows
from redraft.drafts.groups import METHODS, prepare, trained_parameters
from redraft.evaluate.speed import tau_interval
from redraft.evaluate.statistics import paired_difference, paired_recovery
from redraft.pipeline.adapt import AdaptRun
from redraft.pipeline.models import template_prompts
from redraft.pipeline.probe import greedy_rows
from redraft.pipeline.quickstart import quickstart_config
from redraft.teacher.features import anchors
from redraft.teacher.simulate import simulate_greedy_chain
from redraft.train.loop import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, required=True, help="the quickstart's output folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--full", type=Path, help="where the quickstart looks up what `full` reached")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0")
    options = parser.parse_args()

    run = AdaptRun(quickstart_config(options.quickstart))
    stale = run.stale.draft
    asked = template_prompts(run.prompts[2], run.target, run.config.bench_tokens)
    measured = greedy_rows(run.target, asked, run.config.bench_tokens)
    rows = run.select().apply([r for r in read_rows(run.folder / "responses.jsonl") if anchors(r)])
    heldout = [r for r in read_rows(run.folder / "heldout.jsonl") if anchors(r)]
    for name, part in (("features", rows), ("features held-out", heldout), ("features evaluation", measured)):
        run.features(name, part)

    found: dict[str, dict] = {}
    rounds: dict[str, dict[str, list[int]]] = {}
    for name in options.methods.split(","):
        for seed in [int(s) for s in options.seeds.split(",")]:
            config = type(run.config.train_config())(**{**vars(run.config.train_config()), "seed": seed})
            draft, names = prepare(copy.deepcopy(stale), name, run.config.private_size, seed)
            record = {"method": name, "seed": seed, "trained_parameters": trained_parameters(draft, name)}
            if names:
                folder = run.folder / "methods" / f"{name}-{seed}"
                result = Trainer(draft, run.target, run.store, rows, heldout, config, folder).run()
                record |= {"seconds": result.seconds, "steps": result.steps, "heldout": result.history}
            key = f"{name}/{seed}"
            rounds[key] = simulate_greedy_chain(draft, run.target, measured, run.store, config.gamma)
            record["tau"] = tau_interval(rounds[key], {r.key: anchors(r) for r in measured})
            found[key] = record
            print(f"{key:12} tau {record['tau']['value']:.3f}", flush=True)
    keys = [r.key for r in measured]

    def sums(name: str) -> tuple[list[int], list[int]]:
        return [anchors(r) for r in measured], [len(rounds[name][key]) for key in keys]

    for name, record in found.items():
        seed = name.rsplit("/", 1)[1]
        if f"none/{seed}" in rounds:
            record["gain_over_stale"] = paired_difference(sums(name), sums(f"none/{seed}")).to_dict()
        if f"none/{seed}" in rounds and f"full/{seed}" in rounds:
            parts = sums(name), sums(f"none/{seed}"), sums(f"full/{seed}")
            record["recovery"] = paired_recovery(*parts).to_dict()
            record["trained_fraction_of_full"] = record["trained_parameters"] / trained_parameters(stale, "full")
    atomic_write_json(
        options.out,
        {
            "schema": "redraft.methods/1",
            "sampler": f"greedy, chain of {run.config.gamma}, walked over stored answers",
            "evaluation_prompts": len(measured),
            "training_rows": len(rows),
            "training_tokens": sum(map(anchors, rows)),
            "methods": found,
            "provenance": provenance.collect(seed=0, device=run.config.device),
        },
    )
    if options.full and "full/0" in found:
        atomic_write_json(
            options.full,
            {
                "tau": found["full/0"]["tau"]["value"],
                "from": "the committed run of the same data, benchmarks/results/quickstart-methods.json",
            },
        )


if __name__ == "__main__":
    main()
