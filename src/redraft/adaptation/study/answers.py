"""A target of a study with its own answers and features in a folder, each made once and found again when resumed.

Row ids carry the name of their data (``regenerated:gsm8k/12``), so that one feature store holds all of a target's rows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from redraft import provenance
from redraft.adaptation.core import build_features, feature_store
from redraft.adaptation.runs import Log
from redraft.adaptation.sources import answer
from redraft.data.prompts import Conversation
from redraft.data.regenerate import InProcessEngine
from redraft.data.store import Row, read_rows
from redraft.features import FeatureStore, RowFeatures
from redraft.rows import anchors
from redraft.settings.sampler import Sampler
from redraft.settings.studies import StudyConfig
from redraft.target import Target


def slug(text: str) -> str:
    """A file name that can be read, and differs for different texts."""
    plain = re.sub(r"[^A-Za-z0-9_+.-]+", "_", text).strip("_")
    return f"{plain[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def features_stage(name: str, taps: Sequence[int]) -> str:
    """The pass that makes features of these rows; where generation kept those of other taps, it did not make these."""
    return f"features {name} at {','.join(map(str, taps))}"


def named(name: str, rows: Sequence[Row]) -> list[Row]:
    """The rows that have a position to train or measure at, with ids that begin with ``name``."""
    return [_renamed(name, row) for row in rows if anchors(row)]


def _renamed(name: str, row: Row) -> Row:
    return replace(row, id=f"{name}:{row.id}")


class NamedKeeper:
    """Puts features into a store under the rows' names in the study."""

    def __init__(self, name: str, store: FeatureStore) -> None:
        self.name, self.store = name, store

    def put(self, found: Sequence[RowFeatures]) -> bool:
        return self.store.put([each._replace(row=_renamed(self.name, each.row)) for each in found])


class Model:
    """A target with its own answers and features in a folder; stages of ``log`` carry its name."""

    def __init__(self, name: str, opener: Callable[[], Target], folder: Path, config: StudyConfig, log: Log) -> None:
        self.name, self._opener, self.folder, self.config, self.log = name, opener, folder, config, log
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
        path, target, keeper = self.folder / f"{name}.jsonl", self.target, NamedKeeper(name, self.store(taps))
        target.tap(taps)
        engine, seed = InProcessEngine(target, self.config.batch_size), self.config.seed
        stage = f"generate {name}"
        answer(stage, engine, target, conversations, samplers, path, max_new_tokens, seed, self.log, keeper)
        # The file is in the order in which answers came in, which a resumed run need not repeat.
        place = {conversation.id: number for number, conversation in enumerate(conversations)}
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
