"""What the cells of one target share: answers, features, selections, starts and evaluation sets, each made once.

Everything is kept in the target's folder and found again by a resumed study. Row ids carry the name of their data
(``regenerated:gsm8k/12``), so that one feature store holds all of a target's rows.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.acceptance.simulate import row_alphas
from redraft.adaptation.models import OpenDraft, PromptRow, open_draft, open_target
from redraft.adaptation.study.config import StudyConfig
from redraft.adaptation.study.entries import NONE, DataEntry, SelectionEntry, TargetEntry
from redraft.adaptation.study.sources import Prompts, first_turn, read_prompts, read_sources, without_overlap
from redraft.artifact import atomic_write_json, read_json
from redraft.data.mixture import mix
from redraft.data.overlap import refuse_overlap, trained_conversations
from redraft.data.prompts import Conversation
from redraft.data.references import reference_rows
from redraft.data.regenerate import InProcessEngine, Kept, expected_rows, regenerate
from redraft.data.store import Row, read_rows
from redraft.data.traces import read_traces
from redraft.decode.tree import DynamicTree, StaticTree
from redraft.errors import UserError
from redraft.features.store import FeatureStore
from redraft.rows import anchors
from redraft.sampling import Sampler
from redraft.select import ScoringContext, parse_scorer, score_rows
from redraft.select.acceptance import alpha_measurer
from redraft.select.rules import parse_budget, select
from redraft.target import Target

Tell = Callable[[str, int, int], None]
"""(what is being done, done, total): for a line of progress."""

GREEDY, SAMPLED, GENERAL, GENERAL_BASE = "greedy", "sampled", "general", "general-base"
TREE = "-tree"  # behind the name of a set that is walked as a tree too


def row_tokens(rows: Sequence[Row]) -> int:
    """Prompt and response tokens of all rows."""
    return sum(len(row.prompt_ids) + len(row.response_ids) for row in rows)


def slug(text: str) -> str:
    """A file name that can be read, and differs for different texts."""
    plain = re.sub(r"[^A-Za-z0-9_+.-]+", "_", text).strip("_")
    return f"{plain[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass
class Costs:
    """FLOPs and seconds of one cell by stage."""

    flops: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, flops: int, seconds: float) -> None:
        self.flops[stage] = self.flops.get(stage, 0) + int(flops)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def join(self, other: Costs) -> None:
        for stage, flops in other.flops.items():
            self.add(stage, flops, other.seconds[stage])


@dataclass
class Selected:
    """What a cell trains on, and what it cost to get there; ``paid``: the stages of features that are in that cost."""

    rows: list[Row]
    of_rows: int
    of_tokens: int
    costs: Costs
    paid: frozenset[str]


@dataclass
class Asked:
    """One evaluation set: a model, its answers, and where their features are."""

    model: Model
    rows: list[Row]
    sampler: Sampler
    tasks: list[str]
    tree: StaticTree | DynamicTree | None = None

    def to_dict(self) -> dict[str, Any]:
        """What a result file needs to make tau from rounds."""
        tokens = [anchors(row) for row in self.rows]
        names = {"answers_of": self.model.name, "sampler": self.sampler.describe()}
        if self.tree is not None:
            names["tree"] = self.tree.describe()
        return {**names, "prompts": [row.id for row in self.rows], "tasks": self.tasks, "tokens": tokens}


class Model:
    """A target with its own answers and features in a folder."""

    def __init__(
        self, opener: Callable[[], Target], name: str, folder: Path, config: StudyConfig, ledger: Any, tell: Tell
    ) -> None:
        self._opener, self.name, self.folder, self.config = opener, name, folder, config
        self.ledger, self.tell = ledger, tell
        self.stores: dict[tuple[int, ...], FeatureStore] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def target(self) -> Target:
        return self._opener()

    def answer(
        self,
        name: str,
        conversations: Sequence[Conversation],
        samplers: Sequence[Sampler],
        max_new_tokens: int,
        taps: tuple[int, ...],
    ) -> list[Row]:
        """The target's answers, from the file of this name or made now, with ids that begin with the name.

        What the target computes at the ``taps`` while it writes is kept as the rows' features.
        """
        path, target = self.folder / f"{name}.jsonl", self.target
        target.tap(taps)
        stage, total = f"{self.name}: generate {name}", expected_rows(conversations, samplers)
        with self.ledger.stage(stage) as entry:
            report = regenerate(
                InProcessEngine(target, self.config.batch_size),
                conversations,
                target.tokenizer,
                list(samplers),
                path,
                max_new_tokens,
                self.config.seed,
                target.content_hash(),
                lambda done, **_: self.tell(stage, done, total),
                eos_ids=target.eos_ids,
                context=target.context,
                features=NamedKeeper(name, self.store(taps)),
            )
            tokens = report.prompt_tokens + report.response_tokens
            flops = provenance.forward_flops(target.parameters_per_token, tokens)
            entry.add(tokens, flops, provenance.FORWARD_FORMULA, report.bytes_written)
        # The file is in the order in which answers came in, which a resumed run need not repeat.
        place = {conversation.id: number for number, conversation in enumerate(conversations)}
        rows = sorted(read_rows(path), key=lambda row: (place[row.id], row.turn, row.temperature))
        return named(name, rows)

    def store(self, taps: tuple[int, ...]) -> FeatureStore:
        """The features of this model at these taps."""
        if taps not in self.stores:
            identity = {"target": self.target.content_hash(), "taps": list(taps)}
            self.stores[taps] = FeatureStore(self.folder / f"features-{'-'.join(map(str, taps))}", identity)
        return self.stores[taps]

    def features(self, name: str, rows: Sequence[Row], taps: tuple[int, ...]) -> FeatureStore:
        """The store for these taps, with the features of all ``rows`` in it. Raises ``UserError``."""
        target, store = self.target, self.store(taps)
        if any(row.key not in store.index for row in rows if anchors(row)):
            target.tap(taps)
            stage, total = f"{self.name}: {features_stage(name, taps)}", row_tokens(rows)
            with self.ledger.stage(stage) as entry:
                tokens = store.build(target, rows, progress=lambda done: self.tell(stage, done, total))
                flops = provenance.forward_flops(target.parameters_per_token, tokens)
                entry.add(tokens, flops, provenance.FORWARD_FORMULA)
        return store

    def spent_on(self, stage: str, tokens: int) -> int:
        """FLOPs of the target's pass over ``tokens``, or over as many as the stage had: kept features need none."""
        passed = sum(entry.tokens for entry in self.ledger.stages if entry.stage == f"{self.name}: {stage}")
        return provenance.forward_flops(self.target.parameters_per_token, min(tokens, passed))

    def seconds_of(self, stage: str, tokens: int) -> float:
        """The part of a stage's seconds that falls to ``tokens`` of those that it worked on."""
        for entry in self.ledger.stages:
            if entry.stage == f"{self.name}: {stage}" and entry.tokens:
                return float(entry.seconds * min(1.0, tokens / entry.tokens))
        return 0.0


