"""TVD++ against its rivals on identical data: one pretrained drafter, aligned under each loss and seed, measured alike.

    REDRAFT_DATA=folder python runs/drafter_losses.py --run out/drafter/run --work out/losses --out result.json

``--run`` is a run of ``redraft distill``: its pretrained drafter, responses, text and alignment settings are taken, the
loss and the seed replaced. Measured is block efficiency (accepted tokens and one more, over target calls) on the
target's own answers to each task's test prompts, greedy and sampled, by the exact walks of
:mod:`redraft.acceptance.simulate`. A killed run goes on. ``--tables RESULT`` prints the tables of a result file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.acceptance.simulate import expected_rounds_sampled
from redraft.adaptation.distill import DistillRun
from redraft.adaptation.runs import Log, supervised_rows
from redraft.adaptation.sources import answer
from redraft.adaptation.study.targets import first_turn, read_source
from redraft.artifact import atomic_write_json, read_json
from redraft.data.overlap import trained_conversations, without_overlap
from redraft.data.regenerate import InProcessEngine
from redraft.data.store import Row
from redraft.decode.auto import Costs, measure_costs
from redraft.drafts.files import load_draft, save_draft
from redraft.drafts.standalone import StandaloneDraft
from redraft.evaluate.statistics import paired_difference, ratio_of_sums
from redraft.features import FeatureStore
from redraft.metrics import cost_by_bytes, mbsu
from redraft.progress import progress_bar
from redraft.provenance import Ledger
from redraft.rows import anchors
from redraft.settings.runs import DistillConfig
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape
from redraft.training.causal import distil

# What the drafter saw of its kind in training, and, last, what it did not.
TASKS = {
    "instructions": "data:general/dolly_3k.test.jsonl.gz@24",
    "summaries": "suite:spec-bench:summarization@12",
    "maths": "data:math/gsm8k.test.jsonl.gz@24",
    "translation": "suite:spec-bench:translation@24",
}
SAMPLERS = {"greedy": Sampler(), "sampled": Sampler(0.6, top_p=0.9)}
GAMMAS = (3, 5)
REFERENCE = "kl"
PRETRAINED = "pretrained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run directory of redraft distill")
    parser.add_argument("--work", type=Path, help="folder for the trained drafters and the tasks' answers")
    parser.add_argument("--losses", default="kl,tv,tvdpp")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, help="train on so many responses (default: all)")
    parser.add_argument("--tokens", type=int, default=96, help="longest answer that is measured on")
    parser.add_argument("--longest", type=int, default=3000, help="characters of the longest prompt")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tables", type=Path, help="print the tables of a result file, and nothing else")
    options = parser.parse_args()
    if options.tables:
        print(tables(read_json(options.tables)))
        return
    if not (options.run and options.work and options.out):
        parser.error("give --run, --work and --out, or --tables RESULT")
    kept = {name: v for name, v in read_json(options.run / "config.json").items() if name in DistillConfig.model_fields}
    run = DistillRun(DistillConfig(**kept, out=options.run))
    result = Comparison(run, options).result()
    atomic_write_json(options.out, result)
    print(tables(result))


class Comparison:
    """All cells over one run's data."""

    def __init__(self, run: DistillRun, options: argparse.Namespace) -> None:
        self.run, self.options, self.target = run, options, run.target
        self.prompts = {task: [first_turn(c) for c in read_source(TASKS[task], options.longest)] for task in TASKS}
        rows, self.heldout = run.responses()
        clean = self.clean(rows)
        self.rows, self.found, self.dropped = clean[: options.rows], len(rows), len(rows) - len(clean)
        self.sets = {(task, name): self.answers(task, name) for task in TASKS for name in SAMPLERS}
        self.states = {key: self.states_of(*key) for key in self.sets if not SAMPLERS[key[1]].greedy}

    def clean(self, rows: Sequence[Row]) -> list[Row]:
        """The responses in the order of their names, but for those to prompts that are, or nearly are, measured on."""
        measured = [conversation for part in self.prompts.values() for conversation in part]
        asked = list(trained_conversations(rows, self.target.tokenizer))
        kept = {conversation.id for conversation in without_overlap(asked, measured)}
        return sorted((row for row in rows if row.id in kept), key=lambda row: row.key)

    def answers(self, task: str, name: str) -> list[Row]:
        """The target's answers to a task's prompts, made once."""
        path, engine, log = self.options.work / f"{task}-{name}.jsonl", InProcessEngine(self.target), Log(Ledger())
        path.parent.mkdir(parents=True, exist_ok=True)
        sampled, most, seed = [SAMPLERS[name]], self.options.tokens, self.run.config.seed
        answer(path.stem, engine, self.target, self.prompts[task], sampled, path, most, seed, log)
        return sorted(supervised_rows(path), key=lambda row: row.key)

    def states_of(self, task: str, name: str) -> FeatureStore:
        """The target's final states of a set's answers, which are walked over again and again."""
        identity = {"target": self.target.content_hash(), "taps": []}
        store = FeatureStore(self.options.work / f"{task}-{name}-states", identity)
        store.build(self.target, self.sets[task, name])
        return store

    def cell(self, loss: str, seed: int) -> dict[str, Any]:
        """One alignment, measured. Finished cells are read."""
        folder = self.options.work / f"{loss}-{seed}"
        if (folder / "cell.json").exists():
            return read_json(folder / "cell.json")
        draft, _ = self.run.drafter()
        own = self.run.config.align_config()
        config = replace(own, loss=loss, seed=seed)
        # The run's own alignment is one of the cells, where it sees the same rows: it is not done twice.
        mine = config == own and len(self.rows) == self.found
        text = self.run.text(config.text_length) if config.text_share else None
        total = round(config.epochs * sum(map(anchors, self.rows)) / (1 - config.text_share))
        with progress_bar(f"{loss} {seed}", total) as progress:
            found = distil(
                draft.model,
                self.run.teacher(self.rows),
                self.rows,
                config,
                self.run.folder / "align" if mine else folder / "train",
                self.run.efficiency(draft, self.heldout),
                text,
                progress,
            )
        save_draft(folder / "draft", draft, self.run.meta("full"))
        cell = {"loss": loss, "seed": seed, **asdict(found), "rounds": self.rounds(draft)}
        atomic_write_json(folder / "cell.json", cell)
        return cell

    def rounds(self, draft: StandaloneDraft) -> dict[str, dict[str, dict[str, list[float]]]]:
        """Rounds per prompt, by task, sampler and gamma: counted for greedy, expected given the text for sampled."""
        found: dict[str, dict[str, dict[str, list[float]]]] = {}
        for (task, name), rows in self.sets.items():
            for gamma in GAMMAS:
                states = self.states.get((task, name))
                walked = expected_rounds_sampled(draft, self.target, rows, states, gamma, SAMPLERS[name])
                found.setdefault(task, {}).setdefault(name, {})[str(gamma)] = [walked[row.key] for row in rows]
        return found

    def result(self) -> dict[str, Any]:
        """The whole result: raw cells, and what the tables need besides."""
        losses, seeds = self.options.losses.split(","), [int(seed) for seed in self.options.seeds.split(",")]
        before = load_draft(self.options.run / "pretrained")[0].float().bind(self.target).to(self.target.device)
        cells = [{"loss": PRETRAINED, "seed": 0, "rounds": self.rounds(before)}]
        cells += [self.cell(loss, seed) for seed in seeds for loss in losses]
        costs = measure_costs(self.target, before.to(self.target.dtype), next(iter(self.sets.values()))[0].prompt_ids)
        sizes = before.parameters_per_token, self.target.parameters_per_token
        return {
            "schema": "redraft.drafter-losses/1",
            "provenance": provenance.collect(seed=seeds[0], device=self.run.config.device),
            "config": json.loads(self.run.config.model_dump_json(exclude={"out"})),
            "setup": {
                "samplers": {name: sampler.describe() for name, sampler in SAMPLERS.items()},
                "tasks": TASKS,
                "rows": len(self.rows),
                "dropped_as_overlap": self.dropped,
                "parameters_per_token": {"draft": sizes[0], "target": sizes[1]},
                "cost_by_bytes": cost_by_bytes(*sizes),
                "cost_by_time": draft_step(costs) / costs.plain,
                "costs": costs_as_json(costs),
            },
            "tokens": {
                task: {name: [anchors(row) for row in self.sets[task, name]] for name in SAMPLERS} for task in TASKS
            },
            "cells": cells,
        }


