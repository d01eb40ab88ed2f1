"""What the cells of one target share: prompts, rows, features, untrained drafts and the sets to measure every draft on.

Everything is made once, kept in the target's folder and found again by a resumed study. Row ids carry the name of their
data (``regenerated:gsm8k/12``), so that one feature store holds all of a target's rows.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.adaptation.core import build_features, feature_store
from redraft.adaptation.models import open_draft, open_target, split_prompts
from redraft.adaptation.runs import Log
from redraft.adaptation.sources import answer, ask_itself
from redraft.data.answers import reference_rows
from redraft.data.overlap import refuse_overlap, trained_conversations, without_overlap
from redraft.data.prompts import Conversation, read_conversations
from redraft.data.regenerate import InProcessEngine
from redraft.data.store import Row, read_rows
from redraft.data.suites import DATA_VARIABLE, load_suite
from redraft.data.suites.maths import maths_conversations
from redraft.data.traces import read_traces
from redraft.drafts.opening import OpenDraft
from redraft.errors import UserError
from redraft.features import FeatureStore, RowFeatures
from redraft.files import use_folder
from redraft.rows import anchors
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import DynamicTree, StaticTree
from redraft.settings.studies import NONE, DataEntry, StudyConfig
from redraft.settings.texts import DATA, MATHS, SUITE, parse_source
from redraft.target import Target

GREEDY, SAMPLED, GENERAL, GENERAL_BASE = "greedy", "sampled", "general", "general-base"
TREE = "-tree"  # behind the name of a set that is walked as a tree too


# -- prompts ---------------------------------------------------------------------------------------------------------
@dataclass
class Prompts:
    """What a target is asked: disjoint, and nothing of ``evaluation`` (by task) is trained on."""

    train: list[Conversation]
    heldout: list[Conversation]
    evaluation: dict[str, list[Conversation]]
    dropped: int


def read_source(text: str, longest: int | None = None, exclude: Sequence[Conversation] = ()) -> list[Conversation]:
    """The conversations of one source, none with a user turn of more than ``longest`` characters.

        FILE or datasets:NAME           as every command reads them
        data:math/gsm8k.train.jsonl.gz  a file of the folder that REDRAFT_DATA names
        suite:gsm8k                     an evaluation suite (docs/suites.md)
        maths:SEED                      generated maths problems with worked solutions; needs a count

    ``@COUNT`` behind any of them takes that many: of a file in the order of a hash, so that its own order plays no
    part; of a suite its beginning, in which tasks take turns.
    ``exclude`` holds prompts that a generated source must not repeat. Raises ``UserError``, also for too few.
    """
    source = parse_source(text)
    if source.kind == MATHS:
        assert source.count is not None
        asked = {m["content"] for c in exclude for m in c.messages if m["role"] == "user"}
        found = maths_conversations(source.count, int(source.place), exclude=asked)
    elif source.kind == SUITE:
        found = [item.conversation for item in load_suite(source.place).items]
    else:
        place = source.place
        if source.kind == DATA:
            folder, mend = os.environ.get(DATA_VARIABLE), f"set {DATA_VARIABLE} to the folder that holds"
            if not folder:
                raise UserError(f"data:{place} is a file of the data folder; {mend} it")
            place = str(Path(folder) / place)
            if not Path(place).is_file():
                raise UserError(f"{place} does not exist; {mend} {source.place}")
        found = read_conversations(place)
    if longest is not None:
        found = [c for c in found if max(len(m["content"]) for m in c.messages if m["role"] == "user") <= longest]
    if source.count is None:
        return found
    if len(found) < source.count:
        raise UserError(f"prompt source {text} gives {len(found)} prompts, not {source.count}; ask for fewer")
    if source.kind in (MATHS, SUITE):
        return found[: source.count]
    return sorted(found, key=lambda c: hashlib.sha256(f"0|{c.id}".encode()).hexdigest())[: source.count]


def read_sources(
    texts: Sequence[str], longest: int | None = None, exclude: Sequence[Conversation] = ()
) -> list[Conversation]:
    """All of several sources. Raises ``UserError`` when two prompts have one id."""
    found: dict[str, Conversation] = {}
    for text in texts:
        for conversation in read_source(text, longest, exclude):
            if conversation.id in found:
                raise UserError(f"prompt source {text}: id {conversation.id!r} is there twice; ids must differ")
            found[conversation.id] = conversation
    return list(found.values())


def read_prompts(
    prompts: Sequence[str],
    evaluation: dict[str, tuple[str, ...]],
    heldout: int,
    seed: int,
    longest: int | None,
    drop_overlap: bool,
) -> Prompts:
    """Training, held-out and evaluation prompts of a target.

    A training prompt that is, or nearly is, an evaluation prompt is an error; a generated one, or any with
    ``drop_overlap``, is left out and counted. Raises ``UserError``.
    """
    measured = {task: read_sources(texts, longest) for task, texts in evaluation.items()}
    everything = [conversation for part in measured.values() for conversation in part]
    if len({c.id for c in everything}) < len(everything):
        raise UserError("two evaluation prompts have the same id; name every source under one task only")
    kept, dropped = [], 0
    for text in prompts:
        found = read_sources([text], longest, everything)
        if parse_source(text).generated or drop_overlap:
            clean = without_overlap(found, everything)
            dropped += len(found) - len(clean)
            found = clean
        kept += found
    if len({c.id for c in kept}) < len(kept):
        raise UserError("two training prompts have the same id; ids must differ")
    refuse_overlap(kept, everything, "the evaluation")
    train, held, _ = split_prompts(kept, heldout, 0, seed)
    return Prompts(train, held, measured, dropped)


def first_turn(conversation: Conversation) -> Conversation:
    """The conversation up to its first user turn, without anybody's answer."""
    turns = conversation.messages
    asked = next((number for number, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
    return replace(conversation, messages=[turn for turn in turns[: asked + 1] if turn["role"] != "assistant"])


# -- a target --------------------------------------------------------------------------------------------------------
def slug(text: str) -> str:
    """A file name that can be read, and differs for different texts."""
    plain = re.sub(r"[^A-Za-z0-9_+.-]+", "_", text).strip("_")
    return f"{plain[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def features_stage(name: str, taps: Sequence[int]) -> str:
    """The pass that makes features of these rows; where generation kept those of other taps, it did not make these."""
    return f"features {name} at {','.join(map(str, taps))}"


def named(name: str, rows: Sequence[Row]) -> list[Row]:
    """The rows that have a position to train or measure at, with ids that begin with ``name``."""
    return [row.called(f"{name}:{row.id}") for row in rows if anchors(row)]


@dataclass
class NamedKeeper:
    """Puts features into a store under the rows' names in the study."""

    name: str
    store: FeatureStore

    def wants(self, needed: int) -> bool:
        return self.store.wants(needed)

    def put(self, found: Sequence[RowFeatures]) -> None:
        self.store.put([f._replace(row=f.row.called(f"{self.name}:{f.row.id}")) for f in found])


class Model:
    """A target with its own answers and features in a folder; stages of ``log`` carry its name."""

    def __init__(self, name: str, opener: Callable[[], Target], folder: Path, config: StudyConfig, log: Log) -> None:
        self.name, self._opener, self.folder, self.config, self.log = name, opener, folder, config, log
        self.stores: dict[tuple[int, ...], FeatureStore] = {}
        use_folder(folder)

    @cached_property
    def target(self) -> Target:
        return self._opener()

    def answer(
        self, name: str, asked: Sequence[Conversation], samplers: Sequence[Sampler], tokens: int, taps: tuple[int, ...]
    ) -> list[Row]:
        """The target's answers, from the file of this name or made now, with ids that begin with the name.

        What the target computes at the ``taps`` while it writes is kept as the rows' features.
        """
        path, target, keeper = self.folder / f"{name}.jsonl", self.target, NamedKeeper(name, self.store(taps))
        target.tap(taps)
        engine, seed = InProcessEngine(target, self.config.batch_size), self.config.seed
        answer(f"generate {name}", engine, target, asked, samplers, path, tokens, seed, self.log, keeper)
        # The file is in the order in which answers came in, which a resumed run need not repeat.
        place = {conversation.id: number for number, conversation in enumerate(asked)}
        rows = sorted(read_rows(path), key=lambda row: (place[row.id], row.turn, row.temperature))
        return named(name, rows)

    def store(self, taps: tuple[int, ...]) -> FeatureStore:
        """The features of this model at these taps."""
        if taps not in self.stores:
            folder = self.folder / f"features-{'-'.join(map(str, taps))}"
            self.stores[taps] = feature_store(folder, self.target, taps)
        return self.stores[taps]

    def features(self, name: str, rows: Sequence[Row], taps: tuple[int, ...]) -> FeatureStore:
        """The store for these taps, with the features of all ``rows`` in it. Raises ``UserError``."""
        self.target.tap(taps)
        build_features(features_stage(name, taps), self.store(taps), self.target, rows, self.log)
        return self.store(taps)

    # -- what it cost ----------------------------------------------------------------------------------------------
    def spent_on(self, stage: str, tokens: int) -> int:
        """FLOPs of the target's pass over ``tokens``, or over as many as the stage had: kept features need none."""
        return provenance.forward_flops(self.target.parameters_per_token, min(tokens, self.log.entry(stage).tokens))

    def seconds_of(self, stage: str, tokens: int) -> float:
        """The part of a stage's seconds that falls to ``tokens`` of those that it worked on."""
        entry = self.log.entry(stage)
        return entry.seconds * min(1.0, tokens / entry.tokens) if entry.tokens else 0.0


@dataclass
class Asked:
    """One evaluation set: a model, its answers, and where their features are."""

    model: Model
    rows: list[Row]
    sampler: Sampler
    tasks: list[str]
    tree: StaticTree | DynamicTree | None = None

    @property
    def tokens(self) -> list[int]:
        return [anchors(row) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """What a result file needs to make tau from rounds."""
        names = {"answers_of": self.model.name, "sampler": self.sampler.describe()}
        if self.tree is not None:
            names["tree"] = self.tree.describe()
        return {**names, "prompts": [row.id for row in self.rows], "tasks": self.tasks, "tokens": self.tokens}


class TargetWork(Model):
    """A target of the study; ``bases`` are the opened base targets by the names that entries give them."""

    def __init__(self, name: str, root: Path, config: StudyConfig, log: Log, bases: Mapping[str, Model]) -> None:
        super().__init__(name, self.open_again, root / "targets" / name, config, log)
        self.entry = config.targets[name]
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
        limits: dict[str, Any] = {"eos_ids": target.eos_ids, "max_new_tokens": tokens, "context": target.context}
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
        asked = self.prompts.train
        if entry.prompts:  # questions that the target wrote itself, none of them measured on
            path, stage, config = self.questions_path(name), f"generate {name} questions", self.config
            found, _ = ask_itself(target, entry.prompts, config.seed, path, config.batch_size, self.log, stage)
            measured = [c for part in self.prompts.evaluation.values() for c in part]
            asked = without_overlap(found, [*measured, *self.prompts.heldout])
        return self.answer(name, asked, samplers, tokens, self.taps)

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