def features_stage(name: str, taps: Sequence[int]) -> str:
    """The pass that makes features of these rows; where generation kept those of other taps, it did not make these."""
    return f"features {name} at {','.join(map(str, taps))}"


class NamedKeeper:
    """Puts features into a store under the rows' names in the study."""

    def __init__(self, name: str, store: FeatureStore) -> None:
        self.name, self.store = name, store

    def put(self, found: Sequence[Kept]) -> bool:
        return self.store.put([(renamed(self.name, row), taps, hidden) for row, taps, hidden in found])


def renamed(name: str, row: Row) -> Row:
    return replace(row, id=f"{name}:{row.id}")


def named(name: str, rows: Sequence[Row]) -> list[Row]:
    """The rows that have a position to train or measure at, with ids that begin with ``name``."""
    return [renamed(name, row) for row in rows if anchors(row)]


class TargetWork(Model):
    """A target of the study."""

    def __init__(
        self, name: str, folder: Path, config: StudyConfig, ledger: Any, tell: Tell, bases: dict[str, Model]
    ) -> None:
        entry = config.targets[name]
        super().__init__(
            lambda: open_target(entry.target, config.dtype, config.device, entry.adapter, config.template_arg, folder),
            name,
            folder / "targets" / name,
            config,
            ledger,
            tell,
        )
        self.entry: TargetEntry = entry
        self.root, self.bases = folder, bases
        self._rows: dict[str, list[Row]] = {}
        self._opened: dict[str, OpenDraft] = {}
        self._selected: dict[tuple[str, str], Selected] = {}

    # -- prompts and rows ------------------------------------------------------------------------------------------
    @cached_property
    def prompts(self) -> Prompts:
        e, c = self.entry, self.config
        return read_prompts(e.prompts, e.evaluation, e.heldout_prompts, c.seed, c.longest_prompt, e.drop_overlap)

    @cached_property
    def general(self) -> list[Conversation]:
        """General prompts to measure on, none of them trained on. Raises ``UserError``."""
        assert self.config.general is not None
        found = [first_turn(c) for c in read_sources(self.config.general.prompts, self.config.longest_prompt)]
        refuse_overlap([*self.prompts.train, *self.prompts.heldout], found, "the general prompts")
        return found

    @cached_property
    def general_rows(self) -> list[Row]:
        """The target's answers to general prompts that may be mixed in; none of them is measured on."""
        general = self.config.general
        assert general is not None
        measured = [*self.general, *(c for part in self.prompts.evaluation.values() for c in part)]
        mixable = without_overlap(read_sources(general.mix, self.config.longest_prompt), measured)
        return self.answer("general-mix", mixable, [Sampler()], self.config.max_new_tokens, self.taps)

    @cached_property
    def heldout(self) -> list[Row]:
        """Greedy answers for early stopping, the same for every cell."""
        return self.answer("heldout", self.prompts.heldout, [Sampler()], self.config.max_new_tokens, self.taps)

    def rows(self, name: str) -> list[Row]:
        """The training rows of a data entry, before selection. Raises ``UserError`` when there are none."""
        if name not in self._rows:
            found = self._make_rows(name, self.config.data[name])
            if not found:
                raise UserError(f"data {name}: no row of {self.name} has two response tokens to train on")
            self._rows[name] = found
        return self._rows[name]

    def known_rows(self) -> dict[str, list[Row]]:
        """Rows of every data entry that has been asked for."""
        return dict(self._rows)

    def _make_rows(self, name: str, entry: DataEntry) -> list[Row]:
        tokens = entry.max_new_tokens or self.config.max_new_tokens
        target, hash = self.target, self.target.content_hash()
        limits: dict[str, Any] = {
            "eos_ids": target.eos_ids,
            "max_new_tokens": tokens,
            "context": target.context,
        }
        if entry.kind == "reference":
            return named(name, reference_rows(self.prompts.train, target.tokenizer, hash, failures=[], **limits))
        if entry.kind == "traces":
            assert entry.path is not None
            rows = read_traces(entry.path, target.tokenizer, hash, vocab_size=target.vocab_size, **limits)
            trained = list(trained_conversations(rows, target.tokenizer))
            for task, found in {**self.prompts.evaluation, "held-out": self.prompts.heldout}.items():
                refuse_overlap(trained, found, f"{task} of target {self.name}")
            return named(name, rows)
        samplers = [Sampler(t, 0, entry.top_p if t else 1.0) for t in entry.temperatures]
        asked = self._self_prompts(name, entry.prompts) if entry.prompts else self.prompts.train
        return self.answer(name, asked, samplers, tokens, self.taps)

    def _self_prompts(self, name: str, count: int) -> list[Conversation]:
        """Questions that the target wrote itself, none of them measured on. Raises ``UserError``."""
        from redraft.data.selfprompts import self_prompts

        stage = f"{self.name}: generate {name} questions"
        with self.ledger.stage(stage) as entry:
            found, report = self_prompts(
                self.target,
                count,
                self.config.seed,
                self.questions_path(name),
                batch_size=self.config.batch_size,
                progress=lambda done, **_: self.tell(stage, done, count),
            )
            flops = provenance.forward_flops(self.target.parameters_per_token, report.tokens)
            entry.add(report.tokens, flops, provenance.FORWARD_FORMULA)
        measured = [c for part in self.prompts.evaluation.values() for c in part]
        return without_overlap(found, [*measured, *self.prompts.heldout])

    def questions_path(self, name: str) -> Path:
        return self.folder / f"{name}-questions.jsonl"

    # -- drafts ----------------------------------------------------------------------------------------------------
    def opened(self, start: str) -> OpenDraft:
        """The untrained draft of a start: the target's stale one, or another that the start names."""
        source = self.config.start_of(start).draft or self.entry.draft
        if source not in self._opened:
            base = self.entry.base_draft if source == self.entry.draft else None
            self._opened[source] = open_draft(source, self.target, base)
        return self._opened[source]

    @property
    def taps(self) -> tuple[int, ...]:
        """What the stale draft reads of the target."""
        return tuple(self.opened(NONE).draft.config.taps)

    @property
    def base(self) -> Model:
        """The target that the stale draft was made for. Raises ``UserError`` when none is named."""
        if self.entry.base_target is None:
            raise UserError(f"the target {self.name} names no base target; give its base_target")
        return self.bases[self.entry.base_target]

    # -- evaluation ------------------------------------------------------------------------------------------------
    @cached_property
    def sets(self) -> dict[str, Asked]:
        """What every draft is measured on, by name; answers are made once."""
        config = self.config
        asked = {c.id: (first_turn(c), task) for task, part in self.prompts.evaluation.items() for c in part}
        found = {}
        for name, sampler in ((GREEDY, Sampler()), (SAMPLED, Sampler(config.temperature))):
            turns = [turn for turn, _ in asked.values()]
            rows = self.answer(f"evaluation-{name}", turns, [sampler], config.evaluation_tokens, self.taps)
            tasks = [asked[row.id.partition(":")[2]][1] for row in rows]
            found[name] = Asked(self, rows, sampler, tasks)
        if tree := config.tree_shape:
            found |= {name + TREE: replace(asked_set, tree=tree) for name, asked_set in found.items()}
        if config.general is not None:
            models = {GENERAL: self, **({GENERAL_BASE: self.base} if self.entry.base_target else {})}
            for name, model in models.items():
                rows = model.answer(GENERAL, self.general, [Sampler()], config.evaluation_tokens, self.taps)
                found[name] = Asked(model, rows, Sampler(), [GENERAL] * len(rows))
        return found

    # -- selection -------------------------------------------------------------------------------------------------
    def select(self, data: str, selection: str) -> Selected:
        """The rows that a cell trains on, with the costs of making and choosing them. Raises ``UserError``."""
        if (data, selection) not in self._selected:
            self._selected[data, selection] = self._select(data, self.config.selection_of(selection))
        return self._selected[data, selection]

    def _select(self, data: str, entry: SelectionEntry) -> Selected:
        rows, costs, paid = self.rows(data), Costs(), frozenset[str]()
        kept = generated = rows
        if entry.scorer is not None:
            scored, scores, flops, seconds = self._scores(data, entry)
            scorer = parse_scorer(entry.scorer)
            budget, settings = parse_budget(entry.budget), scorer.settings
            manifest = select(scored, scores, budget, entry.order, scorer=scorer.name, settings=settings)
            chosen = set(manifest.selected_keys)
            if entry.on == "prompts":
                kept = generated = [row for row in rows if row.id in chosen]
            else:
                kept = [row for row in rows if row.key in chosen]
            costs.add("selection", flops, seconds)
            if entry.reads_features:
                stage, tokens = features_stage(data, self.taps), row_tokens(rows)
                costs.add("selection", self.spent_on(stage, tokens), self.seconds_of(stage, tokens))
                paid = frozenset([stage])
        if self.config.data[data].kind in ("regenerated", "self"):
            self._generation(data, generated, costs)
        if self.config.data[data].kind == "self":
            # The answers of a selection may be spared, the questions that it chooses from may not.
            self._generation(f"{data} questions", read_rows(self.questions_path(data)), costs)
        if entry.general:
            before = {row.key for row in kept}
            kept = mix(kept, self.general_rows, entry.general, self.config.seed)
            self._generation("general-mix", [row for row in kept if row.key not in before], costs)
        return Selected(kept, len(rows), sum(map(anchors, rows)), costs, paid)

    def _generation(self, name: str, rows: Sequence[Row], costs: Costs) -> None:
        tokens = row_tokens(rows)
        flops = provenance.forward_flops(self.target.parameters_per_token, tokens)
        costs.add("generation", flops, self.seconds_of(f"generate {name}", tokens))

    def _scores(self, data: str, entry: SelectionEntry) -> tuple[list[Any], list[float], int, float]:
        """(what is scored, scores, FLOPs, seconds); scores are kept in a file, for every budget is cut from them."""
        assert entry.scorer is not None
        rows: list[Any] = list(self.rows(data))
        if entry.on == "prompts":
            rows = list({row.id: PromptRow(row.id, row.prompt_ids) for row in reversed(rows) if row.turn == 0}.values())
        path = self.folder / "scores" / f"{slug(f'{data} {entry.on} {entry.scorer}')}.json"
        if not path.exists():
            if entry.reads_features:
                self.features(data, rows, self.taps)
            stage = f"{self.name}: score {data} by {entry.scorer} on {entry.on}"
            with self.ledger.stage(stage) as work:
                scores, flops = self._score(rows, entry, stage)
                work.add(row_tokens(rows), flops, provenance.FORWARD_FORMULA)
            seconds = next(e.seconds for e in self.ledger.stages if e.stage == stage)
            found = {row.key: score for row, score in zip(rows, scores, strict=True)}
            atomic_write_json(path, {"flops": flops, "seconds": seconds, "scores": found})
        stored = read_json(path)
        return rows, [stored["scores"][row.key] for row in rows], stored["flops"], stored["seconds"]

    def _score(self, rows: Sequence[Any], entry: SelectionEntry, stage: str) -> tuple[list[float], int]:
        assert entry.scorer is not None
        scorer, target = parse_scorer(entry.scorer), self.target
        draft = copy.deepcopy(self.opened(NONE).draft).to(target.device)
        tokens = row_tokens(rows)

        def alpha_of(wanted: Sequence[Any]) -> list[float]:
            if entry.reads_features:
                return row_alphas(draft, target, wanted, self.store(self.taps))
            return alpha_measurer(draft, target, self.folder)(wanted)

        context = ScoringContext(
            target=target,
            base_target=self.base.target if "base_target" in scorer.needs else None,
            draft=draft,
            alpha_of=alpha_of if "alpha_of" in scorer.needs else None,
            device=target.device,
            seed=self.config.seed,
            progress=lambda done, total: self.tell(stage, done, total),
            scratch=self.folder,
        )
        scores, passes = score_rows(scorer, rows, context), scorer.passes
        flops = 0
        if "alpha_of" in scorer.needs:
            flops = provenance.forward_flops(draft.parameters_per_token, tokens)
            # Its pass of the target is for features: of responses they are kept, or have a stage of their own.
            passes -= entry.reads_features
        return scores, flops + passes * provenance.forward_flops(target.parameters_per_token, tokens)
