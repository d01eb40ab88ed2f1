"""``redraft quickstart``: the whole story on the embedded model, with its summary and report page."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.adaptation.adapt import AdaptRun
from redraft.adaptation.advice import ProbeResult
from redraft.adaptation.models import contestants, template_prompts
from redraft.adaptation.probe import probe
from redraft.arithmetic import EFFICIENCY, fastest
from redraft.artifact import atomic_write_json, atomic_write_text
from redraft.data.prompts import read_conversations
from redraft.data.suites.maths import maths_conversations
from redraft.drafts.groups import prepare, trained_parameters
from redraft.files import use_folder
from redraft.locks import held
from redraft.settings.runs import AdaptConfig

EMBEDDED = "embedded:smollm2-135m-instruct"
TRAIN_SEED, EVALUATION_SEED = 1, 2
# Questions that are answered and trained on, and the 10^9 operations that all of them take, from a run's cost ledger.
QUESTIONS, GIGA_OPERATIONS = 344, 51_000
# On a processor that would take longer than these seconds for them there are fewer, but a draft learns from so many.
SECONDS, FEWEST = 340, 128


def asset(name: str) -> Path:
    """A committed artifact that ships inside the package."""
    return Path(str(files("redraft"))) / "assets" / name


def embedded_prompts(out: Path, train: int, evaluation: int) -> tuple[Path, Path]:
    """Prompt files of the embedded maths domain, user turns alone; no question of one is in the other."""
    measured = maths_conversations(evaluation, EVALUATION_SEED)
    trained = maths_conversations(train, TRAIN_SEED, exclude={c.messages[0]["content"] for c in measured})
    paths = out / "prompts.jsonl", out / "evaluation.jsonl"
    use_folder(out, "folder of the quickstart")
    for path, found in zip(paths, (trained, measured), strict=True):
        asked = [{"id": c.id, "messages": [m for m in c.messages if m["role"] == "user"]} for c in found]
        atomic_write_text(path, "".join(json.dumps(each) + "\n" for each in asked))
    return paths


def affordable(out: Path, say: Callable[[str], None] = print) -> int:
    """How many questions the ten minutes allow on this machine; of a run that has begun, as many as it has."""
    written = out / "prompts.jsonl"
    if (out / "run").is_dir() and written.is_file():
        return len(written.read_text(encoding="utf-8").splitlines())
    choice = fastest("cpu")
    rate = dict(choice.gflops)[choice.dtype]
    share = SECONDS * rate * EFFICIENCY[choice.dtype] / GIGA_OPERATIONS
    if share >= 1:
        return QUESTIONS
    count = max(FEWEST, int(QUESTIONS * share) // 8 * 8)
    say(f"questions: {count} instead of {QUESTIONS}, for ten minutes at this machine's {rate:.0f} GFLOP/s")
    return count


def quickstart_config(out: Path, train: int = QUESTIONS, evaluation: int = 16) -> AdaptConfig:
    """The settings of the quickstart's adaptation."""
    prompts, measured = embedded_prompts(out, train, evaluation)
    return AdaptConfig(
        target=str(asset("maths-lora")),
        base_target=EMBEDDED,
        draft=str(asset("general-draft")),
        prompts=str(prompts),
        eval_prompts=str(measured),
        out=out / "run",
        max_new_tokens=160,
        bench_tokens=128,
        bench_prompts=evaluation,
        gamma=3,
        train={"epochs": 8, "batch_anchors": 768, "learning_rate": 4e-3, "evaluate_every": 60},
        exports=("vllm", "plain"),
    )


def quickstart(out: Path, say: Callable[[str], None] = print) -> tuple[dict[str, Any], dict[str, Any], ProbeResult]:
    """Probe, regenerate, select, adapt, merge, export, bench; returns summary, benchmark result and probe."""
    with held(out, "folder of the quickstart", say):
        began = time.monotonic()
        run = AdaptRun(quickstart_config(out, affordable(out, say)), say)
        with held(run.folder, say=say):
            found = run_probe(run)
            say(f"probe: {found.verdict}; {found.advice}")
            result = run.run()
            summary = summarise(run, result, (time.monotonic() - began) / 60)
            atomic_write_json(out / "summary.json", summary)
            atomic_write_json(out / "probe.json", found.to_dict())
            run.report(out / "report.html", out / "summary.json")
    return summary, result, found


def run_probe(run: AdaptRun, prompts: int = 12) -> ProbeResult:
    """The probe on a run's held-out prompts, with its base target as the reference where one is named."""
    config, draft = run.config, run.stale.draft
    asked = template_prompts(run.source.prompts[1][:prompts], run.target, config.max_new_tokens)
    base, targets = run.open_base(), contestants(run.target, config.dtype, run.open_target, draft.taps)
    with run.log.counted("probe", len(asked) * (2 if base else 1), "prompts") as (_, progress):
        return probe(
            run.target,
            draft,
            asked,
            config.gamma,
            config.max_new_tokens,
            base,
            progress=progress.update,
            targets=targets,
            say=lambda text: run.say(f"probe: {text}"),
        )


def summarise(run: AdaptRun, result: dict[str, Any], minutes: float) -> dict[str, Any]:
    """The quickstart's evidence file. ``full`` comes from the committed run of the same data and says so."""
    drafts = {"aligned": result["drafts"]["stale"], **result["drafts"]}  # an old draft that was kept is both
    tau: dict[str, Any] = {name: drafts[name]["tau_pooled"]["value"] for name in ("stale", "aligned")}
    reference = json.loads(asset("quickstart-full.json").read_text())
    tau["full"] = reference["tau"]
    prepared, _ = prepare(copy.deepcopy(run.stale.draft), run.config.method, run.config.private_size)
    trained = trained_parameters(prepared, run.config.method)
    return {
        "tau": tau,
        "tau_full_from": reference["from"],
        "speedup": {name: drafts[name]["speedup"]["value"] for name in ("stale", "aligned")},
        "trained_fraction_of_full": trained / trained_parameters(run.stale.draft, "full"),
        "minutes": minutes,
        "questions": len(read_conversations(run.config.prompts or "")),
        "sampler": f"{result['setup']['sampler']}, chain of {result['setup']['gamma']}",
        "provenance": provenance.collect(seed=run.config.seed, device=run.config.device),
    }
