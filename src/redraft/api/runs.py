"""Whole runs: adapting, training and comparing drafts; a probe, a paired benchmark, the page of its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from redraft.adaptation import probe as probing
from redraft.adaptation.adapt import AdaptRun
from redraft.adaptation.advice import ProbeResult
from redraft.adaptation.bench import Questions, bench_files
from redraft.adaptation.check.result import CheckResult
from redraft.adaptation.check.run import check_draft
from redraft.adaptation.models import AnyTarget, TargetSpec, contestants, open_any
from redraft.adaptation.server_bench import bench_servers_on
from redraft.adaptation.study.figures import write_full, write_tables
from redraft.adaptation.study.run import RESULTS_FILE, StudyRun
from redraft.adaptation.training import train_new, train_old
from redraft.api.steps import Place, Say, checked, name_of
from redraft.drafts.opening import AnyDraft, OpenDraft
from redraft.errors import UserError
from redraft.locks import held
from redraft.progress import Progress, progress_bar
from redraft.reports import build_report, headline_png
from redraft.reports.tables import Adapted, Benchmark, Page, Study, Trained
from redraft.settings.base import merged, read, underscored
from redraft.settings.runs import AdaptConfig
from redraft.settings.steps import BenchSettings, CheckSettings, ProbeSettings, ReportSettings, TrainSettings
from redraft.settings.studies import StudyConfig, read_study


def adapt(
    target: AnyTarget | None = None,
    draft: AnyDraft | None = None,
    out: Place | None = None,
    *,
    config: Place | Mapping[str, Any] | None = None,
    say: Say = print,
    **settings: Any,
) -> Adapted:
    """Everything in one go, in the run directory ``out``: regenerate, select, train, export, measure, report.

    ``settings`` are those of ``redraft adapt --help``, underscores for hyphens; ``config`` a YAML file (or a mapping)
    with any of them, over which keywords win. A stopped run, started again with the same settings, goes on.

        run = redraft.adapt(target, "old-draft", "run", prompts="prompts.jsonl", method="lora", exports=["vllm"])
    """
    spec = None if target is None else TargetSpec.of(target)
    named: dict[str, Any] = {"target": name_of(target), "draft": name_of(draft), "out": out}
    if spec is not None and not isinstance(target, Place):  # a name alone leaves these to ``settings``
        named |= {"dtype": spec.dtype, "device": spec.device, "adapter": spec.adapter}
        named |= {"template_arg": dict(spec.template_args)} if spec.template_args else {}
    given = {name: value for name, value in named.items() if value is not None} | settings
    if isinstance(config, Mapping):
        given, config = merged(underscored(config, "config"), given), None
    elif not isinstance(config, Place | None):
        raise UserError(f"config must be a YAML file or a mapping of settings, not {config!r}")
    parsed = read(AdaptConfig, None if config is None else Path(config), given)
    opened = draft if isinstance(draft, OpenDraft) else None
    with held(parsed.out, say=say):
        run = AdaptRun(parsed, say, spec.opened if spec else None, opened)
        figures, folder = run.run(), run.folder
    return Adapted(
        folder,
        folder / "merged",
        folder / "private" if (folder / "private").is_dir() else None,
        {name: folder / f"export-{name}" for name in parsed.exports},
        folder / "report.html" if figures else None,
        Benchmark(folder / "bench.json", figures) if figures else None,
        run.ledger.to_dict(),
    )


def train(
    target: AnyTarget,
    responses: Place,
    out: Place,
    *,
    draft: AnyDraft | None = None,
    method: str = "lora",
    private: Mapping[str, Any] | None = None,
    family: str = "eagle3",
    vocabulary: int = 8192,
    selection: Place | None = None,
    heldout: int = 40,
    heldout_responses: Place | None = None,
    say: Say = print,
    **settings: Any,
) -> Trained:
    """Train what ``method`` names of ``draft`` on the target's responses; without ``draft`` a new one of ``family``.

    ``private`` are sizes of the private part (width, rank, alpha, ...), ``settings`` those of training (loss, epochs,
    batch_anchors, learning_rate, gamma, seed, ...). ``heldout`` greedy responses are kept back, on whose acceptance
    length training stops. A stopped run goes on.

        redraft.train(target, "responses.jsonl", "run", draft="old-draft", method="lora", epochs=4, loss="tv")
    """
    own = {name: value for name, value in settings.items() if name in TrainSettings.OWN}
    rest = {name: value for name, value in settings.items() if name not in own}
    s = checked(TrainSettings, locals(), from_nothing=draft is None, setting=rest, **own)
    if draft is None:
        record = train_new(TargetSpec.of(target), s, say)
        return Trained(s.out / "draft", None, record["tau"]["value"], None)
    result = train_old(TargetSpec.of(target), draft, s, say)
    part = s.out / "private"
    return Trained(s.out / "merged", part if part.is_dir() else None, result.best_tau, result.start_tau)


def study(
    config: Place | StudyConfig,
    out: Place,
    *,
    template_arg: Mapping[str, Any] | None = None,
    full: Place | None = None,
    say: Say = print,
) -> Study:
    """Compare methods, data, selections, losses and starts on the same footing: a YAML file of a study in, results out.

    ``full`` is a file for what the method full reached, as the quickstart reads it. A stopped study goes on.

        print(redraft.study("study.yaml", "out/study"))
    """
    if not isinstance(config, Place | StudyConfig):
        raise UserError(f"config must be the YAML file of a study, not {config!r}")
    parsed, out = config if isinstance(config, StudyConfig) else read_study(Path(config)), Path(out)
    if template_arg:
        parsed = parsed.model_copy(update={"template_arg": parsed.template_arg | dict(template_arg)})
    with held(out, "folder of the study", say):
        results = StudyRun(parsed, out, say).run()
        if full is not None:
            write_full(results, Path(full), f"study {parsed.name}")
        return Study(out / RESULTS_FILE, write_tables(out / RESULTS_FILE), results["figures"])


def probe(
    target: AnyTarget,
    draft: AnyDraft,
    prompts: Place | None = None,
    *,
    suite: Sequence[str] = (),
    data: Place | None = None,
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
    before = last = 0

    def update(done: int, **fields: Any) -> None:
        nonlocal before, last
        before, last = before + (last if done < last else 0), done
        progress.update(before + done, **fields)

    return update


def check(
    draft: AnyDraft,
    target: AnyTarget,
    *,
    engine: str | None = None,
    prompts: Place | None = None,
    suite: Sequence[str] = (),
    data: Place | None = None,
    server: str | None = None,
    server_model: str | None = None,
    base_target: AnyTarget | None = None,
    base_draft: AnyDraft | None = None,
    limit: int = 16,
    gamma: int | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> CheckResult:
    """Why acceptance is low: the likeliest cause in words, with the command that mends it.

    ``engine`` is whose reading of the file is laid beside its trainer's (``vllm-0.33``, ``sglang``, ...). With
    ``prompts``, ``limit`` of them are answered by the target, and the draft is walked over the answers as the file says
    and with one thing changed at a time. ``server`` is the address of a server of the same pair, whose counters are
    laid beside that; ``base_target`` is the model that the draft was made for.

        found = redraft.check("old-draft", target, prompts="prompts.jsonl")
        found.cause, found.findings[0].mend
    """
    s, spec = checked(CheckSettings, locals()), TargetSpec.of(target)
    return check_draft(s, spec, draft, TargetSpec.of(base_target) if base_target is not None else None)


def bench(
    target: AnyTarget,
    drafts: AnyDraft | Mapping[str, AnyDraft] | None,
    out: Place,
    *,
    prompts: Place | None = None,
    suite: Sequence[str] = (),
    data: Place | None = None,
    limit: int = 24,
    trained_on: Place | None = None,
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
    results: Place | Benchmark | Sequence[Place | Benchmark],
    out: Place = "report.html",
    *,
    curve: Place | None = None,
    ledger: Place | None = None,
    summary: Place | None = None,
    png: Place | None = None,
    title: str = "Draft alignment report",
) -> Page:
    """One HTML page of benchmark results that needs nothing else; ``png`` is a file for its headline picture.

    ``curve`` and ``ledger`` are ``train/curve.jsonl`` and ``ledger.json`` of a run.

        redraft.report("bench.json", "report.html", ledger="run/ledger.json")
    """
    several: list[Any] = list(results) if isinstance(results, list | tuple) else [results]
    results = [each.path if isinstance(each, Benchmark) else each for each in several]
    s = checked(ReportSettings, locals())
    page = build_report(list(s.results), s.out, s.curve, s.ledger, s.summary, s.title)
    if s.png is not None:
        headline_png(s.results[0], s.png)
    return Page(page)
