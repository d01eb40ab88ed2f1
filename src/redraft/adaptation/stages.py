"""Stages that more than one job has: features, a training run with its ledger entry, saving what was trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from redraft import provenance
from redraft.adaptation.models import OpenDraft
from redraft.coarse import Coarse
from redraft.data.store import Row
from redraft.data.template import template_record
from redraft.drafts.base import Draft
from redraft.drafts.experts import merge_private
from redraft.drafts.files import save_draft, save_private
from redraft.drafts.methods import METHODS, PrivateSize, mergeable
from redraft.drafts.scaling import coarse_change
from redraft.errors import UserError
from redraft.features.store import FeatureStore, anchors
from redraft.loading import tokenizer_hash
from redraft.progress import progress_bar
from redraft.target import Target
from redraft.train.trainer import Trainer, TrainResult

Say = Callable[[str], None]


def build_features(
    name: str, store: FeatureStore, target: Target, rows: Sequence[Row], ledger: provenance.Ledger
) -> None:
    """Compute the features of ``rows`` that are missing, as the ledger's stage ``name``. Raises ``UserError``."""
    if all(row.key in store.index for row in rows if anchors(row)):
        return
    total = sum(len(row.prompt_ids) + len(row.response_ids) for row in rows)
    with ledger.stage(name) as entry, progress_bar(name, total) as progress:
        tokens = store.build(target, rows, progress=progress.update)
        flops = provenance.forward_flops(target.parameters_per_token, tokens)
        entry.add(tokens, flops, provenance.FORWARD_FORMULA)


def run_training(trainer: Trainer, ledger: provenance.Ledger, say: Say) -> TrainResult:
    """Train to the end as the ledger's stage ``train``. Raises ``UserError``."""
    budget = round(sum(map(anchors, trainer.rows)) * trainer.config.epochs)
    with ledger.stage("train") as entry:
        with progress_bar("train", budget) as progress:
            result = trainer.run(progress)
        trained = sum(parameter.numel() for _, parameter in trainer.trained)
        unrolled = getattr(trainer.draft, "objective", "unroll") == "unroll"
        steps = result.anchors * (trainer.config.unroll if unrolled else 1)
        flops = provenance.train_flops(trained, steps, trainer.draft.parameters_per_token - trained)
        if not trainer.descent.done_before:  # a run that had ended is read, not paid for again
            entry.add(result.anchors, flops, f"({provenance.TRAIN_FORMULA}) * unroll")
    why = "stopped early" if result.stopped_early else "whole budget"
    say(f"train: held-out tau {result.start_tau:.3f} -> {result.best_tau:.3f} in {result.steps} steps ({why})")
    return result


def check_merge(method: str, size: PrivateSize, exports: Sequence[str]) -> None:
    """Raise ``UserError`` when what the method trains cannot be one dense draft and an engine is to load it."""
    if exports and not mergeable(method, size):
        raise UserError(
            f"method {method} with routed experts cannot be merged into a dense draft, so {', '.join(exports)} cannot "
            "be exported; choose another method, one expert, or no exports"
        )


def save_trained(
    folder: Path,
    draft: Draft,
    names: Sequence[str],
    base: OpenDraft,
    method: str,
    target: Target,
    seed: int,
    bits: int | None = None,
) -> None:
    """``folder``/private with only what was trained, and ``folder``/merged, the whole: dense, but for routed experts,
    which stay as they are.

    Where everything was trained there is a private part only with ``bits``, the change told in so many a weight; the
    merged draft is then what these tell.
    """
    meta = {
        "method": method,
        "target": {"name": target.name, "hash": target.content_hash()},
        "tokenizer_hash": tokenizer_hash(target.tokenizer),
        "provenance": provenance.collect(seed, str(target.device), template_record(target.tokenizer)),
    }
    stored, old = half(draft), half(base.draft)
    parts: dict[str, Coarse] = {}
    if bits is not None:
        stored, parts = coarse_change(draft, old, names, bits)
    if names and (parts or METHODS[method].groups != METHODS["full"].groups):
        save_private(folder / "private", stored, names, base.base_hash, meta, old.state_dict(), parts)
    dense = max(stored.config.private_experts, stored.config.shared_experts) <= 1
    save_draft(folder / "merged", merge_private(stored) if dense else stored, meta)


def half(draft: Draft) -> Draft:
    """A copy in bfloat16, the type that drafts are stored and served in."""
    return copy.deepcopy(draft).to(torch.bfloat16)
