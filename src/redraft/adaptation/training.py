"""``redraft train``: a part of an old draft, or a new draft, on stored responses of the target."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from redraft.acceptance.simulate import simulate_greedy_chain
from redraft.adaptation.core import FEATURES, Adaptation, Plan, open_old
from redraft.adaptation.models import TargetSpec
from redraft.adaptation.runs import Log, Say, half, ledger_of, supervised_rows
from redraft.arithmetic import go_on_with
from redraft.artifact import write_sealed
from redraft.data.store import TRAFFIC, Row
from redraft.drafts.base import Draft, fresh
from redraft.drafts.opening import AnyDraft, OpenDraft
from redraft.errors import UserError
from redraft.evaluate.speed import tau_interval
from redraft.features import FeatureStore, read_index
from redraft.locks import held
from redraft.rows import anchors
from redraft.selection.manifest import read_manifest
from redraft.settings.base import AUTO
from redraft.settings.steps import TrainSettings
from redraft.settings.training import method
from redraft.target import Head
from redraft.training.loop import stored_precision
from redraft.training.trainer import TrainResult
from redraft.training.workers import Workers, together

NEW = "scratch"


def read_data(s: TrainSettings) -> tuple[Sequence[Row], Sequence[Row]]:
    """(train, held-out) of stored responses; ``heldout`` greedy ones are split off for early stopping, or read from a
    file of their own.

    Raises ``UserError`` for files that cannot be read or do not fit together.
    """
    rows: Sequence[Row] = supervised_rows(s.responses)
    if s.selection is not None:
        manifest = read_manifest(s.selection)
        manifest.check_source(s.responses)
        rows = manifest.apply(rows)
    if s.heldout_responses is None:
        train, kept = split_rows(rows, s.heldout)
        if not train or not kept:
            raise UserError(
                f"{s.responses}: {len(kept)} greedy rows can be held out and {len(train)} are left to train on; "
                "hold fewer back (--heldout), regenerate more prompts, some at temperature 0, or give "
                "--heldout-responses"
            )
        return train, kept
    held = supervised_rows(s.heldout_responses)
    if any(how.temperature and how.source != TRAFFIC for how in held.hows):
        raise UserError(f"{s.heldout_responses} holds sampled responses; held-out ones must be greedy")
    if shared := {row.id for row in rows} & {row.id for row in held}:
        raise UserError(f"{len(shared)} held-out prompts are trained on, first {min(shared)}; remove one of the two")
    return rows, held


def split_rows(rows: Sequence[Row], heldout: int) -> tuple[list[Row], list[Row]]:
    """(train, held-out): the first greedy rows in the order of a hash of their ids are held out."""
    ordered = sorted(filter(anchors, rows), key=lambda row: hashlib.md5(row.id.encode()).hexdigest())
    kept = [row for row in ordered if row.temperature == 0][:heldout]
    ids = {row.id for row in kept}
    return [row for row in ordered if row.id not in ids], kept


def training_dtype(spec: TargetSpec, out: Path, say: Say) -> str:
    """The type of the target of a training in ``out``: that in which it has begun if it has. Raises ``UserError``."""
    # Before types were chosen they were bfloat16, unless the command said otherwise, as it then does now.
    stored = stored_precision(out / "train", "bfloat16" if spec.dtype == AUTO else spec.dtype)
    return go_on_with(spec.dtype, stored, spec.device, say)


def train_old(spec: TargetSpec, draft: AnyDraft, s: TrainSettings, say: Say = print) -> TrainResult:
    """Train a part of an old draft: ``out/merged`` is the whole, ``out/private`` the part (of ``full`` only with bits).

    Raises ``UserError``; a killed run, started again with the same arguments, goes on.
    """
    if not method(s.method).groups:
        raise UserError(f"method {s.method} trains nothing; choose another")
    with together() as workers, held(s.out, say=say):
        return _train_old(spec, draft, s, say, workers)


def _train_old(spec: TargetSpec, draft: AnyDraft, s: TrainSettings, say: Say, workers: Workers) -> TrainResult:
    rows, heldout = read_data(s)
    parts, log = spec.parts(training_dtype(spec, s.out, say)), Log(ledger_of(s.out, workers=workers), say)
    plan = Plan(s.method, s.private_size, s.train_config())
    job = Adaptation(parts, open_old(draft, parts.shown, log), plan, s.out, log)
    with workers.first():
        job.features("features", [*rows, *heldout])
    job.prepare()
    result = job.train(rows, heldout)
    with workers.first() as mine:
        if mine:
            job.judge(heldout, tie="new")  # then nothing was lost, and the part that was asked for is there
            job.save()
            write_sealed(s.out / "train.json", asdict(result), "redraft.train/1")
    return result


# -- a new draft -------------------------------------------------------------------------------------------------------
def train_new(spec: TargetSpec, s: TrainSettings, say: Say = print) -> dict[str, Any]:
    """Stage 1: a new draft from nothing, in ``out/draft``, on the base target's answers to general prompts.

    Returns what the draft's record says of its held-out acceptance. Raises ``UserError``, also for rows of another
    target; a killed run goes on.
    """
    with together() as workers, held(s.out, say=say):
        return _train_new(spec, s, say, workers)


def _train_new(spec: TargetSpec, s: TrainSettings, say: Say, workers: Workers) -> dict[str, Any]:
    (train, heldout), config = read_data(s), s.train_config()
    parts = spec.parts(training_dtype(spec, s.out, say))
    log = Log(ledger_of(s.out, workers=workers), say)
    strangers = {row.target_hash for row in (*train, *heldout)} - {parts.facts.content_hash()}
    if strangers:
        raise UserError(f"the responses come from another target ({', '.join(sorted(strangers))}); regenerate them")
    ids, covered = choose_vocabulary(train, s.vocabulary, parts.facts.vocab_size)
    stored = not workers.writes or all(map(read_index(s.out / FEATURES).holds, [*train, *heldout]))
    target = parts.head if stored else parts.model
    draft = fresh(s.family, target, ids, config.seed)
    if not draft.reduced:
        covered = 1.0
    say(f"{len(train)} rows, {sum(map(anchors, train)):,} supervised tokens; vocabulary covers {covered:.1%} of them")
    job = Adaptation(parts, OpenDraft(draft, {}, ""), Plan(NEW, train=config), s.out, log)
    with workers.first():
        job.features("features", [*heldout, *train])
    job.train(train, heldout)
    record = heldout_record(job.draft, target, heldout, job.store, config.gamma, coverage=covered)
    with workers.first() as mine:
        if mine:
            job.save_whole(s.out / "draft", heldout=record)
    return record


def choose_vocabulary(rows: Sequence[Row], size: int, vocab_size: int) -> tuple[list[int], float]:
    """The ``size`` most frequent token ids of the responses, ascending, and the share of tokens they cover.

    Ids that never occur fill up from the lowest on: byte-pair vocabularies number their commonest merges first.
    Raises ``UserError`` when the target has fewer tokens.
    """
    if not 0 < size <= vocab_size:
        raise UserError(
            f"a draft vocabulary of {size} does not fit a target of {vocab_size} tokens; give a --vocabulary of "
            f"1 to {vocab_size}"
        )
    counts = Counter[int]()
    for row in rows:
        counts.update(row.response_ids)
    ordered = sorted(range(vocab_size), key=lambda i: (-counts[i], i))[:size]
    return sorted(ordered), sum(counts[i] for i in ordered) / max(1, counts.total())


def heldout_record(
    draft: Draft, target: Head, heldout: Sequence[Row], store: FeatureStore, gamma: int, **extra: Any
) -> dict[str, Any]:
    """The held-out acceptance of a draft as it is stored, in bfloat16; later probes take it as their reference."""
    accepted = simulate_greedy_chain(half(draft).float(), target, heldout, store, gamma)
    tau = tau_interval(accepted, heldout)
    return {"tau": tau, "gamma": gamma, "sampler": "greedy, chain", "prompts": len(heldout), **extra}
