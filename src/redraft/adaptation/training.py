"""``redraft train``: a part of an old draft, or a new one, on stored responses."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

from redraft import provenance
from redraft.adaptation.models import open_draft
from redraft.adaptation.stage1 import split_rows, train_from_nothing
from redraft.adaptation.stages import Say, build_features, run_training, save_trained
from redraft.adaptation.steps import TargetSpec
from redraft.arithmetic import AUTO, go_on_with
from redraft.artifact import atomic_write_json
from redraft.data.store import TRAFFIC, Row, read_rows
from redraft.drafts.groups import prepare
from redraft.drafts.methods import PrivateSize, method
from redraft.errors import UserError
from redraft.features.store import FeatureStore, anchors
from redraft.select.manifest import read_manifest
from redraft.train.checkpoint import stored_precision
from redraft.train.trainer import TrainConfig, Trainer, TrainResult


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
                    "hold fewer back (--heldout), regenerate more prompts, some at temperature 0, or give "
                    "--heldout-responses"
                )
            return train, kept
        kept = [row for row in read_rows(self.heldout_responses) if anchors(row)]
        if any(row.temperature and row.source != TRAFFIC for row in kept):
            raise UserError(f"{self.heldout_responses} holds sampled responses; held-out ones must be greedy")
        if shared := {row.id for row in rows} & {row.id for row in kept}:
            raise UserError(
                f"{len(shared)} held-out prompts are trained on, first {min(shared)}; remove one of the two"
            )
        return rows, kept


def trained_dtype(out: Path, spec: TargetSpec, say: Say) -> str:
    """The data type for the target of a training in ``out``: one that has begun keeps its own. Raises ``UserError``."""
    # Before types were chosen they were bfloat16, unless the command said otherwise, as it then does now.
    stored = stored_precision(out / "train", "bfloat16" if spec.dtype == AUTO else spec.dtype)
    return go_on_with(spec.dtype, stored, spec.device, say)


def train_new(
    spec: TargetSpec,
    data: TrainData,
    out: Path,
    vocabulary: int,
    config: TrainConfig,
    say: Say = print,
    family: str = "eagle3",
) -> None:
    """Stage 1: a draft of ``family`` from nothing, in ``out/draft``. Raises ``UserError``; a killed run goes on."""
    if data.heldout_responses is not None:
        raise UserError("--from-nothing holds responses out by number: give --heldout, not --heldout-responses")
    rows = [row for part in data.read() for row in part]
    target = spec.open(trained_dtype(out, spec, say))
    record = train_from_nothing(target, rows, out, vocabulary, config, data.heldout, say, family)
    say(f"held-out tau {record['tau']['value']:.2f}; draft: {out / 'draft'}")


def train_old(
    spec: TargetSpec,
    draft: str,
    data: TrainData,
    out: Path,
    config: TrainConfig,
    method_name: str = "lora",
    size: PrivateSize | None = None,
    say: Say = print,
) -> TrainResult:
    """Train a part of an old draft: ``out/merged`` is the whole, ``out/private`` the part (of ``full`` only with bits).

    Raises ``UserError``; a killed run, started again with the same arguments, goes on.
    """
    if not method(method_name).groups:
        raise UserError(f"method {method_name} trains nothing; choose another")
    rows, heldout = data.read()
    target = spec.open(trained_dtype(out, spec, say))
    opened = open_draft(draft, target)
    target.tap(opened.draft.config.taps)
    size = size or PrivateSize()
    trained, names = prepare(copy.deepcopy(opened.draft), method_name, size, config.seed, target)
    store = FeatureStore(out / "features", {"target": target.content_hash(), "taps": list(target.taps)})
    ledger = provenance.Ledger.load(out / "ledger.json")
    build_features("features", store, target, [*rows, *heldout], ledger)
    trainer = Trainer(trained, target, store, rows, heldout, config, out / "train", opened.base_hash)
    result = run_training(trainer, ledger, say)
    save_trained(out, trainer.draft, names, opened, method_name, target, config.seed, size.bits)
    atomic_write_json(out / "train.json", asdict(result))
    say(f"draft: {out / 'merged'}")
    return result
