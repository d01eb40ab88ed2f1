"""The settings of the single steps: quickstart, regenerate, select, train, merge, export, merge-target, vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from redraft.settings.adapt import Adapting, adaptation
from redraft.settings.base import Settings, block_of, setting
from redraft.settings.common import (
    NO_SERVER,
    PROMPT_FORMS,
    Address,
    BudgetText,
    FormatName,
    OnTarget,
    ScorerName,
)
from redraft.settings.sampler import Sampler, asked_samplers
from redraft.settings.training import TrainConfig

SHARED_DRAFT = "shared draft, when --draft is a private part"


class QuickstartSettings(Settings):
    """The whole story on a small embedded model."""

    COMMAND: ClassVar[str] = "quickstart"

    out: Path = setting(Path("out/quickstart"), "folder of the run, its summary and its page")


class RegenerateSettings(OnTarget):
    """The target's own answers to prompts."""

    COMMAND: ClassVar[str] = "regenerate"

    prompts: str = setting(..., f"prompts: {PROMPT_FORMS}", reads="prompts")
    out: Path = setting(..., "response file to write; a stopped command goes on in it")
    temperature: tuple[float, ...] = setting((0.0,), "sampling temperature; repeatable")
    top_p: float = setting(1.0, "nucleus of sampled answers")
    top_k: int = setting(0, "likeliest tokens to sample from; 0 is all")
    max_new_tokens: int = setting(256, "longest answer, in tokens", gt=1)
    batch_size: int = setting(64, "sequences decoded together, or requests under way at --server", gt=0)
    server: Address | None = setting(None, "OpenAI-compatible server that serves the target; its key: REDRAFT_API_KEY")
    server_model: str | None = setting(None, "the target's name on that server")

    @property
    def samplers(self) -> list[Sampler]:
        """One sampler a temperature."""
        return asked_samplers(self.temperature, self.top_p, self.top_k)

    def conflicts(self) -> Iterator[str]:
        if self.server_model and not self.server:
            yield NO_SERVER
        assert self.samplers


class SelectSettings(OnTarget):
    """What of responses, or of prompts, is worth training on."""

    COMMAND: ClassVar[str] = "select"

    target: str | None = setting(  # type: ignore[assignment]
        None, "fine-tuned target: folder, hub id or adapter", reads="model"
    )
    out: Path = setting(..., "manifest to write (JSON): every score, and why a row is in")
    responses: Path | None = setting(None, "responses to select from", reads="file")
    prompts: str | None = setting(None, "prompts to select from, before any is answered", reads="prompts")
    scorer: ScorerName = setting("rejection", "how rows are scored: {scorers}; NAME:KEY=VALUE,KEY=VALUE for settings")
    budget: BudgetText = setting("75%", 'what to keep: "25%", "400" rows or "60k tokens"')
    order: Literal["highest", "lowest"] = setting("highest", "which scores come first: highest or lowest")
    keep: Path | None = setting(None, "also write the kept rows or prompts to this file")
    base_target: str | None = setting(None, "target that the old draft was made for", reads="model")
    draft: str | None = setting(None, "present draft (scorer rejection, and coverage on it)", reads="model")

    def conflicts(self) -> Iterator[str]:
        if (self.responses is None) == (self.prompts is None):
            yield "give either --responses or --prompts (before generation)"


