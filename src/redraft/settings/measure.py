"""The settings of what measures and shows: probe, bench, report, watch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from redraft.errors import UserError
from redraft.settings.base import Settings, setting
from redraft.settings.common import PROMPT_FORMS, OnTarget, ShapeText, SuiteName
from redraft.settings.sampler import Sampler, asked_samplers
from redraft.settings.shapes import check_drafts, parse_shape
from redraft.settings.steps import SHARED_DRAFT
from redraft.settings.texts import PORT, check_address, named_servers


class Questioned(OnTarget):
    """What is asked when something is measured."""

    prompts: str | None = setting(None, f"prompts: {PROMPT_FORMS}", reads="prompts")
    suite: tuple[SuiteName, ...] = setting((), "named prompts: {suites}; NAME:CATEGORY, NAME=FILE; repeatable")
    data: Path | None = setting(None, "folder of the suites' files; by default that of REDRAFT_DATA", reads="file")


class Sampled(OnTarget):
    """How the target draws."""

    temperature: float = setting(0.0, "0 is greedy")
    top_p: float = setting(1.0, "nucleus of sampling")
    top_k: int = setting(0, "likeliest tokens to sample from; 0 is all")

    @property
    def sampler(self) -> Sampler:
        """Raises ``UserError`` for values out of range and for filters of a greedy choice."""
        return asked_samplers([self.temperature], self.top_p, self.top_k)[0]


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


class BenchSettings(Sampled, Questioned):
    """Drafts, or servers, against the fastest plain decoding."""

    COMMAND: ClassVar[str] = "bench"

    out: Path = setting(..., "result file to write (JSON)")
    draft: tuple[str, ...] = setting((), "NAME=FOLDER or hub id; repeatable. Gains are over the first")
    limit: int = setting(24, "how many prompts of the file, and of each suite", gt=0)
    trained_on: Path | None = setting(
        None, "responses that a draft was trained on: none of their prompts is measured", reads="file"
    )
    shape: ShapeText = setting("chain:5", "chain:5, tree:5x10x60, a .json file of paths, or auto")
    greedy_drafts: bool = setting(False, "propose the draft's likeliest tokens although the target samples")
    static: bool = setting(False, "steps of fixed shapes, recorded as CUDA graphs where there are some")
    max_new_tokens: int = setting(128, "longest answer, in tokens", gt=1)
    base_draft: str | None = setting(None, SHARED_DRAFT, reads="model")
    server: tuple[str, ...] = setting(
        (), "measure servers (key: REDRAFT_API_KEY): NAME=ADDRESS, NAME=COMMAND with {port}; repeatable"
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
        servers = named_servers(self.server)
        for place in servers.values():
            if PORT not in place:
                check_address(place)
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
