"""The settings of the single steps: quickstart, regenerate, select, train, import, merge, export, merge-target,
vocabulary; and of what measures and shows: probe, bench, report, watch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

from redraft.errors import UserError
from redraft.settings import texts
from redraft.settings.base import Settings, known_name, setting
from redraft.settings.runs import PROMPT_FORMS, SHARED_DRAFT, Adapting, Answered, OnTarget, Sampled, adaptation
from redraft.settings.sampler import Sampler, asked_samplers
from redraft.settings.shapes import ShapeText, check_drafts, parse_shape
from redraft.settings.training import TrainBlock, TrainConfig

# Trainers whose files are read on their own word (redraft.drafts.eagle3.trainers, and the kinds of EAGLE-1).
TRAINER_NAMES = (
    *("speculators", "specforge", "specforge-main", "modelopt", "automodel", "angelslim", "safeailab", "plain"),
    *("original", "vllm", "sglang"),
)


class QuickstartSettings(Settings):
    """The whole story on a small embedded model."""

    COMMAND: ClassVar[str] = "quickstart"

    out: Path = setting(Path("out/quickstart"), "folder of the run, its summary and its page")


class RegenerateSettings(Answered):
    """The target's own answers to prompts."""

    COMMAND: ClassVar[str] = "regenerate"

    prompts: str = setting(..., f"prompts: {PROMPT_FORMS}", reads="prompts")
    out: Path = setting(..., "response file to write; a stopped command goes on in it")
    temperature: tuple[float, ...] = setting((0.0,), "sampling temperature; repeatable")
    top_k: int = setting(0, "likeliest tokens to sample from; 0 is all")

    @property
    def samplers(self) -> list[Sampler]:
        """One sampler a temperature."""
        return asked_samplers(self.temperature, self.top_p, self.top_k)

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        assert self.samplers


class SelectSettings(OnTarget):
    """What of responses, or of prompts, is worth training on."""

    COMMAND: ClassVar[str] = "select"

    target: str | None = setting(None, "fine-tuned target: folder, hub id or adapter", reads="model")  # type: ignore[assignment]
    out: Path = setting(..., "manifest to write (JSON): every score, and why a row is in")
    responses: Path | None = setting(None, "responses to select from", reads="file")
    prompts: str | None = setting(None, "prompts to select from, before any is answered", reads="prompts")
    scorer: texts.ScorerName = setting(
        "rejection", "how rows are scored: {scorers}; NAME:KEY=VALUE,KEY=VALUE for settings"
    )
    budget: texts.BudgetText = setting("75%", 'what to keep: "25%", "400" rows or "60k tokens"')
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
    learning_rate: float | None = setting(None, "highest; by default the method's own rate, of a new draft 0.001", gt=0)
    setting: TrainBlock = setting({}, "any other training setting, NAME=VALUE; repeatable")

    def training(self) -> dict[str, Any]:
        """The training settings that were given."""
        given = {name: getattr(self, name) for name in self.OWN if getattr(self, name) is not None}
        return {**given, **self.setting}

    def train_config(self) -> TrainConfig:
        """The training's settings: the method's for an old draft, with those that were given."""
        return TrainConfig(**{**({} if self.from_nothing else adaptation(self.method)), **self.training()})

    def blocks(self) -> dict[str, Any]:
        return {"setting": self.train_config(), "private": self.private_size}

    def conflicts(self) -> Iterator[str]:
        if self.from_nothing == (self.draft is not None):
            yield "give either --draft, the old draft to adapt, or --from-nothing for a new one"
        if self.from_nothing and self.heldout_responses is not None:
            yield "--from-nothing holds responses out by number: give --heldout, not --heldout-responses"
        assert self.private_size


class ImportSettings(Settings):
    """A draft of another trainer, read and explained, in redraft's own format."""

    COMMAND: ClassVar[str] = "import"

    source: str = setting(..., "draft as its trainer wrote it: folder or hub id", argument=True, reads="model")
    out: Path = setting(..., "folder to write")
    target: str | None = setting(
        None, "target that it is for: what the file leaves to it, and what must fit", reads="model"
    )
    taps: tuple[int, ...] = setting(
        (), "layers that it reads, as layers passed, where the file tells it wrong: 2,16,29"
    )
    trainer: str | None = setting(None, f"who wrote it, where the file cannot tell: {', '.join(TRAINER_NAMES)}")
    json_out: Path | None = setting(None, "also write the table to this file", flag="--json")

    def conflicts(self) -> Iterator[str]:
        if self.trainer is not None:
            known_name("trainer", self.trainer, TRAINER_NAMES)
        if any(after <= before for before, after in pairwise(self.taps)) or min(self.taps, default=0) < 0:
            yield f"taps {list(self.taps)} must ascend from 0; engines read each layer once and in layer order"


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
    format: texts.FormatName = setting(..., "format to write: {formats}")
    out: Path = setting(..., "folder to write")
    base_draft: str | None = setting(None, SHARED_DRAFT, reads="model")
    gamma: int = setting(5, "drafted tokens a round", gt=0)


