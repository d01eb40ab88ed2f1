"""``redraft adapt``: regenerate, select, train, export, bench, report; every stage resumes after a kill."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.artifact import atomic_write_json
from redraft.data.overlap import refuse_overlap
from redraft.data.prompts import Conversation, read_conversations
from redraft.data.regenerate import InProcessEngine, ServerEngine, regenerate
from redraft.data.store import Row, read_rows
from redraft.decode.tree import ChainShape
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.drafts.groups import prepare, trained_parameters
from redraft.evaluate.speed import BenchConfig
from redraft.export import EXPORTERS
from redraft.export.base import check_taps
from redraft.loading import ADAPTER_FILE
from redraft.pipeline.bench import measure
from redraft.pipeline.config import AdaptConfig, claim_run
from redraft.pipeline.models import OpenDraft, contestants, open_draft, open_target, split_prompts, template_prompts
from redraft.pipeline.stages import Say, build_features, half, run_training, save_trained
from redraft.progress import progress_bar
from redraft.report.page import build_report
from redraft.sampling import Sampler
from redraft.select import SCORERS, ScoringContext, score_rows
from redraft.select.manifest import Manifest, read_manifest
from redraft.select.rules import parse_budget, select
from redraft.target import Target
from redraft.teacher.features import FeatureStore, anchors
from redraft.teacher.simulate import row_alphas
from redraft.train.loop import Trainer, TrainResult


class AdaptRun:
    """One run directory and the stages that fill it. What a stage needs is opened when it is first asked for."""

    def __init__(self, config: AdaptConfig, say: Say = print) -> None:
        """Raises ``UserError`` when the run directory belongs to other settings."""
        claim_run(config)
        self.config, self.say, self.folder = config, say, config.out
        self.ledger = provenance.Ledger.load(self.folder / "ledger.json")

    # -- what the stages work on -------------------------------------------------------------------------------
    @cached_property
    def target(self) -> Target:
        c = self.config
        return open_target(c.target, c.dtype, c.device, c.adapter)

    @cached_property
    def stale(self) -> OpenDraft:
        opened = open_draft(self.config.draft, self.target)
        self.target.tap(opened.draft.config.taps)
        for note in opened.meta.get("notes", []):
            self.say(f"note on {self.config.draft}: {note}")
        return opened

    @cached_property
    def prompts(self) -> tuple[list[Conversation], list[Conversation], list[Conversation]]:
        """(train, heldout, evaluation)."""
        c = self.config
        conversations = read_conversations(c.prompts)
        if c.eval_prompts is None:
            return split_prompts(conversations, c.heldout_prompts, c.bench_prompts, c.seed)
        evaluation = read_conversations(c.eval_prompts)[: c.bench_prompts]
        refuse_overlap(conversations, evaluation, c.eval_prompts)
        train, heldout, _ = split_prompts(conversations, c.heldout_prompts, 0, c.seed)
        return train, heldout, evaluation

    @cached_property
    def store(self) -> FeatureStore:
        identity = {"target": self.target.content_hash(), "taps": list(self.stale.draft.config.taps)}
        return FeatureStore(self.folder / "features", identity)

    # -- stages ------------------------------------------------------------------------------------------------
    def run(self) -> dict[str, Any]:
        """All stages; returns the benchmark's result."""
        # A draft that does not fit, or that no engine could load, must be refused before anything is spent.
        taps = self.stale.draft.config.taps
        if self.config.exports:
            check_taps(taps)
        self.regenerate()
        self.select()
        self.train()
        self.export()
        result = self.bench()
        self.report()
        return result

    def regenerate(self) -> None:
        """The target writes the training text, and greedy held-out responses for early stopping."""
        c = self.config
        train, heldout, _ = self.prompts
        samplers = [Sampler(t, 0, c.top_p if t else 1.0) for t in c.temperatures]
        self._regenerate("regenerate", train, samplers, self.folder / "responses.jsonl", c.server)
        self._regenerate("regenerate held-out", heldout, [Sampler()], self.folder / "heldout.jsonl", None)

    def _regenerate(
        self, name: str, prompts: Sequence[Conversation], samplers: list[Sampler], path: Path, server: str | None
    ) -> None:
        c, target = self.config, self.target
        local = InProcessEngine(target, c.batch_size)
        engine: Any = ServerEngine(server, c.server_model, c.batch_size) if server else local
        with self.ledger.stage(name) as entry, progress_bar(name, len(prompts) * len(samplers), "rows") as progress:
            report = regenerate(
                engine,
                prompts,
                target.tokenizer,
                samplers,
                path,
                c.max_new_tokens,
                c.seed,
                target.content_hash(),
                progress.update,
                eos_ids=target.eos_ids,
                context=target.context,
            )
            tokens = report.prompt_tokens + report.response_tokens
            flops = provenance.forward_flops(target.parameters_per_token, tokens)
            entry.add(tokens, flops, provenance.FORWARD_FORMULA, report.bytes_written)
        self.say(f"{name}: {report.summary()}")

    def select(self) -> Manifest:
        """Score every response and keep the budget's worth."""
        c, path = self.config, self.folder / "selection.json"
        source = self.folder / "responses.jsonl"
        if path.exists():
            return read_manifest(path)
        rows = [r for r in read_rows(source) if anchors(r)]
        scorer = SCORERS.get(c.scorer)()
        if "alpha_of" in scorer.needs:
            self.features("features", rows)
        with self.ledger.stage("select") as entry:
            context = self._scoring_context(scorer.needs)
            scores = score_rows(scorer, rows, context)
            manifest = select(
                rows,
                scores,
                parse_budget(c.budget),
                scorer=c.scorer,
                settings=scorer.settings,
                source=source,
            )
            manifest.write(path)
            tokens = sum(len(r.prompt_ids) + len(r.response_ids) for r in rows)
            entry.add(tokens=tokens, bytes_written=path.stat().st_size)
        self.say(f"select: {len(manifest.selected_keys)} of {len(rows)} rows by {c.scorer}, budget {c.budget}")
        return manifest

    def _scoring_context(self, needs: frozenset[str]) -> ScoringContext:
        c = self.config
        base = None
        if "base_target" in needs and c.base_target:
            base = open_target(c.base_target, c.dtype, c.device)
        return ScoringContext(
            target=self.target,
            base_target=base,
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
            return TrainResult(**json.loads(done.read_text()))
        rows = self.select().apply([r for r in read_rows(self.folder / "responses.jsonl") if anchors(r)])
        heldout = [r for r in read_rows(self.folder / "heldout.jsonl") if anchors(r)]
        draft, names = prepare(copy.deepcopy(self.stale.draft), c.method, c.private_size, c.seed)
        result = None
        if names:
            self.features("features", rows)
            self.features("features held-out", heldout)
            trainer = Trainer(draft, self.target, self.store, rows, heldout, c.train_config(), self.folder / "train")
            result = run_training(trainer, self.ledger, self.say)
            draft = trainer.draft
        save_trained(self.folder, draft, names, self.stale, c.method, self.target, c.seed)
        share, total = trained_parameters(draft, c.method), sum(p.numel() for p in draft.parameters())
        self.say(f"saved: {share:,} trained of {total:,} parameters; the dense draft is in {self.folder / 'merged'}")
        if result:
            atomic_write_json(done, asdict(result))
        return result

    @cached_property
    def aligned(self) -> Eagle3Draft:
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

    def bench(self, extra: dict[str, Eagle3Draft] | None = None) -> dict[str, Any]:
        """Plain decoding, the stale and the aligned draft on the evaluation prompts."""
        c, path = self.config, self.folder / "bench.json"
        if path.exists():
            return json.loads(path.read_text())
        drafts = {"stale": self.stale.draft, "aligned": self.aligned, **(extra or {})}
        prompts = template_prompts(self.prompts[2], self.target, c.bench_tokens)
        began = time.monotonic()
        with self.ledger.stage("bench") as entry:
            result = measure(
                contestants(self.target, c.dtype, lambda d: open_target(c.target, d, c.device, c.adapter)),
                drafts,
                prompts,
                BenchConfig(ChainShape(c.gamma), max_new_tokens=c.bench_tokens, seed=c.seed),
                provenance.collect(seed=c.seed, device=c.device),
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