class TrainSettings(Adapting):
    """A part of an old draft, or a new draft, trained on stored responses."""

    COMMAND: ClassVar[str] = "train"
    OWN: ClassVar[tuple[str, ...]] = ("loss", "gamma", "seed", "epochs", "batch_anchors", "learning_rate")
    ONCE: ClassVar[dict[str, dict[str, str]]] = {
        "setting": {name: name for name in OWN},
        "private": {"private_width": "width", "rank": "rank"},
    }

    responses: Path = setting(..., "responses of the target, from redraft regenerate", reads="file")
    out: Path = setting(..., "run directory; a stopped run resumes from it")
    draft: str | None = setting(None, "old draft: folder in any format, or hub id", reads="model")
    from_nothing: bool = setting(False, "train a new draft instead")
    vocabulary: int = setting(8192, "draft vocabulary of a new draft", gt=0)
    family: str = setting("eagle3", "family of a new draft: eagle3, or eagle1 as in its paper")
    selection: Path | None = setting(None, "manifest of redraft select: train on what it keeps", reads="file")
    heldout: int = setting(40, "greedy responses kept back: training stops on their tau", gt=0)
    heldout_responses: Path | None = setting(None, "held-out responses in a file of their own", reads="file")
    epochs: float | None = setting(None, "passes over the responses; by default 6, for a new draft 3", gt=0)
    batch_anchors: int | None = setting(None, "supervised positions a step; by default 768, for a new draft 1536", gt=0)
    learning_rate: float | None = setting(
        None, "highest learning rate; by default the method's own, for a new draft 0.001", gt=0
    )
    setting: block_of(TrainConfig, "setting") = setting(  # type: ignore[valid-type]
        {}, "any other training setting, NAME=VALUE; repeatable"
    )

    def training(self) -> dict[str, Any]:
        """The training settings that were given."""
        given = {name: getattr(self, name) for name in self.OWN if getattr(self, name) is not None}
        return {**given, **self.setting}

    def train_config(self) -> TrainConfig:
        """The training's settings: the method's for an old draft, with those that were given."""
        return TrainConfig(**{**({} if self.from_nothing else adaptation(self.method)), **self.training()})

    def conflicts(self) -> Iterator[str]:
        if self.from_nothing == (self.draft is not None):
            yield "give either --draft, the old draft to adapt, or --from-nothing for a new one"
        if self.from_nothing and self.heldout_responses is not None:
            yield "--from-nothing holds responses out by number: give --heldout, not --heldout-responses"
        assert self.private_size


class MergeSettings(Settings):
    """A private part folded into the shared draft."""

    COMMAND: ClassVar[str] = "merge"

    private: str = setting(..., "private part: run/private of an adaptation", reads="model")
    base_draft: str = setting(..., "shared draft that it was trained on", reads="model")
    out: Path = setting(..., "folder to write")
    target: str | None = setting(None, "target; needed for a public checkpoint as shared draft", reads="model")
    scale: float = setting(1.0, "how much of the change goes in; less keeps more of the speed on other text", ge=0)


class ExportSettings(Settings):
    """A draft in the format of a serving engine."""

    COMMAND: ClassVar[str] = "export"

    draft: str = setting(..., "draft: redraft folder, private part, or public checkpoint", reads="model")
    target: str = setting(..., "fine-tuned target: folder, hub id, or folder of a PEFT adapter", reads="model")
    format: FormatName = setting(..., "format to write: {formats}")
    out: Path = setting(..., "folder to write")
    base_draft: str | None = setting(None, SHARED_DRAFT, reads="model")
    gamma: int = setting(5, "drafted tokens a round", gt=0)


class MergeTargetSettings(Settings):
    """The target of an adapter as one ordinary checkpoint."""

    COMMAND: ClassVar[str] = "merge-target"

    target: str = setting(..., "base model of the adapter: folder or hub id", reads="model")
    adapter: str = setting(..., "PEFT adapter to merge into it", reads="model")
    out: Path = setting(..., "folder to write")


class VocabularySettings(OnTarget):
    """What of the target's text a draft can say, and a refresh of its vocabulary."""

    COMMAND: ClassVar[str] = "vocabulary"

    draft: str = setting(..., "draft: redraft folder, EAGLE-3 checkpoint folder or hub id", reads="model")
    responses: Path = setting(..., "responses of the target, as `redraft regenerate` writes them", reads="file")
    refresh: bool = setting(False, "swap unused tokens for missing ones")
    out: Path | None = setting(None, "folder for the refreshed draft")
    general: Path | None = setting(
        None, "responses of the domain that must stay covered; its tokens leave last", reads="file"
    )
    report: Path | None = setting(None, "also write everything to this JSON file")
    worst: int = setting(12, "missing tokens to list", ge=0)
    base_draft: str | None = setting(None, SHARED_DRAFT, reads="model")
    gamma: int = setting(5, "drafted tokens a round", gt=0)
