"""One adaptation, assembled once: an old draft is opened, started, prepared, trained, replayed and saved.

Every command that trains a draft which reads the target's states goes this way: ``adapt``, ``train`` (old drafts and
new ones), every cell of a study, the quickstart. They differ in where rows come from and in what is done with the
draft afterwards.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from redraft import provenance
from redraft.acceptance.simulate import simulate_greedy_chain, tau_of
from redraft.adaptation.models import Parts, open_draft
from redraft.adaptation.runs import Log, add_forward, half, record_of, row_tokens
from redraft.artifact import read_checked, read_sealed, tensors_hash, write_checked, write_sealed
from redraft.attic.aim import aim
from redraft.data.store import Row
from redraft.drafts.base import Draft
from redraft.drafts.files import save_draft, save_private
from redraft.drafts.groups import prepare
from redraft.drafts.opening import AnyDraft, OpenDraft
from redraft.drafts.scaling import Coarse, coarse_change
from redraft.errors import UserError
from redraft.features import FeatureStore
from redraft.files import use_folder
from redraft.loading import tokenizer_hash
from redraft.rows import anchors, whole_length
from redraft.settings.training import METHODS, PrivateSize, ReplayConfig, TrainConfig
from redraft.starts.apply import StartContext, StartResult, apply_start
from redraft.target import Facts, Head, Target
from redraft.training.trainer import Trainer, TrainResult, replay_settings, replay_states
from redraft.training.workers import Workers

NO_START, REPLAY = "none", "redraft.replay/1"
STATES_FILE, SUMMARY_FILE, FEATURES = "states.safetensors", "states.json", "features"


# -- what the steps share ----------------------------------------------------------------------------------------------
def open_old(source: AnyDraft, target: Facts, log: Log) -> OpenDraft:
    """The draft that an adaptation begins with; notes of its import are said. Raises ``UserError``."""
    opened = open_draft(source, target)
    for note in opened.meta.get("notes", []):
        log.say(f"note on {opened.source}: {note}")
    return opened


def draft_meta(target: Facts, method: str | None, seed: int, **more: Any) -> dict[str, Any]:
    """What a saved draft says of itself beside its own shape; no ``method`` where none is known."""
    return {
        **({"method": method} if method else {}),
        "target": {"name": target.name, "hash": target.content_hash()},
        "tokenizer_hash": tokenizer_hash(target.tokenizer),
        **more,
        "provenance": record_of(target, seed),
    }


def feature_store(folder: Path, target: Facts, taps: Sequence[int]) -> FeatureStore:
    """The features of this target at these taps in ``folder``. Raises ``UserError`` when it holds others."""
    return FeatureStore(folder, {"target": target.content_hash(), "taps": list(taps)})


def build_features(name: str, store: FeatureStore, parts: Parts | Target, rows: Sequence[Row], log: Log) -> None:
    """Compute the features of ``rows`` that are missing, as the stage ``name``. Raises ``UserError``."""
    if not store.missing(rows):
        return
    opened = Parts.of(parts)
    longest = max(rows, key=whole_length)
    if (tokens := whole_length(longest)) - 1 > opened.facts.context:  # the last token is never read
        raise UserError(
            f"response {longest.key} and its prompt have {tokens:,} tokens, and the target reads "
            f"{opened.facts.context:,}; leave out what is longer"
        )
    source = opened.producer or opened.model
    with log.counted(name, row_tokens(rows)) as (entry, progress):
        add_forward(entry, opened.facts, store.build(source, rows, progress=progress.update))
    if altered := store.altered:
        log.say(
            f"note on {store.folder}: the features of {len(altered)} rows (first {altered[0]}) were lost and are "
            "computed anew; they differ in rounding from those that were kept while the answers were written, so "
            "training does not end with the very same bits"
        )


def training_flops(trainer: Trainer, result: TrainResult) -> int:
    """FLOPs of all steps of a training: the trained weights', and those that gradients pass through."""
    trained = sum(parameter.numel() for _, parameter in trainer.trained)
    # An objective with a state for every draft step computes as many positions.
    positions = result.anchors * (trainer.config.unroll if trainer.draft.weighable else 1)
    return provenance.train_flops(trained, positions, max(0, trainer.draft.parameters_per_token - trained))


def run_training(trainer: Trainer, log: Log) -> TrainResult:
    """Train to the end as the stage ``train``. Raises ``UserError``."""
    budget = round(sum(map(anchors, trainer.rows)) * trainer.config.epochs)
    if said := trainer.said_of_spans():
        log.say(f"train: {said}")
    with log.counted("train", budget) as (entry, progress):
        result = trainer.run(progress)
        if not trainer.loop.done_before:  # a run that had ended is read, not paid for again
            flops = training_flops(trainer, result)
            entry.add(result.anchors, flops, f"({provenance.TRAIN_FORMULA}) * unroll")
    why = "stopped early" if result.stopped_early else "whole budget"
    log.say(f"train: held-out tau {result.start_tau:.3f} -> {result.best_tau:.3f} in {result.steps} steps ({why})")
    return result