class MergeTargetSettings(Settings):
    """The target of an adapter as one ordinary checkpoint."""

    COMMAND: ClassVar[str] = "merge-target"

    target: str = setting(..., "base model of the adapter, or the adapter itself: folder or hub id", reads="model")
    adapter: str | None = setting(None, "PEFT adapter to merge into --target, where that is a base", reads="model")
    out: Path = setting(..., "folder to write")


class VocabularySettings(OnTarget):
    """What of the target's text a draft can say, and a refresh of its vocabulary."""

    COMMAND: ClassVar[str] = "vocabulary"

    draft: str = setting(..., "draft: redraft folder, EAGLE-3 checkpoint folder or hub id", reads="model")
    responses: Path = setting(..., "responses of the target, as `redraft regenerate` writes them", reads="file")
    refresh: bool = setting(False, "swap unused tokens for missing ones")
    out: Path | None = setting(None, "folder for the refreshed draft")
    general: Path | None = setting(None, "responses of a domain that must stay covered: they leave last", reads="file")
    report: Path | None = setting(None, "also write everything to this JSON file")
    worst: int = setting(12, "missing tokens to list", ge=0)
    base_draft: str | None = setting(None, SHARED_DRAFT, reads="model")
    gamma: int = setting(5, "drafted tokens a round", gt=0)


# -- measuring ---------------------------------------------------------------------------------------------------------
class Questioned(OnTarget):
    """What is asked when something is measured."""

    prompts: str | None = setting(None, f"prompts: {PROMPT_FORMS}", reads="prompts")
    suite: tuple[texts.SuiteName, ...] = setting((), "named prompts: {suites}; NAME:CATEGORY, NAME=FILE; repeatable")
    data: Path | None = setting(None, "folder of the suites' files; by default that of REDRAFT_DATA", reads="file")


class ProbeSettings(Questioned):
    """Is the present draft healthy or stale?"""

    COMMAND: ClassVar[str] = "probe"

    draft: str = setting(..., "draft: redraft folder, EAGLE-3 checkpoint folder or hub id", reads="model")
    base_target: str | None = setting(None, "target that the old draft was made for", reads="model")
    base_draft: str | None = setting(None, SHARED_DRAFT, reads="model")
    limit: int = setting(16, "how many of the prompts are asked", ge=2)
    gamma: int = setting(5, "drafted tokens a round", gt=0)
    max_new_tokens: int = setting(128, "longest answer, in tokens", gt=1)
    trial: bool = setting(False, "also adapt the draft to half of the answers and measure it on the others")
    json_out: Path | None = setting(None, "also write the figures to this file", flag="--json")


class CheckSettings(Questioned):
    """Why acceptance is low."""

    COMMAND: ClassVar[str] = "check"

    draft: str = setting(..., "draft: folder in any format, or hub id", argument=True, reads="model")
    engine: texts.EngineName | None = setting(None, "engine that is to load it: {engines}", flag="--for")
    server: texts.Address | None = setting(None, "server of the target with this draft; its key: REDRAFT_API_KEY")
    server_model: str | None = setting(None, "the target's name on that server")
    base_target: str | None = setting(None, "target that the draft was made for", reads="model")
    base_draft: str | None = setting(None, SHARED_DRAFT, reads="model")
    limit: int = setting(16, "how many of the prompts are asked", ge=2)
    gamma: int | None = setting(None, "drafted tokens a round: 5, or what the server was asked for", gt=0)
    max_new_tokens: int = setting(64, "longest answer, in tokens", gt=1)
    json_out: Path | None = setting(None, "also write everything to this file", flag="--json")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        asked = self.prompts or self.suite
        if self.server and not asked:
            yield "nothing to ask the server; give --prompts FILE or --suite NAME"
        if self.server_model and not self.server:
            yield "--server-model names the target on a server; give --server too, or leave it out"
        if self.base_target and not asked:
            yield "--base-target is measured on prompts; give --prompts FILE or --suite NAME"


