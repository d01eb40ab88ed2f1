"""``redraft train``: a part of an old draft, or a new one, on stored responses."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from redraft import provenance
from redraft.artifact import atomic_write_json, save_draft, save_private
from redraft.data.store import Row, read_rows
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.drafts.experts import merge_private
from redraft.drafts.groups import METHODS, method, prepare
from redraft.errors import UserError
from redraft.loading import tokenizer_hash
from redraft.losses import LOSSES
from redraft.pipeline.models import OpenDraft, open_draft
from redraft.pipeline.stage1 import split_rows, train_from_nothing
from redraft.pipeline.steps import Say, TargetSpec
from redraft.progress import progress_bar
from redraft.select.manifest import read_manifest
from redraft.target import Target
from redraft.teacher.features import FeatureStore, anchors
from redraft.train.loop import TrainConfig, Trainer, TrainResult


@dataclass(frozen=True)
class TrainData:
    """Stored responses: ``heldout`` greedy ones are split off for early stopping, or read from a file of their own."""

    responses: Path
    heldout: int = 40
    heldout_responses: Path | None = None
    selection: Path | None = None

    def read(self) -> tuple[list[Row], list[Row]]:
        """(train, held-out). Raises ``UserError`` for files that cannot be read or do not fit together."""
        rows = [row for row in read_rows(self.responses) if anchors(row)]
        if self.selection is not None:
            manifest = read_manifest(self.selection)
            manifest.check_source(self.responses)
            rows = manifest.apply(rows)
        if self.heldout_responses is None:
            train, kept = split_rows(rows, self.heldout)
            if not train or not kept:
                raise UserError(
                    f"{self.responses}: {len(kept)} greedy rows can be held out and {len(train)} are left to train on; "
                    "regenerate more prompts, some at temperature 0, or give --heldout-responses"
                )
            return train, kept
        kept = [row for row in read_rows(self.heldout_responses) if anchors(row)]
        if any(row.temperature for row in kept):
            raise UserError(f"{self.heldout_responses} holds sampled responses; held-out ones must be greedy")
        if shared := {row.id for row in rows} & {row.id for row in kept}:
            raise UserError(
                f"{len(shared)} held-out prompts are trained on, first {min(shared)}; remove one of the two"
            )
        return rows, kept


def train_new(
    spec: TargetSpec, data: TrainData, out: Path, vocabulary: int, config: TrainConfig, say: Say = print
) -> None:
    """Stage 1: a draft from nothing, in ``out/draft``. Raises ``UserError``; a killed run goes on."""
    LOSSES.get(config.loss)
    if data.heldout_responses is not None:
        raise UserError("--from-nothing holds responses out by number: give --heldout, not --heldout-responses")
    rows = [row for part in data.read() for row in part]
    record = train_from_nothing(spec.open(), rows, out, vocabulary, config, data.heldout, say)
    say(f"held-out tau {record['tau']['value']:.2f}; draft: {out / 'draft'}")


def train_old(
    spec: TargetSpec,
    draft: str,
    data: TrainData,
    out: Path,
    config: TrainConfig,
    method_name: str = "eda+fc",
    private_width: int = 768,
    say: Say = print,
) -> TrainResult:
    """Train a part of an old draft: ``out/merged`` is the whole, ``out/private`` the part (not for ``full``).

    Raises ``UserError``; a killed run, started again with the same arguments, goes on.
    """
    LOSSES.get(config.loss)
    if not method(method_name).groups:
        raise UserError(f"method {method_name} trains nothing; choose another")
    rows, heldout = data.read()
    target = spec.open()
    opened = open_draft(draft, target)
    target.tap(opened.draft.config.taps)
    trained, names = prepare(copy.deepcopy(opened.draft), method_name, private_width, config.seed)
    store = FeatureStore(out / "features", {"target": target.content_hash(), "taps": list(target.taps)})
    ledger = provenance.Ledger.load(out / "ledger.json")
    total = sum(len(row.prompt_ids) + len(row.response_ids) for row in [*rows, *heldout])
    with ledger.stage("features") as entry, progress_bar("features", total) as progress:
        tokens = store.build(target, [*rows, *heldout], progress=progress.update)
        flops = provenance.forward_flops(target.parameters_per_token, tokens)
        entry.add(tokens=tokens, flops=flops, formula=provenance.FORWARD_FORMULA)
    trainer = Trainer(trained, target, store, rows, heldout, config, out / "train")
    with ledger.stage("train") as entry:
        with progress_bar("train", round(sum(map(anchors, trainer.rows)) * config.epochs)) as progress:
            result = trainer.run(progress)
        count = sum(parameter.numel() for name, parameter in trained.named_parameters() if name in set(names))
        steps = result.anchors * config.unroll
        flops = provenance.train_flops(count, steps, trained.parameters_per_token - count)
        entry.add(tokens=result.anchors, flops=flops, formula=f"({provenance.TRAIN_FORMULA}) * unroll")
    _save_trained(out, trainer.draft, names, opened, method_name, target, spec, config)
    atomic_write_json(out / "train.json", asdict(result))
    say(f"held-out tau {result.start_tau:.3f} -> {result.best_tau:.3f} in {result.steps} steps")
    say(f"draft: {out / 'merged'}")
    return result


def _save_trained(
    out: Path,
    draft: Eagle3Draft,
    names: list[str],
    base: OpenDraft,
    method_name: str,
    target: Target,
    spec: TargetSpec,
    config: TrainConfig,
) -> None:
    meta = {
        "method": method_name,
        "target": {"name": target.name, "hash": target.content_hash()},
        "tokenizer_hash": tokenizer_hash(target.tokenizer),
        "provenance": provenance.collect(seed=config.seed, device=spec.device),
    }
    stored = copy.deepcopy(draft).to(torch.bfloat16)
    if METHODS[method_name].groups != METHODS["full"].groups:
        save_private(out / "private", stored, names, base.base_hash, meta)
    save_draft(out / "merged", merge_private(stored), meta)
