"""Measuring: a probe, a paired benchmark, and the page of its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from redraft.adaptation import probe as probing
from redraft.adaptation.advice import ProbeResult
from redraft.adaptation.bench import Questions, bench_files
from redraft.adaptation.models import AnyTarget, TargetSpec, contestants, open_any
from redraft.adaptation.server_bench import bench_servers_on
from redraft.api.opening import Say, checked, name_of
from redraft.drafts.opening import AnyDraft
from redraft.progress import Progress, progress_bar
from redraft.reports import build_report, headline_png
from redraft.reports.results import Benchmark, Page
from redraft.settings.measure import BenchSettings, ProbeSettings, ReportSettings


def probe(
    target: AnyTarget,
    draft: AnyDraft,
    prompts: str | Path | None = None,
    *,
    suite: Sequence[str] = (),
    data: str | Path | None = None,
    base_target: AnyTarget | None = None,
    base_draft: AnyDraft | None = None,
    limit: int = 16,
    gamma: int = 5,
    max_new_tokens: int = 128,
    trial: bool = False,
    say: Say | None = print,
) -> ProbeResult:
    """Is the draft healthy or stale, and what would aligning it bring? A minute or so.

    ``limit`` of the ``prompts`` and of each ``suite`` are asked, ``gamma`` tokens drafted a round. ``base_target``, the
    target that the draft was made for, gives the reference; ``trial`` also adapts to half of the answers.

        found = redraft.probe(target, "old-draft", prompts="prompts.jsonl")
        found.tau["value"], found.verdict
    """
    s, spec = checked(ProbeSettings, locals()), TargetSpec.of(target)
    questions = Questions(s)
    opened = spec.open()
    found = open_any(draft, opened, base_draft)
    asked = questions.read(opened)
    base = TargetSpec.of(base_target).open() if base_target is not None else None
    stated = found.meta.get("heldout", {})
    with progress_bar("probe", len(asked) * (2 if base else 1), "prompts") as progress:
        return probing.probe(
            opened,
            found.draft,
            asked,
            s.gamma,
            s.max_new_tokens,
            base,
            stated.get("tau"),
            _counting(progress),
            known_gamma=stated.get("gamma"),
            targets=contestants(opened, spec.dtype, spec.open, found.draft.taps or None),
            with_trial=s.trial,
            say=say,
        )


def _counting(progress: Progress) -> Callable[..., None]:
    """One count over the two passes of a probe, each of which starts from one again."""
    state = {"before": 0, "last": 0}

    def update(done: int, **fields: Any) -> None:
        if done < state["last"]:
            state["before"] += state["last"]
        state["last"] = done
        progress.update(state["before"] + done, **fields)

    return update


def bench(
    target: AnyTarget,
    drafts: AnyDraft | Mapping[str, AnyDraft] | None,
    out: str | Path,
    *,
    prompts: str | Path | None = None,
    suite: Sequence[str] = (),
    data: str | Path | None = None,
    limit: int = 24,
    trained_on: str | Path | None = None,
    shape: str = "chain:5",
    greedy_drafts: bool = False,
    static: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    base_draft: AnyDraft | None = None,
    servers: Mapping[str, str] | None = None,
    concurrency: Sequence[int] = (),
    server_model: str | None = None,
    seed: int = 0,
) -> Benchmark:
    """Measure drafts (by name) against the fastest plain decoding: same prompts, same run, with 95% intervals.

    ``shape`` is ``chain:5``, ``tree:5x10x60``, a file of paths, or ``auto``. With ``servers`` (name to address, or to a
    command with ``{port}``) and no drafts, these are measured from outside, with ``concurrency`` requests under way.
    Gains are over the first draft. The result is written to the JSON file ``out``.

        redraft.bench(target, {"stale": "old-draft", "aligned": run.draft}, "bench.json", prompts="eval.jsonl")
    """
    places = drafts if isinstance(drafts, Mapping) else {"": drafts} if drafts is not None else {}
    draft = tuple(f"{name}={name_of(place)}" if name else str(name_of(place)) for name, place in places.items())
    server = tuple(f"{name}={place}" for name, place in (servers or {}).items())
    s, spec = checked(BenchSettings, locals()), TargetSpec.of(target)
    if s.servers:
        return Benchmark(s.out, bench_servers_on(s, spec))
    return Benchmark(s.out, bench_files(s, spec, dict(zip(s.drafts, places.values(), strict=True)), base_draft))


def report(
    results: str | Path | Benchmark | Sequence[str | Path | Benchmark],
    out: str | Path = "report.html",
    *,
    curve: str | Path | None = None,
    ledger: str | Path | None = None,
    summary: str | Path | None = None,
    png: str | Path | None = None,
    title: str = "Draft alignment report",
) -> Page:
    """One HTML page of benchmark results that needs nothing else; ``png`` is a file for its headline picture.

    ``curve`` and ``ledger`` are ``train/curve.jsonl`` and ``ledger.json`` of a run.

        redraft.report("bench.json", "report.html", ledger="run/ledger.json")
    """
    several = [results] if isinstance(results, str | Path | Benchmark) else list(results)
    results = [each.path if isinstance(each, Benchmark) else Path(each) for each in several]
    s = checked(ReportSettings, locals())
    page = build_report(list(s.results), s.out, s.curve, s.ledger, s.summary, s.title)
    if s.png is not None:
        headline_png(s.results[0], s.png)
    return Page(page)
