"""Stage 1: a draft from nothing, trained on the base target's own answers to general prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from redraft import provenance
from redraft.acceptance.simulate import simulate_greedy_chain
from redraft.adaptation.stages import Say, build_features, half, run_training
from redraft.data.store import Row
from redraft.drafts.base import Draft, fresh
from redraft.drafts.files import save_draft
from redraft.errors import UserError
from redraft.evaluate.speed import tau_interval
from redraft.features.store import FeatureStore, anchors
from redraft.loading import tokenizer_hash
from redraft.target import Target
from redraft.train.trainer import TrainConfig, Trainer


def choose_vocabulary(rows: Sequence[Row], size: int, vocab_size: int) -> tuple[list[int], float]:
    """The ``size`` most frequent token ids of the responses, ascending, and the share of tokens they cover.

    Ids that never occur fill up from the lowest on: byte-pair vocabularies number their commonest merges first.
    Raises ``UserError`` when the target has fewer tokens.
    """
    if not 0 < size <= vocab_size:
        raise UserError(f"a draft vocabulary of {size} does not fit a target of {vocab_size} tokens")
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for row in rows:
        counts += torch.bincount(torch.tensor(row.response_ids), minlength=vocab_size)
    ordered = sorted(range(vocab_size), key=lambda i: (-int(counts[i]), i))[:size]
    covered = float(counts[ordered].sum() / counts.sum().clamp(min=1))
    return sorted(ordered), covered


def split_rows(rows: Sequence[Row], heldout: int) -> tuple[list[Row], list[Row]]:
    """(train, held-out): the first greedy rows in the order of a hash of their ids are held out."""
    import hashlib

    usable = [r for r in rows if anchors(r)]
    ordered = sorted(usable, key=lambda r: hashlib.md5(r.id.encode()).hexdigest())
    kept = [r for r in ordered if r.temperature == 0][:heldout]
    ids = {r.id for r in kept}
    return [r for r in ordered if r.id not in ids], kept


def train_from_nothing(
    target: Target,
    rows: Sequence[Row],
    out: Path,
    vocabulary_size: int,
    config: TrainConfig,
    heldout: int = 40,
    say: Say = print,
    family: str = "eagle3",
) -> dict[str, Any]:
    """Train and save a draft of ``family`` in ``out``/draft; returns what its record says. Resumable.

    Raises ``UserError`` when the rows come from another target or are too few.
    """
    strangers = {r.target_hash for r in rows} - {target.content_hash()}
    if strangers:
        raise UserError(f"the responses come from another target ({', '.join(sorted(strangers))}); regenerate them")
    train, kept = split_rows(rows, heldout)
    vocabulary, covered = choose_vocabulary(train, vocabulary_size, target.vocab_size)
    draft = fresh(family, target, vocabulary, config.seed)
    if not draft.reduced:
        covered = 1.0
    say(f"{len(train)} rows, {sum(map(anchors, train)):,} supervised tokens; vocabulary covers {covered:.1%} of them")
    target.tap(draft.config.taps)
    store = FeatureStore(out / "features", {"target": target.content_hash(), "taps": list(target.taps)})
    ledger = provenance.Ledger.load(out / "ledger.json")
    build_features("features", store, target, [*kept, *train], ledger)
    trainer = Trainer(draft, target, store, train, kept, config, out / "train")
    run_training(trainer, ledger, say)
    return save_general(trainer.draft, target, kept, store, out / "draft", config.gamma, {"coverage": covered})


def save_general(
    draft: Draft,
    target: Target,
    heldout: Sequence[Row],
    store: FeatureStore,
    folder: Path,
    gamma: int,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Save a draft in bfloat16 with the held-out acceptance that later probes take as their reference."""
    stored = half(draft)
    accepted = simulate_greedy_chain(half(draft).float(), target, heldout, store, gamma)
    tau = tau_interval(accepted, {r.key: anchors(r) for r in heldout})
    record = {"tau": tau, "gamma": gamma, "sampler": "greedy, chain", "prompts": len(heldout), **extra}
    meta = {
        "method": "scratch",
        "target": {"name": target.name, "hash": target.content_hash()},
        "tokenizer_hash": tokenizer_hash(target.tokenizer),
        "heldout": record,
        "provenance": provenance.collect(seed=0, device=str(target.device)),
    }
    save_draft(folder, stored, meta)
    return record