@dataclass(frozen=True)
class Verdict:
    """Held-out tau of the old draft and of the new one, each in the type that it would be stored in.

    Of a greedy chain of ``gamma`` on the target's own answers to ``prompts`` held-out prompts. ``kept`` says which of
    the two is saved.
    """

    old: float
    new: float
    gamma: int
    prompts: int
    kept: Literal["old", "new"]


# -- the recipe --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """What is trained of a draft, and how: ``start`` names what training begins with, ``replay`` what follows it."""

    method: str
    size: PrivateSize = field(default_factory=PrivateSize)
    train: TrainConfig = field(default_factory=TrainConfig)
    start: str = NO_START
    replay: ReplayConfig = field(default_factory=ReplayConfig)


class Adaptation:
    """One draft on its way from what it was to what it is trained to be. A killed one, done again, goes on.

    The steps, in this order: ``start`` (where the plan names one), ``prepare``, ``train`` (features and replay
    included), ``judge`` (where what is saved must not be worse than what was given), ``save``. ``old`` stays as it is;
    ``draft`` is what has become of a copy of it.
    """

    def __init__(
        self,
        target: Parts | Head,
        old: OpenDraft,
        plan: Plan,
        folder: Path,
        log: Log,
        store: FeatureStore | None = None,
        replay_folder: Path | None = None,
    ) -> None:
        """The target is tapped where the draft reads it; its model is asked for where features are missing. ``folder``
        holds the training's state, the features (unless a ``store`` is given) and what is saved; passes of replay lie
        in ``replay``, or in a folder of their own.
        """
        self.parts = Parts.of(target)
        self.parts.tap(old.draft.taps)
        self.old, self.plan, self.folder, self.log = old, plan, folder, log
        self.replay_folder = replay_folder or folder / "replay"
        self.started = StartResult(old.draft)
        self.draft: Draft = old.draft
        self.trained: list[str] = []
        self.results: list[TrainResult] = []
        self.flops = 0
        self.verdict: Verdict | None = None
        if store is not None:
            self.store = store

    @cached_property
    def store(self) -> FeatureStore:
        """The features that the draft is trained on."""
        return feature_store(self.folder / FEATURES, self.parts.facts, self.old.draft.taps)

    def features(self, name: str, rows: Sequence[Row]) -> None:
        """Build what is missing of the features of ``rows`` as the stage ``name``. Raises ``UserError``."""
        build_features(name, self.store, self.parts, rows, self.log)

    def start(self, context: Callable[[], StartContext], name: str = "") -> None:
        """Begin with what nearly free adaptations make of the old draft, as the stage ``start NAME``.

        ``context`` is asked only where the plan names one: a base target is the largest thing in memory. Raises
        ``UserError``.
        """
        if self.plan.start == NO_START:
            return
        stage = f"start {name or self.plan.start}"
        with self.log.counted(stage, None) as (entry, progress):
            given = replace(context(), progress=progress.update)
            started = apply_start(self.plan.start, self.old.draft, given)
            entry.add(started.tokens, int(started.flops), provenance.FORWARD_FORMULA)
        self.parts.tap(started.draft.taps)
        for note in started.notes:
            self.log.say(f"note on {stage}: {note}")
        self.started = started

    def prepare(self) -> None:
        """Give a copy of the draft its private parts, and mark what the method trains. Raises ``UserError``."""
        plan, begun = self.plan, copy.deepcopy(self.started.draft)
        self.draft, self.trained = prepare(begun, plan.method, plan.size, plan.train.seed, self.parts.head)

    def train(self, rows: Sequence[Row], heldout: Sequence[Row]) -> TrainResult:
        """Train what is marked, then in passes of replay; the result of the first training. Raises ``UserError``."""
        with Workers.present().first():
            self.features("features", rows)
            self.features("features held-out", heldout)
        self._run(rows, heldout, self.plan.train, self.folder / "train", before=aim)
        self.replay(rows, heldout)
        return self.results[0]

    def _run(self, rows: Sequence[Row], heldout: Sequence[Row], config: TrainConfig, place: Path, **more: Any) -> None:
        work, origin, present = (self.draft, self.parts.head, self.store), self.old.base_hash, Workers.present()
        trainer = Trainer(*work, rows, heldout, config, place, origin, workers=present, **more)
        result = run_training(trainer, self.log)
        self.draft = trainer.draft
        self.results.append(result)
        self.flops += training_flops(trainer, result)

    def replay(self, rows: Sequence[Row], heldout: Sequence[Row]) -> None:
        """Walk the rounds of the draft as it is, train where they were lost, and again, each pass in its own folder.

        A pass ends with the weights of its best held-out evaluation, its start among them, so it cannot make that
        figure worse.
        """
        settings = replay_settings(self.plan.train, self.plan.replay)
        for number in range(1, self.plan.replay.passes + 1):
            place = self.replay_folder / f"pass-{number}"
            with Workers.present().first():
                states = self._lost_states(rows, place)
            if not states:
                self.log.say("replay: every round went through; nothing is left to train on")
                break
            self._run(rows, heldout, settings, place / "train", weights=states)

    def _lost_states(self, rows: Sequence[Row], folder: Path) -> dict[str, Tensor]:
        """The weights of a pass, walked once and kept: a resumed pass must train on the states it began with."""
        path, summary = folder / STATES_FILE, folder / SUMMARY_FILE
        mend = f"delete the folder {folder} and give the same command again, which walks anew"
        if summary.exists():
            stored = read_sealed(summary, REPLAY, None, mend)
            known = {"pass": stored["pass"]} if "pass" in stored else {}
            return read_checked(path, mend, **known) if stored["rows"] else {}
        use_folder(folder)
        self.draft.eval()
        gamma, count = self.plan.train.gamma, sum(map(anchors, rows))
        with self.log.counted("replay walk", count) as (entry, progress):
            found = replay_states(
                self.draft, self.parts.head, rows, self.store, gamma, self.plan.replay, progress=progress
            )
            add_forward(entry, self.draft, count * gamma)
        self.draft.train()
        mark = tensors_hash(found.weights)
        if found.weights:
            write_checked(path, found.weights, **{"pass": mark})
        record = {"rounds": found.rounds, "lost_rounds": found.lost_rounds, "rows": len(found.weights), "pass": mark}
        write_sealed(summary, record, REPLAY)
        self.log.say(f"replay: {found.summary()}")
        return found.weights

    # -- whether it is better ----------------------------------------------------------------------------------------
    def judge(self, heldout: Sequence[Row], tie: Literal["old", "new"] = "old") -> Verdict:
        """Measure the old draft and the new one on held-out answers; where the new one is no better, the old one is
        what is saved, with nothing trained. Of two that are equal, ``tie`` is.

        Both are measured as they would be stored: rounding, a change told in few bits, and a start that was itself a
        loss are in the figure, which training's own best one does not have. Raises ``UserError``.
        """
        self.features("features held-out", heldout)
        gamma, count, target = self.plan.train.gamma, sum(map(anchors, heldout)), self.parts.head
        with self.log.counted("guard", 2 * count) as (entry, progress):

            def tau(draft: Draft) -> float:
                served = half(draft).float().to(target.device).eval().bind(target)
                add_forward(entry, served, count * gamma)
                return tau_of(simulate_greedy_chain(served, target, heldout, self.store, gamma), heldout)

            old = tau(self.old.draft)
            progress.update(count)
            new = tau(self.stored[0])
            progress.update(2 * count)
        kept: Literal["old", "new"] = tie if new == old else "new" if new > old else "old"
        self.verdict = found = Verdict(old, new, gamma, len(heldout), kept)
        if found.kept == "old" and self.changed:
            self.log.say(
                f"the new draft's held-out tau, {found.new:.3f}, is not above the old one's, {found.old:.3f}: "
                "the old draft is kept as it was; give more or other prompts, or another method"
            )
            self.started, self.draft, self.trained = StartResult(self.old.draft), copy.deepcopy(self.old.draft), []
            self.__dict__.pop("stored")
        return found

    # -- what comes of it ------------------------------------------------------------------------------------------
    @cached_property
    def stored(self) -> tuple[Draft, dict[str, Coarse]]:
        """The draft in the type that it is stored in, and the codes of what is told in a few bits a weight."""
        bits = self.plan.size.bits
        if bits is None:
            return half(self.draft), {}
        return coarse_change(self.draft, half(self.old.draft), self.changed, bits)

    @property
    def changed(self) -> list[str]:
        """The names of what was trained, and of what the start changed besides."""
        return list(dict.fromkeys([*self.trained, *self.started.changed]))

    def meta(self, **more: Any) -> dict[str, Any]:
        """What the saved draft says of itself; of an old one that was kept, the method that it came with."""
        method: str | None = self.plan.method
        if self.verdict is not None:
            more["guard"] = vars(self.verdict)
            method = method if self.verdict.kept == "new" else self.old.meta.get("method")
        return draft_meta(self.parts.facts, method, self.plan.train.seed, **more)

    def save(self) -> None:
        """``private`` in the folder with only what was trained, and ``merged``, the whole.

        Where everything was trained there is a private part only with ``bits``, the change told in so many a weight;
        the merged draft is then what these tell. Where the old draft is kept there is none, nor one of before.
        """
        stored, parts = self.stored
        names, method, folder = self.changed, METHODS[self.plan.method], self.folder / "private"
        if names and (parts or method.groups != METHODS["full"].groups):
            old = half(self.old.draft).state_dict()
            save_private(folder, stored, names, self.old.base_hash, self.meta(), old, parts)
        elif self.verdict is not None and self.verdict.kept == "old":
            shutil.rmtree(folder, ignore_errors=True)  # a run that was begun before drafts were judged
        self.save_whole(self.folder / "merged")

    def save_whole(self, folder: Path, **more: Any) -> None:
        """The whole draft in ``folder``: dense, but for routed experts, which stay as they are."""
        stored, _ = self.stored
        dense = max(stored.config.private_experts, stored.config.shared_experts) <= 1
        save_draft(folder, stored, self.meta(**more), merge=dense)