# -- tables ----------------------------------------------------------------------------------------------------------
def draft_step(costs: Costs) -> float:
    """Seconds of one more draft step: the slope between the shortest and the longest timed chain."""
    timed = {shape.gamma: cost.draft for shape, cost in costs.rounds.items() if isinstance(shape, ChainShape)}
    low, high = min(timed), max(timed)
    return (timed[high] - timed[low]) / (high - low)


def costs_as_json(costs: Costs) -> dict[str, Any]:
    """In seconds."""
    rounds = [{"shape": shape.describe()} | vars(cost) for shape, cost in costs.rounds.items()]
    return {"plain_step": costs.plain, "draft_step": draft_step(costs), "rounds": rounds}


def tables(result: dict[str, Any]) -> str:
    """Block efficiency by task and loss, pooled over seeds; the difference from ``REFERENCE`` where it was trained."""
    losses = list(dict.fromkeys(cell["loss"] for cell in result["cells"]))
    parts = []
    for name, words in result["setup"]["samplers"].items():
        for gamma in map(str, GAMMAS):
            parts.append(f"Block efficiency, {words}, gamma {gamma}:\n\n" + table(result, losses, name, gamma))
    return "\n\n".join([*parts, speeds(result, losses)])


def table(result: dict[str, Any], losses: Sequence[str], name: str, gamma: str) -> str:
    """A row a loss, a column a task."""
    tasks = list(result["tokens"])
    lines = [f"| loss | {' | '.join(tasks)} |", f"| --- |{' --- |' * len(tasks)}"]
    reference = REFERENCE if REFERENCE in losses else None
    for loss in losses:
        cells = []
        for task in tasks:
            mine = pooled(result, loss, task, name, gamma)
            found = ratio_of_sums(*mine)
            text = f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
            if reference and loss not in (reference, PRETRAINED):
                apart = paired_difference(mine, pooled(result, reference, task, name, gamma))
                text += f" ({apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}])"
            cells.append(text)
        lines.append(f"| `{loss}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def pooled(result: dict[str, Any], loss: str, task: str, name: str, gamma: str) -> tuple[list[float], list[float]]:
    """Tokens and rounds per prompt, summed over the seeds of a loss."""
    found = [cell["rounds"][task][name][gamma] for cell in result["cells"] if cell["loss"] == loss]
    tokens = [len(found) * count for count in result["tokens"][task][name]]
    return tokens, [sum(each) for each in zip(*found, strict=True)]


def speeds(result: dict[str, Any], losses: Sequence[str]) -> str:
    """Memory-bound speed-up by bytes and by measured time, on the first task, greedy."""
    setup, task = result["setup"], next(iter(result["tokens"]))
    lines = ["| loss | gamma | block efficiency | MBSU by bytes | MBSU by time |", "| --- | --- | --- | --- | --- |"]
    for loss in losses:
        for gamma in GAMMAS:
            tau = ratio_of_sums(*pooled(result, loss, task, "greedy", str(gamma))).value
            by = [mbsu(tau, gamma, setup[cost]) for cost in ("cost_by_bytes", "cost_by_time")]
            lines.append(f"| `{loss}` | {gamma} | {tau:.2f} | {by[0]:.2f} | {by[1]:.2f} |")
    head = (
        f"A draft step costs {setup['cost_by_bytes']:.3f} of the target's by bytes, {setup['cost_by_time']:.3f} by time"
    )
    return f"{head} (task {task}, greedy):\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
