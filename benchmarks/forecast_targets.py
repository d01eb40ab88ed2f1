"""Targets for the probe's forecast: what a probe sees of each, a trial adaptation, what the default method makes of it.

`study` adds to a committed study what it did not record: the old draft's acceptance on the *base* target's answers to
the study's evaluation prompts and, where the target is at hand, a trial adaptation on some of them (`--trial`):

    REDRAFT_DATA=folder python benchmarks/forecast_targets.py study selection/maths mild/code

`bench BENCH --evaluation SOURCE` does so for the prompts of a committed benchmark. `adapt` measures a target of its
own: the evaluation prompts as a probe would see them, then the default method on the target's own answers to the
training prompts, all of them used, and the same evaluation prompts again:

    REDRAFT_DATA=folder python benchmarks/forecast_targets.py adapt maths-on-gsm8k \\
        --adapter src/redraft/assets/maths-lora \\
        --prompts data:math/gsm8k.train.jsonl.gz@104 --evaluation data:math/gsm8k.test.jsonl.gz@24

Both write to benchmarks/results/forecast-targets.json, which benchmarks/forecast.py reads. Prompt sources are those of
docs/studies/README.md. tau is that of a greedy chain of 3 on greedy answers. Two cores of its own: about six
minutes a target.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from redraft import provenance
from redraft.adaptation.models import open_draft, open_target, template_prompts
from redraft.adaptation.probe import METHOD, START, greedy_answers, greedy_rows, trial, walked
from redraft.adaptation.study.targets import read_sources
from redraft.artifact import atomic_write_json, read_json
from redraft.data.overlap import without_overlap
from redraft.data.prompts import Conversation
from redraft.data.store import Row
from redraft.drafts.base import Draft
from redraft.drafts.groups import prepare
from redraft.errors import UserError
from redraft.features import FeatureStore
from redraft.rows import anchors
from redraft.settings.runs import adaptation
from redraft.settings.studies import parse_study
from redraft.settings.training import PrivateSize, TrainConfig
from redraft.starts.apply import StartContext, apply_start
from redraft.starts.vocabulary import coverage
from redraft.target import Target
from redraft.training.trainer import Trainer

RESULTS = Path(__file__).resolve().parent / "results"
FILE = RESULTS / "forecast-targets.json"
SCHEMA = "redraft.forecast-targets/1"
BASE, DRAFT = "embedded:smollm2-135m-instruct", "src/redraft/assets/general-draft"
# As many prompts as a trial of the probe asks.
TRIAL_PROMPTS = 24
GAMMA, LONGEST, HELDOUT = 3, 1200, 8


def keep(name: str, found: dict[str, Any]) -> None:
    """Add figures of one target to the file."""
    kept = read_json(FILE) if FILE.exists() else {"schema": SCHEMA, "targets": {}}
    kept["targets"][name] = kept["targets"].get(name, {}) | found
    atomic_write_json(FILE, kept)
    print(name, found, flush=True)


@torch.inference_mode()
def entropy(target: Target, rows: Sequence[Row], store: FeatureStore) -> float:
    """Mean entropy of the target's next token behind every anchor, in nats."""
    total, count = 0.0, 0
    for row in rows:
        states_AH = store.get(row)[1].to(target.device, target.dtype)
        logs_AV = target.scale_logits(target.head(states_AH)).float().log_softmax(-1)
        total -= float((logs_AV.exp() * logs_AV).sum())
        count += len(states_AH)
    return total / count


def seen(
    target: Target, draft: Draft, rows: Sequence[Row], store: FeatureStore, with_trial: bool = True
) -> dict[str, Any]:
    """What a probe sees on these answers, with a trial adaptation where one is asked for."""
    found: dict[str, Any] = {
        "entropy": entropy(target, rows, store),
        "stale_tau": walked(target, draft, rows, store, GAMMA),
        "coverage": coverage(draft, rows, GAMMA).share,
    }
    if with_trial:
        done = trial(target, draft, rows, store, GAMMA)
        counts = {"answers": done.answers, "tokens": done.tokens, "seconds": round(done.seconds, 1)}
        found["trial"] = {"tau": done.tau, **counts}
    return found


