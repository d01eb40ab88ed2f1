"""Adapting an old draft, training one, and comparing ways to do so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redraft.adaptation.adapt import AdaptRun
from redraft.adaptation.models import AnyTarget, TargetSpec
from redraft.adaptation.study.run import RESULTS_FILE, StudyRun
from redraft.adaptation.study.tables import write_full, write_tables
from redraft.adaptation.training import train_new, train_old
from redraft.api.opening import Say, checked, name_of
from redraft.drafts.opening import AnyDraft, OpenDraft
from redraft.reports.results import Adapted, Benchmark, Study, Trained
from redraft.settings.adapt import AdaptConfig
from redraft.settings.steps import TrainSettings
from redraft.settings.studies import StudyConfig, read_study
from redraft.settings.yamlfile import merged, read, underscored


def adapt(
    target: AnyTarget | None = None,
    draft: AnyDraft | None = None,
    out: str | Path | None = None,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
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
    if spec is not None and not isinstance(target, str | Path):  # a name alone leaves these to ``settings``
        named |= {"dtype": spec.dtype, "device": spec.device, "adapter": spec.adapter}
        named |= {"template_arg": dict(spec.template_args)} if spec.template_args else {}
    given = {name: value for name, value in named.items() if value is not None} | settings
    if isinstance(config, Mapping):
        given, config = merged(underscored(config, "config"), given), None
    parsed = read(AdaptConfig, None if config is None else Path(config), given)
    opened = draft if isinstance(draft, OpenDraft) else None
    run = AdaptRun(parsed, say, spec.opened if spec else None, opened)
    figures, folder = run.run(), run.folder
    return Adapted(
        folder,
        folder / "merged",
        folder / "private" if (folder / "private").is_dir() else None,
        {name: folder / f"export-{name}" for name in parsed.exports},
        folder / "report.html",
        Benchmark(folder / "bench.json", figures),
        run.ledger.to_dict(),
    )


def train(
    target: AnyTarget,
    responses: str | Path,
    out: str | Path,
    *,
    draft: AnyDraft | None = None,
    method: str = "lora",
    private: Mapping[str, Any] | None = None,
    family: str = "eagle3",
    vocabulary: int = 8192,
    selection: str | Path | None = None,
    heldout: int = 40,
    heldout_responses: str | Path | None = None,
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
    config: str | Path | StudyConfig,
    out: str | Path,
    *,
    template_arg: Mapping[str, Any] | None = None,
    full: str | Path | None = None,
    say: Say = print,
) -> Study:
    """Compare methods, data, selections, losses and starts on the same footing: a YAML file of a study in, results out.

    ``full`` is a file for what the method full reached, as the quickstart reads it. A stopped study goes on.

        print(redraft.study("study.yaml", "out/study"))
    """
    parsed, out = config if isinstance(config, StudyConfig) else read_study(Path(config)), Path(out)
    if template_arg:
        parsed = parsed.model_copy(update={"template_arg": parsed.template_arg | dict(template_arg)})
    results = StudyRun(parsed, out, say).run()
    if full is not None:
        write_full(results, Path(full), f"study {parsed.name}")
    return Study(out / RESULTS_FILE, write_tables(out / RESULTS_FILE), results["figures"])
