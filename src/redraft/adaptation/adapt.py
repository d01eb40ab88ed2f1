"""``redraft adapt``: regenerate, select, train, export, bench, report; every stage resumes after a kill."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.adaptation.bench import measure
from redraft.adaptation.cards import run_card
from redraft.adaptation.claim import claim_run
from redraft.adaptation.core import Adaptation, Plan, open_old
from redraft.adaptation.models import (
    Parts,
    contestants,
    open_draft,
    open_target,
    prompt_rows,
    settle_template,
    template_prompts,
)
from redraft.adaptation.runs import AGAIN, Run, Say, row_tokens, supervised_rows
from redraft.adaptation.sources import Source
from redraft.data.pool import Gone
from redraft.data.states import ServedFeatures, StateFolder, StatesEngine, compare, states_of_texts
from redraft.data.store import Row
from redraft.drafts.base import Draft
from redraft.drafts.files import PRIVATE_FILE
from redraft.drafts.formats.base import check_formats
from redraft.drafts.groups import trained_parameters
from redraft.drafts.opening import AnyDraft, OpenDraft
from redraft.errors import UserError
from redraft.evaluate.speed import BenchConfig
from redraft.features import RowFeatures
from redraft.inputs import there, typed
from redraft.reports.card import write_card
from redraft.reports.load import BENCH_SCHEMA, read_bench
from redraft.reports.page import build_report
from redraft.rows import mix
from redraft.selection.manifest import Manifest, choose, read_manifest
from redraft.selection.states import scoring_context
from redraft.settings.runs import AdaptConfig
from redraft.settings.shapes import ChainShape
from redraft.settings.texts import parse_budget, parse_scorer, start_needs, start_runs_target
from redraft.settings.training import ReplayConfig, mergeable
from redraft.starts.apply import StartContext
from redraft.target import Target
from redraft.training.trainer import TrainResult, check_replayable

TRAINED = "redraft.train/1"
# Held-out prompts whose hidden states are compared with the target's own ahead of a run.
CHECKED = 2


class AdaptRun(Run[AdaptConfig]):
    """One run directory and the stages that fill it."""

    def __init__(
        self, config: AdaptConfig, say: Say = print, target: Target | None = None, draft: OpenDraft | None = None
    ) -> None:
        """``target`` and ``draft`` are those that the settings name, where they are open already.

        Raises ``UserError`` when the run directory belongs to other settings.
        """
        super().__init__(claim_run(config, say), say)
        self.old_draft: AnyDraft = config.draft if draft is None else draft
        self.served = bool(config.server or config.responses)
        if target is not None:
            settle_template(target.tokenizer, config.template_arg, config.out)
            self.parts = Parts.of(target)
        # Servers whose states are used.
        self.compared = config.server
        self.asked_dtype = config.dtype  # auto lets the types compete in the benchmark, whatever the run computes in
        # The manifest of what is trained on, or answered at all.
        self.selection = self.folder / "selection.json"

    # -- what the stages work on -------------------------------------------------------------------------------
    def open_base(self) -> Target | None:
        """The base target, opened when it is asked for and not kept: two targets need twice the memory."""
        c = self.config
        return open_target(c.base_target, c.dtype, c.device) if c.base_target else None

    @cached_property
    def job(self) -> Adaptation:
        """The old draft on its way to the aligned one."""
        c = self.config
        plan = Plan(c.method, c.private_size, c.train_config(), c.start, ReplayConfig(c.replay))
        return Adaptation(self.parts, open_old(self.old_draft, self.parts.shown, self.log), plan, self.folder, self.log)

    @property
    def stale(self) -> OpenDraft:
        """The old draft as it is."""
        return self.job.old

    @cached_property
    def aligned(self) -> Draft:
        """The trained draft as it is on disk, in float32."""
        return self.saved.draft

    @cached_property
    def saved(self) -> OpenDraft:
        """What training left in ``merged``."""
        return open_draft(self.folder / "merged", self.parts.shown)

    @cached_property
    def source(self) -> Source:
        states_of = self.states if self.config.states else None
        return Source(self.config, self.parts, self.log, store_of=lambda: self.job.store, states_of=states_of)

    def states(self, servers: Sequence[str] = ()) -> StatesEngine:
        """The ``servers`` that give hidden states along with answers; by default those whose states were compared.
        Raises ``UserError``."""
        c = self.config
        assert c.states
        folder = StateFolder(c.states, self.parts.head, self.stale.draft.taps)
        size = self.facts.vocab_size
        urls = servers or self.compared
        return StatesEngine(urls, folder, c.server_model, c.batch_size, vocab_size=size, say=self.say)

    # -- stages ------------------------------------------------------------------------------------------------
    def _run(self) -> dict[str, Any]:
        """All stages; returns the benchmark's result. Several workers share the training, the first does the rest."""
        with self.workers.first() as mine:
            if mine:
                self.check()
                if self.config.states:
                    self.check_states()
                self.write()
        self.train()
        with self.workers.first() as mine:
            if mine:
                self.export()
                if self.config.bench_prompts:
                    self.bench()
                self.cards()
                if self.config.bench_prompts:
                    self.report()
        return self.bench() if self.config.bench_prompts else {}

    def write(self) -> None:
        """What is trained on, written and chosen."""
        if self.config.select_on == "prompts":
            self.source.chosen = frozenset(self.select().selected_keys)
        self.source.write()
        if self.config.select_on == "responses":
            self.select()

    def check(self) -> None:
        """Refuse, before anything is spent, a draft that does not fit or that no engine could load."""
        c, draft = self.config, self.stale.draft
        check_formats(c.exports, draft.family)
        self.check_exports(draft)
        if c.exports and not mergeable(c.method, c.private_size):
            raise UserError(
                f"method {c.method} with routed experts cannot be merged into a dense draft, so {', '.join(c.exports)} "
                "cannot be exported; choose another method, one expert, or no exports"
            )
        if c.replay:
            check_replayable(draft)

    def check_states(self) -> None:
        """Compare every server's hidden states of the first prompts with the target's own; one that does not answer
        gives none in this run. Raises ``UserError``."""
        prompts = template_prompts(self.source.prompts[1][:CHECKED], self.facts, 1)
        texts, found = [prompt.ids for prompt in prompts], dict[str, list[RowFeatures]]()
        with self.log.stage("check states"):
            for url in self.config.server:
                try:
                    found[url] = states_of_texts(self.states([url]), texts)
                except Gone as error:
                    if not found and url == self.config.server[-1]:
                        raise
                    self.say(f"{error}; this run goes on without it, since its states are not compared")
            self.compared = tuple(found)
            said = compare(found, self.states().states, texts, self.config.adapter)
            self.say(f"states: {said}")
        self.parts.producer = ServedFeatures(self.states())

    def load_target(self) -> Target:
        """The target itself. Raises ``UserError``, also where its layers are at its server alone."""
        if self.config.states:
            raise UserError(
                "this needs the target's own layers, and with --states they are at its server alone; take a --scorer "
                "and a --start that need none, or leave out --states"
            )
        return super().load_target()

    def select(self) -> Manifest:
        """Score every response, or every prompt before any is answered, and keep the budget's worth."""
        if there(self.selection):
            found = read_manifest(self.selection, self.mark)
            if self.config.select_on == "responses":
                mend = f"delete {self.selection} and give the same command again, which selects anew"
                found.check_source(self.source.responses, mend)
            return found
        c, parts, prompts = self.config, self.parts, self.config.select_on == "prompts"
        # Where everything is kept, whatever its score, the scorer is one that costs nothing.
        scorer = parse_scorer("length" if parse_budget(c.budget).whole else c.scorer)
        rows: Sequence[Any] = prompt_rows(self.source.prompts[0], self.facts) if prompts else self.responses()
        store, passes = None, scorer.passes
        if "alpha_of" in scorer.needs and not prompts:
            # The pass behind alpha is that of the features, which have a stage of their own.
            self.job.features("features", rows)
            store, passes = self.job.store, passes - 1
        with self.log.counted("select", len(rows), "prompts" if prompts else "rows") as (entry, progress):
            draft, folder = self.stale.draft, self.folder
            target = parts.model if {"target", "alpha_of"} & scorer.needs else None
            context = scoring_context(scorer, target, draft, self.open_base, c.seed, folder, progress, store)
            manifest = choose(scorer, rows, context, c.budget, source=None if prompts else self.source.responses)
            manifest.write(self.selection, self.mark)
            tokens, formula = row_tokens(rows), f"passes of the target * {provenance.FORWARD_FORMULA}"
            flops = passes * provenance.forward_flops(self.facts.parameters_per_token, tokens)
            entry.add(tokens, flops, formula, self.selection.stat().st_size)
        kept = f"{len(manifest.selected_keys)} of {len(rows)} {'prompts' if prompts else 'rows'}"
        by = "" if parse_budget(c.budget).whole else f" by {scorer.name}"
        self.say(f"select: {kept}{by}, budget {c.budget}")
        return manifest

    def responses(self) -> Sequence[Row]:
        """All answers to train on that can be supervised."""
        return supervised_rows(self.source.responses)

    def train(self) -> TrainResult | None:
        """Train what the method names; save the private part (if it is one) and the merged draft."""
        done = self.finished("train.json", TRAINED)
        if done is not None:
            return typed(TrainResult, done, str(self.folder / "train.json"), AGAIN)
        c, job = self.config, self.job
        rows = self.training_rows()
        job.start(lambda: self.start_context(rows))
        job.prepare()
        if c.general:  # together with answers whose features were kept on the way these would be computed again
            own = {row.key for row in self.responses()}
            with self.workers.first():
                job.features("features general", [row for row in rows if row.key not in own])
        heldout = supervised_rows(self.source.heldout)
        result = job.train(rows, heldout) if job.trained else None
        if not self.workers.writes:
            return result
        new = job.judge(heldout).kept == "new"
        job.save()
        share = trained_parameters(job.draft, c.method) if new else 0
        total, part = sum(p.numel() for p in job.draft.parameters()), self.folder / "private" / PRIVATE_FILE
        alone = f", what was trained in {part.parent} ({part.stat().st_size / 1e6:.1f} MB)" if part.exists() else ""
        self.say(f"saved: {share:,} trained of {total:,} parameters; the draft in {self.folder / 'merged'}{alone}")
        if result:
            self.finish("train.json", TRAINED, asdict(result), "merged", "private")
        return result

    def training_rows(self) -> Sequence[Row]:
        """What selection keeps, and the share of general text that guards the draft's other speed."""
        c, rows = self.config, self.responses()
        if c.select_on == "responses":
            rows = self.select().apply(rows)
        return mix(rows, supervised_rows(Path(c.general)), c.general_share, c.seed) if c.general else rows

    def start_context(self, rows: Sequence[Row]) -> StartContext:
        """What the start of training may use."""
        c = self.config
        base = self.open_base() if "base_target" in start_needs(c.start) else None
        target = self.parts.model if start_runs_target(c.start) else self.parts.head
        return StartContext(target, base, rows, supervised_rows(Path(c.general)) if c.general else [], c.gamma, c.seed)

    def bench(self) -> dict[str, Any]:
        """Plain decoding, the stale and the aligned draft on the evaluation prompts; one that was kept is both."""
        c, done = self.config, self.finished("bench.json", BENCH_SCHEMA)
        if done is not None:
            read_bench(self.folder / "bench.json")
            return done
        prompts, began = self.source.evaluation(c.bench_tokens), time.monotonic()
        drafts = {"stale": self.stale.draft}
        if self.saved.meta.get("guard", {}).get("kept") == "old":
            self.say("bench: the old draft was kept, so it is the only one to be measured")
        else:
            drafts["aligned"] = self.aligned
        with self.log.stage("bench") as entry:
            result = measure(
                contestants(self.target, self.asked_dtype, self.open_target),
                {name: draft.bind(self.target) for name, draft in drafts.items()},
                prompts,
                BenchConfig(ChainShape(c.gamma), max_new_tokens=c.bench_tokens, seed=c.seed),
                self.record(),
                lambda: self.open_target("float32"),
            )
            entry.add(tokens=sum(d["tokens"] for d in result["drafts"].values()))
        self.finish("bench.json", BENCH_SCHEMA, result)
        self.say(f"bench: {len(prompts)} prompts in {time.monotonic() - began:.0f} s")
        return result

    def cards(self) -> None:
        """Those of the exports, and of the drafts that the run keeps."""
        super().cards()
        for name in ("merged", "private"):
            if (self.folder / name).is_dir():
                write_card(self.folder / name, run_card(self.folder, name, self.aligned, self.facts))

    def report(self, page: Path | None = None, summary: Path | None = None) -> Path:
        """The HTML page of this run, with the ``summary`` of a quickstart."""
        curve, ledger = self.folder / "train" / "curve.jsonl", self.folder / "ledger.json"
        page, known = page or self.folder / "report.html", curve if curve.exists() else None
        return build_report([self.folder / "bench.json"], page, known, ledger, summary)