def some(asked: Sequence[Conversation]) -> list[Conversation]:
    """At most as many as a trial asks, evenly spread."""
    if len(asked) <= TRIAL_PROMPTS:
        return list(asked)
    return [asked[place * len(asked) // TRIAL_PROMPTS] for place in range(TRIAL_PROMPTS)]


# -- committed studies -----------------------------------------------------------------------------------------------
def from_study(name: str, options: argparse.Namespace) -> None:
    """Reference and trial of STUDY/TARGET. Raises ``UserError``."""
    study, _, key = name.partition("/")
    config = parse_study(read_json(RESULTS / f"{study}.json")["config"])
    if key not in config.targets:
        raise UserError(f"{name}: the study has the targets {', '.join(config.targets)}")
    entry = config.targets[key]
    asked = [c for texts in entry.evaluation.values() for c in read_sources(texts, config.longest_prompt)]
    found: dict[str, Any] = {"study": study, "target": key, "gamma": GAMMA}
    tokens = config.evaluation_tokens
    if options.trial:
        target = open_target(entry.target, options.dtype, options.device, entry.adapter)
        draft = open_draft(entry.draft, target).draft
        with tempfile.TemporaryDirectory(prefix="redraft-forecast-") as folder:
            store, rows = answers(target, draft, some(asked), tokens, Path(folder))
            found |= seen(target, draft, rows, store)
    else:
        found["reference_tau"] = reference(asked, tokens, options)
    keep(name, found | {"machine": provenance.machine()})


def from_bench(name: str, options: argparse.Namespace) -> None:
    """Reference of a committed benchmark, its prompts found again in ``--evaluation``. Raises ``UserError``."""
    result = read_json(RESULTS / f"{name}.json")
    ids = [prompt["id"] for prompt in result["per_prompt"]]
    known = {c.id: c for c in read_sources(options.evaluation)}
    if missing := [id for id in ids if id not in known]:
        raise UserError(f"{name}: {missing[0]} and {len(missing) - 1} other prompts are not in --evaluation")
    tokens = result["setup"]["max_new_tokens"]
    found = {"bench": name, "gamma": GAMMA, "reference_tau": reference([known[id] for id in ids], tokens, options)}
    keep(name, found | {"machine": provenance.machine()})


def reference(asked: Sequence[Conversation], tokens: int, options: argparse.Namespace) -> dict[str, float]:
    """tau of the old draft on the base target's answers."""
    base = open_target(BASE, options.dtype, options.device)
    draft = open_draft(DRAFT, base).draft
    with greedy_answers(base, draft.taps, template_prompts(asked, base, tokens), tokens) as (rows, store):
        return walked(base, draft, rows, store, GAMMA)


def answers(
    target: Target, draft: Draft, asked: Sequence[Conversation], tokens: int, folder: Path
) -> tuple[FeatureStore, list[Row]]:
    """Greedy answers with their features in ``folder``."""
    target.tap(draft.config.taps)
    store = FeatureStore(folder, {})
    rows = greedy_rows(target, template_prompts(asked, target, tokens), tokens, store=store)
    store.build(target, rows)
    return store, rows


# -- targets of this benchmark ---------------------------------------------------------------------------------------
def from_target(name: str, options: argparse.Namespace) -> None:
    """What a probe sees of a target, and what the default method makes of it. Raises ``UserError``."""
    began = time.monotonic()
    measured = read_sources(options.evaluation, LONGEST)
    training = without_overlap(read_sources(options.prompts, LONGEST, measured), measured)
    target = open_target(options.target, options.dtype, options.device, options.adapter)
    draft = open_draft(DRAFT, target).draft
    settings = {key: getattr(options, key) for key in ("target", "adapter", "prompts", "evaluation", "tokens")}
    with tempfile.TemporaryDirectory(prefix="redraft-forecast-") as folder:
        store, rows = answers(target, draft, measured, options.tokens, Path(folder))
        found = {"settings": settings, "gamma": GAMMA, **seen(target, draft, rows, store, options.trial)}
        store, own = answers(target, draft, training, options.tokens, Path(folder))
        found |= adapted(target, draft, own[HELDOUT:], own[:HELDOUT], rows, store)
    moved = options.adapter or options.target != BASE
    found["reference_tau"] = reference(measured, options.tokens, options) if moved else found["stale_tau"]
    found |= {"seconds": round(time.monotonic() - began), "machine": provenance.machine()}
    keep(name, found)


def adapted(
    target: Target, draft: Draft, own: Sequence[Row], heldout: Sequence[Row], rows: Sequence[Row], store: FeatureStore
) -> dict[str, Any]:
    """tau on ``rows`` of the draft that the default method makes of all of ``own``."""
    started = apply_start(START, copy.deepcopy(draft).float(), StartContext(target, rows=own, gamma=GAMMA)).draft
    prepared, _ = prepare(started, METHOD, PrivateSize(), 0, target)
    config = TrainConfig(**adaptation(METHOD) | {"batch_anchors": 512, "gamma": GAMMA, "evaluate_every": 60})
    with tempfile.TemporaryDirectory(prefix="redraft-forecast-") as folder:
        trainer = Trainer(prepared, target, store, own, heldout, config, Path(folder))
        result = trainer.run(None)
    return {
        "aligned_tau": walked(target, trainer.draft, rows, store, GAMMA),
        "answers": len(own),
        "answer_tokens": sum(map(anchors, own)),
        "steps": result.steps,
        "train_seconds": round(result.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    study, bench, adapt = (commands.add_parser(name) for name in ("study", "bench", "adapt"))
    study.add_argument("names", nargs="+", metavar="STUDY/TARGET")
    study.add_argument("--trial", action="store_true", help="a trial adaptation on the study's own target")
    bench.add_argument("names", nargs=1, metavar="BENCH")
    bench.add_argument("--evaluation", nargs="+", required=True)
    adapt.add_argument("names", nargs=1, metavar="NAME")
    adapt.add_argument("--target", default=BASE)
    adapt.add_argument("--adapter")
    adapt.add_argument("--prompts", nargs="+", required=True)
    adapt.add_argument("--evaluation", nargs="+", required=True)
    adapt.add_argument("--tokens", type=int, default=128)
    adapt.add_argument("--trial", action="store_true")
    for command in (study, bench, adapt):
        command.add_argument("--device", default="cpu")
        command.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    try:
        for name in options.names:
            {"study": from_study, "bench": from_bench, "adapt": from_target}[options.command](name, options)
    except UserError as error:
        raise SystemExit(f"forecast_targets: error: {error}") from None


if __name__ == "__main__":
    main()
