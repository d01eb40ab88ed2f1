"""``redraft distill``: a drafter of one's own. Pretrain, let the target answer, align; every stage resumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, cast

from redraft import provenance
from redraft.acceptance.simulate import simulate_greedy_chain, tau_of
from redraft.adaptation.claim import claim_run
from redraft.adaptation.core import build_features, draft_meta, feature_store
from redraft.adaptation.models import Parts, open_any, settle_template
from redraft.adaptation.runs import AGAIN, Run, Say, half, row_tokens, supervised_rows
from redraft.adaptation.sources import Source
from redraft.data.packed import PackedText, TextSource
from redraft.data.server import ServerEngine, ask_tops
from redraft.data.store import Row
from redraft.drafts.base import is_private
from redraft.drafts.files import load_draft, save_draft, save_private
from redraft.drafts.groups import prepare
from redraft.drafts.standalone import StandaloneDraft
from redraft.drafts.standalone.objective import StateTeacher, Teacher
from redraft.drafts.standalone.shapes import fresh_standalone, shape_for
from redraft.errors import UserError
from redraft.features import ComputedFeatures, FeatureStore
from redraft.inputs import typed
from redraft.loading import check_tokenizers, read_facts
from redraft.rows import anchors
from redraft.settings.runs import DistillConfig
from redraft.settings.training import PrivateSize
from redraft.target import Head
from redraft.training.causal import TokenTeacher, TopTeacher, distil, pretrain
from redraft.training.loop import LoopResult

# What is trained of a drafter where private experts are asked for.
METHOD = "eda"
DISTILL, TEXT, TRAINED = "redraft.distill/1", "redraft.text/1", "redraft.train/1"


class DistillRun(Run[DistillConfig]):
    """One run directory: ``pretrained``, ``responses.jsonl``, ``draft`` (and ``private``), ``export-*``."""

    def __init__(self, config: DistillConfig, say: Say = print) -> None:
        """Raises ``UserError`` when the run directory belongs to other settings."""
        super().__init__(claim_run(config, say), say)

    # -- what the stages work on -------------------------------------------------------------------------------
    @cached_property
    def parts(self) -> Parts:
        """The target; of one that is behind a server alone, what config and tokenizer say."""
        c = self.config
        if not c.server_only:
            parts = self.named_parts()
            parts.tap(())  # the draft reads none of its states; only the head's input is kept
            return parts
        served = read_facts(c.target, device=c.device)
        settle_template(served.tokenizer, c.template_arg, self.folder)
        return Parts.of(served)

    @cached_property
    def source(self) -> Source:
        c = self.config
        store_of = (lambda: self.store) if c.teacher == "states" and c.store_states else None
        return Source(c, self.parts, self.log, store_of)

    @cached_property
    def store(self) -> FeatureStore:
        """The target's final-norm states of the responses."""
        return feature_store(self.folder / "features", self.facts, ())

    def text(self, length: int) -> PackedText:
        """The plain text in blocks of ``length``, its held-out share apart."""
        c = self.config
        share = 0.0 if c.heldout_text else c.heldout_share
        return PackedText(TextSource(c.text, c.text_field), self.facts.tokenizer, length, c.seed, share)

    # -- stages ------------------------------------------------------------------------------------------------
    def _run(self) -> dict[str, Any]:
        """All stages; returns the record of the run, ``distill.json``."""
        with self.workers.first() as mine:
            if mine:
                self.check()
                self.survey()
        done = {"pretrain": self.pretrain(), "align": self.align()}
        with self.workers.first() as mine:
            if mine:
                self.export()
                self.finish("distill.json", DISTILL, self.summary(done))
        return self.finished("distill.json", DISTILL) or {}

    def check(self) -> None:
        """Refuse, before anything is spent, what no engine could load."""
        if self.config.exports and not (self.folder / "align.json").exists():
            given = self.config.draft
            self.check_exports(self.start() if given is None else open_any(given, self.facts).draft)

    def summary(self, done: dict[str, LoopResult | None]) -> dict[str, Any]:
        """What a finished run says of itself."""
        return {
            "schema": DISTILL,
            **{name: asdict(result) if result else None for name, result in done.items()},
            "parameters": sum(p.numel() for p in self.aligned.parameters()),
            "parameters_per_token": self.aligned.parameters_per_token,
            "target_parameters_per_token": self.facts.parameters_per_token,
            "provenance": self.record(),
        }

    def survey(self) -> None:
        """Read all local text once: a bad byte must not be met after hours. Raises ``UserError``."""
        if not self.config.text or self.finished("text.json", TEXT) is not None:
            return
        names = [*self.config.text, *filter(None, [self.config.heldout_text])]
        with self.log.stage("survey"):
            size = TextSource(names, self.config.text_field).survey()
        self.finish("text.json", TEXT, {"files": names, "bytes": size})
        self.say(f"text: {size:,} bytes in local files")

    def start(self) -> StandaloneDraft:
        """The untrained drafter of the shape asked for. Raises ``UserError`` when there is none."""
        c = self.config
        shape = None if c.from_layers else shape_for(self.facts, c.size, c.layers, c.tied)
        # What a new drafter takes over of the target, where it does.
        parts = self.parts
        target = parts.model if c.from_layers else parts.head if c.embeddings == "target" else self.facts
        return fresh_standalone(target, shape, c.seed, c.embeddings, c.tied, c.from_layers)

    def pretrain(self) -> LoopResult | None:
        """A new drafter, trained on the text, in ``pretrained``; nothing where a drafter is given."""
        c = self.config
        if c.draft is not None:
            return None
        done = self.finished("pretrain.json", TRAINED)
        if done is not None:
            return typed(LoopResult, done, str(self.folder / "pretrain.json"), AGAIN)
        config, draft = c.pretrain_config(), self.start()
        share = draft.parameters_per_token / self.facts.parameters_per_token
        self.say(f"drafter: {draft.parameters_per_token:,} parameters a token, {share:.3f} of the target's")
        text, heldout = self.text(config.length), None
        if c.heldout_text:
            heldout = PackedText(TextSource([c.heldout_text], c.text_field), self.facts.tokenizer, config.length)
        total = config.steps * config.batch_blocks * config.length
        with self.log.counted("pretrain", total) as (entry, progress):
            place = self.folder / "pretrain"
            result = pretrain(draft.model, text, config, place, progress, heldout, self.workers)
            flops = provenance.train_flops(draft.parameters_per_token, result.tokens)
            entry.add(result.tokens, flops, provenance.TRAIN_FORMULA)
        with self.workers.first() as mine:
            if mine:
                save_draft(self.folder / "pretrained", draft, self.meta("pretrain"))
                self.finish("pretrain.json", TRAINED, asdict(result), "pretrained")
        self.say(f"pretrain: held-out perplexity {result.start:,.1f} -> {result.best:,.2f} in {result.steps} steps")
        return result

    def responses(self) -> tuple[Sequence[Row], Sequence[Row]]:
        """(train, held-out) responses of the target that can be supervised."""
        with self.workers.first() as mine:
            if mine:
                self.source.write()
        train, heldout = supervised_rows(self.source.responses), supervised_rows(self.source.heldout)
        if not train or not heldout:
            raise UserError("no response has two or more tokens to train or to evaluate on; ask for longer answers")
        return train, heldout

    def teacher(self, rows: Sequence[Row]) -> Teacher:
        """What the target is known by. Raises ``UserError`` for a server that does not tell it."""
        c = self.config
        if c.teacher == "tokens":
            return TokenTeacher(self.facts.vocab_size)
        if c.teacher == "tops":
            size = self.facts.vocab_size
            engine = ServerEngine(c.server, c.server_model, c.batch_size, vocab_size=size, say=self.say)
            with self.workers.first(), self.log.counted("log-probabilities", len(rows), "rows") as (_, progress):
                found = ask_tops(engine, c.top_logprobs, rows, self.folder / "tops.jsonl", progress.update)
            return TopTeacher(found, size)
        if not c.store_states:
            return StateTeacher(self.parts.model, ComputedFeatures(self.parts.model))
        with self.workers.first():
            build_features("features", self.store, self.parts, rows, self.log)
        return StateTeacher(self.parts.head, self.store)

    def drafter(self) -> tuple[StandaloneDraft, str]:
        """What alignment starts from, in float32, with what it trains requiring a gradient; and the hash of the
        drafter that private experts are added to."""
        c = self.config
        opened = open_any(c.draft or self.folder / "pretrained", self.facts)
        draft: Any = opened.draft
        for note in opened.meta.get("notes", []):
            self.say(f"note on {opened.source}: {note}")
        check_tokenizers(draft.tokenizer, self.facts.tokenizer)
        draft.requires_grad_(True)
        base_hash = draft.base_hash()
        if c.private_width:
            draft, _ = prepare(draft, METHOD, PrivateSize(width=c.private_width), c.seed)
            draft.bind(self.facts)
        return draft, base_hash

    def align(self) -> LoopResult:
        """The drafter, taught by the target, in ``draft``; its private part also in ``private``."""
        c, done = self.config, self.finished("align.json", TRAINED)
        rows, heldout = self.responses()  # also of a run that has ended: what is damaged of them is told, or mended
        if done is not None:
            return typed(LoopResult, done, str(self.folder / "align.json"), AGAIN)
        config, (draft, base_hash) = c.align_config(), self.drafter()
        teacher = self.teacher(rows)
        text = self.text(config.text_length) if config.text_share else None
        total = round(config.epochs * sum(map(anchors, rows)) / (1 - config.text_share))
        with self.log.counted("align", total) as (entry, progress):
            measure, place = self.efficiency(draft, heldout), self.folder / "align"
            result = distil(draft.model, teacher, rows, config, place, measure, text, progress, self.workers)
            trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
            read = row_tokens(rows) / sum(map(anchors, rows))
            flops = provenance.train_flops(draft.parameters_per_token, round(result.tokens * read))
            entry.add(result.tokens, flops, f"{provenance.TRAIN_FORMULA} (prompts read)")
        with self.workers.first() as mine:
            if mine:
                self.save(draft, base_hash)
                self.finish("align.json", TRAINED, asdict(result), "draft", "private")
        why = "stopped early" if result.stopped_early else "whole budget"
        self.say(
            f"align: held-out block efficiency {result.start:.3f} -> {result.best:.3f} at gamma {config.gamma}, "
            f"{trained:,} trained parameters, {result.steps} steps ({why})"
        )
        return result

    def save(self, draft: StandaloneDraft, base_hash: str) -> None:
        """The finished drafter in ``draft``; its private part also in ``private``."""
        stored, meta = half(draft), self.meta(METHOD if self.config.private_width else "full")
        if self.config.private_width:
            names = filter(is_private, stored.state_dict())
            save_private(self.folder / "private", stored, names, base_hash, meta)
        save_draft(self.folder / "draft", stored, meta)

    def efficiency(self, draft: StandaloneDraft, heldout: Sequence[Row]) -> Callable[[], float]:
        """Tokens a target call on the held-out responses, as the draft stands when it is asked."""
        gamma, target = self.config.align_config().gamma, cast(Head, self.facts)  # the draft reads nothing of its head
        return lambda: tau_of(simulate_greedy_chain(draft, target, heldout, None, gamma), list(heldout))

    @cached_property
    def aligned(self) -> StandaloneDraft:
        """The finished drafter as it is on disk."""
        return load_draft(self.folder / "draft")[0].bind(self.facts)

    def meta(self, method: str) -> dict[str, Any]:
        """What a saved drafter says of itself."""
        return draft_meta(self.facts, method, self.config.seed)
