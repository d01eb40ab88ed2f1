"""``redraft adapt``: regenerate, select, train, export, bench, report; every stage resumes after a kill."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.acceptance.simulate import row_alphas
from redraft.adaptation.bench import measure
from redraft.adaptation.config import AdaptConfig, claim_run
from redraft.adaptation.models import OpenDraft, contestants, open_draft, open_target, prompt_rows
from redraft.adaptation.replay import replay
from redraft.adaptation.sources import Source
from redraft.adaptation.stages import Say, build_features, check_merge, half, run_training, save_trained
from redraft.artifact import atomic_write_json, read_json
from redraft.data.mixture import mix
from redraft.data.store import Row, read_rows
from redraft.data.template import template_record
from redraft.decode.tree import ChainShape
from redraft.drafts.base import Draft
from redraft.drafts.files import PRIVATE_FILE
from redraft.drafts.formats.base import check_export, check_formats
from redraft.drafts.groups import prepare, trained_parameters
from redraft.evaluate.speed import BenchConfig
from redraft.features.store import FeatureStore, anchors
from redraft.loading import ADAPTER_FILE, notes_of, served_otherwise
from redraft.progress import progress_bar
from redraft.registries import EXPORTERS
from redraft.report.page import build_report
from redraft.select import Scorer, ScoringContext, parse_scorer
from redraft.select.acceptance import alpha_measurer
from redraft.select.manifest import Manifest, read_manifest
from redraft.select.rules import choose, parse_budget
from redraft.starts.apply import StartContext, StartResult, apply_start, start_needs
from redraft.target import Target
from redraft.train.replay import ReplayConfig, check_replayable
from redraft.train.trainer import Trainer, TrainResult


class AdaptRun:
    """One run directory and the stages that fill it. What a stage needs is opened when it is first asked for."""

    def __init__(self, config: AdaptConfig, say: Say = print) -> None:
        """Raises ``UserError`` when the run directory belongs to other settings."""
        self.config, self.say, self.folder = claim_run(config, say), say, config.out
        self.asked_dtype = config.dtype  # auto lets the types compete in the benchmark, whatever the run computes in
        self.ledger = provenance.Ledger.load(self.folder / "ledger.json")

    # -- what the stages work on -------------------------------------------------------------------------------
    @cached_property
    def target(self) -> Target:
        c, target = self.config, self._open(self.config.dtype)
        self.say(f"target {c.target}: {target.verdict()}")
        for note in notes_of(target):
            self.say(f"note on {c.target}: {note}")
        if rounded := served_otherwise(target):
            self.say(
                f"note on {c.target}: it is served with quantised {rounded}; its text, also that of held-out prompts, "
                "is the server's, and what is computed here is near it: measure with redraft bench --server"
            )
        return target

    def _open(self, dtype: str) -> Target:
        c, served = self.config, bool(self.config.server or self.config.responses)
        return open_target(c.target, dtype, c.device, c.adapter, c.template_arg, self.folder, served)

    @property
    def base_target(self) -> Target | None:
        """Opened when it is asked for, and not kept: two targets need twice the memory."""
        c = self.config
        return open_target(c.base_target, c.dtype, c.device) if c.base_target else None

    @cached_property
    def stale(self) -> OpenDraft:
        opened = open_draft(self.config.draft, self.target)
        self.target.tap(opened.draft.config.taps)
        for note in opened.meta.get("notes", []):
            self.say(f"note on {self.config.draft}: {note}")
        return opened

    @cached_property
    def source(self) -> Source:
        return Source(self.config, lambda: self.target, self.ledger, self.say, store_of=lambda: self.store)

    @cached_property
    def store(self) -> FeatureStore:
        identity = {"target": self.target.content_hash(), "taps": list(self.stale.draft.config.taps)}
        return FeatureStore(self.folder / "features", identity)

    # -- stages ------------------------------------------------------------------------------------------------
    def run(self) -> dict[str, Any]:
        """All stages; returns the benchmark's result."""
        # A draft that does not fit, or that no engine could load, must be refused before anything is spent.
        c = self.config
        check_formats(c.exports, self.stale.draft.family)
        for name in c.exports:
            check_export(name, self.stale.draft, self.target, c.gamma)
        check_merge(c.method, c.private_size, c.exports)
        if c.replay:
            check_replayable(self.stale.draft)
        if c.select_on == "prompts":
            self.source.chosen = frozenset(self.select_prompts().selected_keys)
        self.source.write()
        if c.select_on == "responses":
            self.select()
        self.train()
        self.export()
        result = self.bench()
        self.report()
        return result

    def select_prompts(self) -> Manifest:
        """Score every training prompt and keep the budget's worth, before any is answered."""
        if self.selection.exists():
            return read_manifest(self.selection)
        rows = prompt_rows(self.source.prompts[0], self.target)

        def context() -> ScoringContext:
            found = self._scoring_context(self.scorer.needs)
            found.progress = lambda done, total: progress.update(done)
            if found.alpha_of is not None:
                draft = copy.deepcopy(self.stale.draft)
                found.alpha_of = alpha_measurer(draft, self.target, self.folder, found.progress)
            return found

        with progress_bar("select", len(rows), "prompts") as progress:
            return self._choose(rows, "prompts", context, self.scorer.passes)

    def select(self) -> Manifest:
        """Score every response and keep the budget's worth."""
        if self.selection.exists():
            return read_manifest(self.selection)
        rows, needs = self.rows(self.source.responses), self.scorer.needs
        if "alpha_of" in needs:
            self.features("features", rows)
        # The pass behind alpha is that of the features, which have a stage of their own.
        passes = self.scorer.passes - ("alpha_of" in needs)
        return self._choose(rows, "rows", lambda: self._scoring_context(needs), passes, self.source.responses)

    def _choose(
        self,
        rows: Sequence[Any],
        unit: str,
        context: Callable[[], ScoringContext],
        passes: int,
        source: Path | None = None,
    ) -> Manifest:
        """Score, select, write the manifest and account for ``passes`` of the target over ``rows``.

        The context is made in the stage: opening a base target is part of what selection takes.
        """
        c, scorer = self.config, self.scorer
        with self.ledger.stage("select") as entry:
            manifest = choose(scorer, rows, context(), c.budget, source=source)
            manifest.write(self.selection)
            tokens = sum(len(row.prompt_ids) + len(row.response_ids) for row in rows)
            flops = passes * provenance.forward_flops(self.target.parameters_per_token, tokens)
            written = self.selection.stat().st_size
            entry.add(tokens, flops, f"passes of the target * {provenance.FORWARD_FORMULA}", written)
        self.say(f"select: {len(manifest.selected_keys)} of {len(rows)} {unit} by {scorer.name}, budget {c.budget}")
        return manifest

    @property
    def selection(self) -> Path:
        """The manifest of what is trained on, or answered at all."""
        return self.folder / "selection.json"

    @property
    def scorer(self) -> Scorer:
        """The scorer of the settings; the one that costs nothing where everything is kept, whatever its score."""
        return parse_scorer("length" if parse_budget(self.config.budget).whole else self.config.scorer)

    @staticmethod
    def rows(path: Path) -> list[Row]:
        """The rows of a response file that can be supervised."""
        return [row for row in read_rows(path) if anchors(row)]

    def _scoring_context(self, needs: frozenset[str]) -> ScoringContext:
        c = self.config
        return ScoringContext(
            target=self.target,
            base_target=self.base_target if "base_target" in needs else None,
            draft=self.stale.draft,
            alpha_of=self._alpha_of if "alpha_of" in needs else None,
            device=c.device,
            seed=c.seed,
            scratch=self.folder,
        )

    def _alpha_of(self, rows: Sequence[Row]) -> list[float]:
        return row_alphas(self.stale.draft.to(self.target.device), self.target, rows, self.store)

    def features(self, name: str, rows: Sequence[Row]) -> None:
        """Build what is missing of the features of ``rows``."""
        build_features(name, self.store, self.target, rows, self.ledger)

    def train(self) -> TrainResult | None:
        """Train what the method names; save the private part (if it is one) and the merged draft."""
        c, done = self.config, self.folder / "train.json"
        if done.exists():
            return TrainResult(**read_json(done))
        rows, heldout = self.training_rows(), self.rows(self.source.heldout)
        started = self.start(rows)
        draft, names = prepare(started.draft, c.method, c.private_size, c.seed, self.target)
        result = None
        if names:
            self.features("features", rows)
            self.features("features held-out", heldout)
            trainer = Trainer(draft, self.target, self.store, rows, heldout, c.train_config(), self.folder / "train")
            result = run_training(trainer, self.ledger, self.say)
            draft = self.replay(trainer.draft, rows, heldout)
        saved = list(dict.fromkeys([*names, *started.changed]))
        save_trained(self.folder, draft, saved, self.stale, c.method, self.target, c.seed, c.private_size.bits)
        share, total = trained_parameters(draft, c.method), sum(p.numel() for p in draft.parameters())
        part = self.folder / "private" / PRIVATE_FILE
        alone = f", what was trained in {part.parent} ({part.stat().st_size / 1e6:.1f} MB)" if part.exists() else ""
        self.say(f"saved: {share:,} trained of {total:,} parameters; the draft in {self.folder / 'merged'}{alone}")
        if result:
            atomic_write_json(done, asdict(result))
        return result

    def training_rows(self) -> list[Row]:
        """What selection keeps, and the share of general text that guards the draft's other speed."""
        c, rows = self.config, self.rows(self.source.responses)
        if c.select_on == "responses":
            rows = self.select().apply(rows)
        return mix(rows, self.rows(Path(c.general)), c.general_share, c.seed) if c.general else rows

    def start(self, rows: Sequence[Row]) -> StartResult:
        """The draft that training begins with: the old one, or what nearly free adaptations make of it."""
        c = self.config
        if c.start == "none":
            return StartResult(copy.deepcopy(self.stale.draft))
        with self.ledger.stage(f"start {c.start}") as entry, progress_bar(f"start {c.start}", None) as progress:
            general = self.rows(Path(c.general)) if c.general else []
            # Opened only where it is asked for: a second target is the largest thing in memory.
            base = self.base_target if "base_target" in start_needs(c.start) else None
            context = StartContext(self.target, base, rows, general, c.gamma, c.seed, progress.update)
            started = apply_start(c.start, self.stale.draft, context)
            entry.add(started.tokens, started.flops, provenance.FORWARD_FORMULA)
        self.target.tap(started.draft.config.taps)
        for note in started.notes:
            self.say(f"note on start {c.start}: {note}")
        return started

    def replay(self, draft: Draft, rows: Sequence[Row], heldout: Sequence[Row]) -> Draft:
        """The draft after the passes of on-policy replay that the settings ask for (none by default)."""
        c = self.config
        if not c.replay:
            return draft
        settings, folder = ReplayConfig(c.replay), self.folder / "replay"
        replayed, _ = replay(
            draft,
            self.target,
            self.store,
            rows,
            heldout,
            c.train_config(),
            settings,
            folder,
            self.ledger,
            self.say,
        )
        return replayed

    @cached_property
    def aligned(self) -> Draft:
        return open_draft(self.folder / "merged", self.target).draft

    def export(self) -> list[Path]:
        """Write the merged draft for every engine asked for."""
        found = []
        for name in self.config.exports:
            folder = self.folder / f"export-{name}"
            with self.ledger.stage(f"export {name}") as entry:
                export = EXPORTERS.get(name)
                report = export(half(self.aligned), folder, self.target, speculative_tokens=self.config.gamma)
                entry.add(bytes_written=report.bytes)
            for warning in report.warnings:
                self.say(f"note on {folder}: {warning}")
            self.say(f"export {name}: {folder}; serve with: {report.serve}")
            found.append(folder)
        if found and (self.config.adapter or (Path(self.config.target) / ADAPTER_FILE).is_file()):
            self.say("note: the target is an adapter; serve the checkpoint that it was merged into (merge_and_unload)")
        return found

    def bench(self, extra: dict[str, Draft] | None = None) -> dict[str, Any]:
        """Plain decoding, the stale and the aligned draft on the evaluation prompts."""
        c, path = self.config, self.folder / "bench.json"
        if path.exists():
            return json.loads(path.read_text())
        drafts = {"stale": self.stale.draft, "aligned": self.aligned, **(extra or {})}
        prompts = self.source.evaluation()
        began = time.monotonic()
        with self.ledger.stage("bench") as entry:
            result = measure(
                contestants(self.target, self.asked_dtype, self._open),
                drafts,
                prompts,
                BenchConfig(ChainShape(c.gamma), max_new_tokens=c.bench_tokens, seed=c.seed),
                provenance.collect(c.seed, c.device, template_record(self.target.tokenizer)),
                lambda: self._open("float32"),
            )
            entry.add(tokens=sum(d["tokens"] for d in result["drafts"].values()))
        atomic_write_json(path, result)
        self.say(f"bench: {len(prompts)} prompts in {time.monotonic() - began:.0f} s")
        return result

    def report(self) -> Path:
        """The HTML page of this run."""
        curve = self.folder / "train" / "curve.jsonl"
        return build_report(
            [self.folder / "bench.json"],
            self.folder / "report.html",
            curve=curve if curve.exists() else None,
            ledger=self.folder / "ledger.json",
        )
