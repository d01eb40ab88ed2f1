"""What the cells of one target share: prompts, rows, untrained drafts and the sets that every draft is measured on.

Everything is made once, kept in the target's folder and found again by a resumed study.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from redraft.adaptation.models import open_draft, open_target
from redraft.adaptation.runs import Log
from redraft.adaptation.sources import ask_itself
from redraft.adaptation.study.answers import Model, named
from redraft.adaptation.study.sources import Prompts, first_turn, read_prompts, read_sources
from redraft.data.answers import reference_rows
from redraft.data.overlap import refuse_overlap, trained_conversations, without_overlap
from redraft.data.prompts import Conversation
from redraft.data.store import Row
from redraft.data.traces import read_traces
from redraft.drafts.opening import OpenDraft
from redraft.errors import UserError
from redraft.rows import anchors
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import DynamicTree, StaticTree
from redraft.settings.studies import NONE, DataEntry, StudyConfig, TargetEntry
from redraft.target import Target

GREEDY, SAMPLED, GENERAL, GENERAL_BASE = "greedy", "sampled", "general", "general-base"
TREE = "-tree"  # behind the name of a set that is walked as a tree too


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


class TargetWork(Model):
    """A target of the study; ``bases`` are the opened base targets by the names that entries give them."""

    def __init__(self, name: str, root: Path, config: StudyConfig, log: Log, bases: Mapping[str, Model]) -> None:
        super().__init__(name, self.open_again, root / "targets" / name, config, log)
        self.entry: TargetEntry = config.targets[name]
        self.root, self.bases = root, bases
        self.known_rows: dict[str, list[Row]] = {}  # of every data entry that has been asked for
        self._opened: dict[str, OpenDraft] = {}
        self.selected: dict[tuple[str, str], Any] = {}

    def open_again(self, dtype: str | None = None) -> Target:
        """The target in the study's data type, or in another ``dtype``. Raises ``UserError``."""
        e, c = self.entry, self.config
        return open_target(e.target, dtype or c.dtype, c.device, e.adapter, c.template_arg, self.root)

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
        if name not in self.known_rows:
            found = self._make_rows(name, self.config.data[name])
            if not found:
                raise UserError(f"data {name}: no row of {self.name} has two response tokens to train on")
            self.known_rows[name] = found
        return self.known_rows[name]

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
        path, stage = self.questions_path(name), f"generate {name} questions"
        found, _ = ask_itself(self.target, count, self.config.seed, path, self.config.batch_size, self.log, stage)
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