class BenchSettings(Sampled, Questioned):
    """Drafts, or servers, against the fastest plain decoding."""

    COMMAND: ClassVar[str] = "bench"

    out: Path = setting(..., "result file to write (JSON)")
    draft: tuple[str, ...] = setting((), "NAME=FOLDER or hub id; repeatable. Gains are over the first")
    limit: int = setting(24, "how many prompts of the file, and of each suite", gt=0)
    trained_on: Path | None = setting(None, "responses of a training, whose prompts are not measured", reads="file")
    shape: ShapeText = setting("chain:5", "chain:5, tree:5x10x60, a .json file of paths, or auto")
    greedy_drafts: bool = setting(False, "propose the draft's likeliest tokens although the target samples")
    static: bool = setting(False, "steps of fixed shapes, recorded as CUDA graphs where there are some")
    max_new_tokens: int = setting(128, "longest answer, in tokens", gt=1)
    base_draft: str | None = setting(None, SHARED_DRAFT, reads="model")
    server: tuple[str, ...] = setting(
        (), "servers (key: REDRAFT_API_KEY): NAME=ADDRESS, NAME=COMMAND with {port}; repeatable"
    )
    concurrency: tuple[int, ...] = setting((), "requests under way at servers; repeatable")
    server_model: str | None = setting(None, "the target's name on servers that have several")

    @property
    def drafts(self) -> dict[str, str]:
        """Name -> place: ``NAME=PLACE``, or a place alone, called after its last part. Raises ``UserError``."""
        drafts: dict[str, str] = {}
        for text in self.draft:
            name, equals, place = text.partition("=")
            if not equals:
                name, place = Path(text.rstrip("/")).name, text
            if not name or not place:
                raise UserError(f"--draft {text} is not understood; write NAME=FOLDER, such as aligned=run/merged")
            if name in drafts or name == "plain":
                raise UserError(f"two contestants are called {name}; write --draft NAME=FOLDER with names that differ")
            drafts[name] = place
        return drafts

    @property
    def servers(self) -> dict[str, str]:
        """Name -> address, or command that starts a server. Raises ``UserError``, also for a secret in an address."""
        servers = texts.named_servers(self.server)
        for place in servers.values():
            if texts.PORT not in place:
                texts.check_address(place)
        return servers

    def conflicts(self) -> Iterator[str]:
        if bool(self.draft) == bool(self.server):
            yield "give --draft to measure drafts in this process, or --server to measure servers from outside"
        if self.draft and (self.concurrency or self.server_model):
            yield "--concurrency and --server-model are for servers; give --server, or leave them out"
        if self.server and (self.shape != "chain:5" or self.greedy_drafts or self.static or self.base_draft):
            yield "servers draft as they were started; leave out --shape, --greedy-drafts, --static, --base-draft"
        if self.static and not self.shape.startswith("chain:"):
            # a tree's passes are wider than what is recorded, and auto would choose by the costs of other steps
            yield f"--static records the steps of a chain, not of {self.shape}; give --shape chain:5, or leave it out"
        if not self.prompts and not self.suite:
            yield "nothing to measure on; give --prompts FILE or --suite NAME"
        _ = self.sampler, self.drafts, self.servers
        if self.shape != "auto":
            check_drafts(parse_shape(self.shape), self.greedy_drafts or self.sampler.greedy)


class ReportSettings(Settings):
    """Results as one page."""

    COMMAND: ClassVar[str] = "report"

    results: tuple[Path, ...] = setting(..., "result files of redraft bench", argument=True, reads="file", min_length=1)
    out: Path = setting(Path("report.html"), "page to write")
    curve: Path | None = setting(None, "training curve: curve.jsonl of a run", reads="file")
    ledger: Path | None = setting(None, "cost ledger: ledger.json of a run", reads="file")
    summary: Path | None = setting(None, "summary of a quickstart", reads="file")
    png: Path | None = setting(None, "also write the headline picture of the first result")
    title: str = setting("Draft alignment report", "title of the page")


class WatchSettings(Sampled):
    """Decode with a draft in the terminal."""

    COMMAND: ClassVar[str] = "watch"

    draft: str = setting(..., "draft: redraft folder, EAGLE-3 checkpoint folder or hub id", reads="model")
    prompt: str | None = setting(None, "the prompt itself")
    prompts: str | None = setting(None, "prompts from a file or datasets:NAME, instead", reads="prompts")
    limit: int = setting(1, "how many of --prompts are decoded", gt=0)
    shape: ShapeText = setting("chain:5", "chain:5, tree:5x10x60 (depth x top-k x nodes), or paths")
    max_new_tokens: int = setting(200, "longest answer, in tokens", gt=1)
    greedy_drafts: bool = setting(False, "propose the likeliest, also when sampling")
    rejected: bool = setting(False, "show the rejected proposals too")
    base_draft: str | None = setting(None, SHARED_DRAFT, reads="model")

    def conflicts(self) -> Iterator[str]:
        if (self.prompt is None) == (self.prompts is None):
            yield 'watch needs one of --prompt "TEXT" and --prompts FILE'
        if self.prompt is not None and not self.prompt.strip():
            yield "--prompt is empty; give a question to answer"
        check_drafts(parse_shape(self.shape), self.greedy_drafts or self.sampler.greedy)
