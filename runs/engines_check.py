"""Real engines beside our own chain: tau by each engine's own counters, on exports of the same drafts.

Every draft is exported in every format that an engine takes, and served to the same prompts: greedy, a fixed number of
drafted tokens, one prompt at a time.

  transformers  assisted generation (assistant_model, constant schedule, confidence threshold 0), standalone drafts
  vllm          EAGLE-3 as ``vllm`` and ``plain``, EAGLE-1, standalone drafts (method draft_model)
  llamacpp      llama.cpp's server: EAGLE-3 (draft-eagle3) and standalone drafts (draft-simple) as GGUF files

What is compared is 1 + accepted / rounds, over rounds in which tokens were drafted and after the first token, which
prefill gives. Our chain's rounds are counted as the engine counts its own (``engine_figures.py``), and the engine's
figure is asked to lie within the bootstrap interval over prompts of ours. In float32 texts and rounds should be the
same but for near-ties; in bfloat16 near-ties fall differently in each engine, and texts and rounds with them.

What was measured stays in ``--work`` and is not measured again while target, export, prompts, sizes and the engine's
version are the same. An engine that is not installed is left out, with the reason. `make engines-check` sets all of
them up.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from engine_figures import Row, beside, counted, speeds
from engine_runs import ENGINES, AbsentError, Case, Engine, Job, our_rows, version_of
from redraft.adaptation.models import open_any, open_target, template_prompts
from redraft.artifact import atomic_write_json, atomic_write_text, tensors_hash
from redraft.data.prompts import read_conversations
from redraft.data.suites.maths import maths_conversations
from redraft.errors import UserError
from redraft.loading import quiet
from redraft.provenance import collect
from redraft.registries import EXPORTERS, FAMILIES

EMBEDDED_TARGET = "embedded:smollm2-135m-instruct"
SCHEMA = "redraft.engines-check/1"


# -- the job ---------------------------------------------------------------------------------------------------------
def prepare(options: argparse.Namespace) -> Job:
    """Open the target and the prompts. Raises ``UserError``."""
    target = open_target(options.target, options.dtype, "cpu", options.adapter)
    asked = read_conversations(options.prompts) if options.prompts else maths_conversations(options.count, options.seed)
    templated = template_prompts(asked[: options.count], target, options.max_new_tokens)
    room = options.context - options.max_new_tokens - options.gamma - 1
    prompts = [{"id": prompt.id, "prompt_ids": prompt.ids} for prompt in templated if len(prompt.ids) <= room]
    if not prompts:
        raise UserError(f"no prompt of at most {room} tokens; raise --context")
    job = Job(target, prompts, options, Path(options.work))
    job.work.mkdir(parents=True, exist_ok=True)
    atomic_write_text(Path(job.file), "".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return job


def open_drafts(job: Job) -> dict[str, Any]:
    """The drafts by name, in the target's data type. Raises ``UserError``."""
    found: dict[str, Any] = {}
    for given in job.options.draft:
        name, _, source = given.rpartition("=")
        draft = open_any(source, job.target, job.options.base_draft).draft.to(job.target.dtype)
        name = name or draft.family
        if name in found:
            raise UserError(f"two drafts are called {name}; name them, as --draft NAME={source}")
        found[name] = draft
    return found


def cases(job: Job, engine: Engine, drafts: dict[str, Any], say: Callable[[str], None]) -> list[Case]:
    """Exports of the drafts for one engine; of several formats all behind the first are told of by name too."""
    found = []
    for name, draft in drafts.items():
        taken = [format for format in engine.formats if format in FAMILIES.get(draft.family).writers]
        for number, format in enumerate(taken):
            called = f"{name} ({format})" if number else name
            folder = job.work / f"{name}-{format}"
            try:
                with quiet():
                    EXPORTERS.get(format)(draft, folder, job.target, speculative_tokens=job.options.gamma)
            except UserError as error:
                say(f"{called} has no {format} export: {error}")
                continue
            found.append(Case(called, draft, format, folder))
    return found


# -- what was measured stays -----------------------------------------------------------------------------------------
def kept(job: Job, name: str, parts: Sequence[str], measure: Callable[[], Any]) -> tuple[Any, bool]:
    """What ``measure`` gave the last time for the same ``parts``, or gives now; and whether it was there."""
    options = job.options
    sizes = [options.gamma, options.max_new_tokens, options.context, options.dtype, options.speeds]
    text = json.dumps([*parts, *sizes, job.target.content_hash(), job.prompts])
    key, path = hashlib.sha256(text.encode()).hexdigest()[:16], job.work / f"{name.replace(' ', '-')}.json"
    if path.is_file() and not options.again:
        held = json.loads(path.read_text())
        if held["key"] == key:
            return held["rows"], True
    rows = measure()
    atomic_write_json(path, {"key": key, "rows": rows})
    return rows, False


def files_hash(folder: Path) -> str:
    """A fingerprint of all files of a folder, names included."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode())
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def measure(job: Job, console: Console) -> dict[str, Any]:
    """Every draft in every engine in turn."""
    say = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    drafts, options = open_drafts(job), job.options
    ours: dict[str, list[Row]] = {}
    for name, draft in drafts.items():
        state = tensors_hash({key: tensor.cpu() for key, tensor in draft.state_dict().items()})
        ours[name], again = kept(job, f"ours-{name}", [state], lambda draft=draft: our_rows(job, draft))
        say(f"redraft: {name}{', measured before' if again else ''}")
    engines: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    left_out: dict[str, str] = {}
    failed: list[str] = []
    for name in options.engines:
        engine = ENGINES[name]
        try:
            versions[name] = version_of(engine, options)
        except AbsentError as error:
            left_out[name] = str(error)
            continue
        for case in cases(job, engine, drafts, say):
            parts, place = [versions[name], files_hash(case.folder)], f"{name}-{case.name}"
            try:
                with quiet():
                    rows, again = kept(job, place, parts, lambda e=engine, c=case: e.answer(job, c))
                found = figures(job, engine, rows, ours[next(k for k, d in drafts.items() if d is case.draft)])
            except UserError as error:
                say(f"{name}: {case.name} failed: {error}")
                failed.append(place)
                continue
            engines.setdefault(name, {})[case.name] = {"format": case.format} | found
            say(f"{name}: {case.name}: tau {found['tau_engine']:.3f}{', measured before' if again else ''}")
    return {"engines": engines, "versions": versions, "left_out": left_out, "failed": failed}


def figures(job: Job, engine: Engine, rows: dict[str, list[Row]], ours: list[Row]) -> dict[str, Any]:
    """One case's entry of the result. Raises ``UserError`` where the engine drafted nothing."""
    served = rows["draft"]
    if not any(each["rounds"] for each in served):
        raise UserError("it drafted nothing: it served the target without the draft")
    options = job.options
    mine = counted(ours, options.max_new_tokens, options.gamma, engine.beyond)
    found = beside(served, mine)
    return found | ({"speeds": speeds(served, rows["plain"])} if options.speeds else {})


def setup(job: Job, drafts: Sequence[str]) -> dict[str, Any]:
    """What was measured, for the result file."""
    options = job.options
    return {
        "target": options.target,
        "adapter": options.adapter,
        "drafts": list(drafts),
        "prompts": len(job.prompts),
        "prompts_from": options.prompts or f"gsm_symbolic, seed {options.seed}",
        "gamma": options.gamma,
        "max_new_tokens": options.max_new_tokens,
        "sampler": "greedy",
        "dtype": options.dtype,
        "batch": 1,
        "tau": "1 + accepted / rounds in which tokens were drafted, by each engine's own counters; ours counted alike",
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The table for a reader."""
    told = result["setup"]
    title = f"{told['prompts']} prompts, {told['sampler']}, {told['gamma']} drafted tokens, {told['dtype']}, batch 1"
    table = Table(title=title)
    for heading in ("engine", "draft", "tau there", "tau of our chain", "within", "texts as ours", "counts as ours"):
        table.add_column(heading, justify="left" if heading in ("engine", "draft") else "right")
    for name, found in result["engines"].items():
        for case, each in found.items():
            ours = each["tau_ours"]
            table.add_row(
                f"{name} {result['versions'][name]}",
                case,
                f"{each['tau_engine']:.3f}",
                f"{ours['value']:.3f} [{ours['low']:.3f}, {ours['high']:.3f}]",
                "yes" if each["within_interval"] else "NO",
                f"{each['same_text']} of {each['prompts']}",
                f"{each['same_counts']} of {each['prompts']}",
            )
    console.print(table)
    for name, reason in result["left_out"].items():
        console.print(f"{name} is left out: {reason}", markup=False, soft_wrap=True)


# -- the command line ------------------------------------------------------------------------------------------------
def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises ``UserError`` for an unknown engine or a number that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=EMBEDDED_TARGET)
    parser.add_argument("--adapter", help="PEFT adapter of the target")
    parser.add_argument(
        "--draft", action="append", required=True, metavar="[NAME=]FOLDER", help="repeatable; called by its family"
    )
    parser.add_argument("--base-draft", help="the draft that a private part belongs to")
    parser.add_argument("--prompts", help="prompt file, as for `redraft bench`; maths word problems without one")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--gamma", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--engines", default=",".join(ENGINES), help="which of them, with commas between")
    parser.add_argument("--vllm-python", default=".venv-vllm/bin/python", help="the interpreter that has vLLM")
    parser.add_argument("--llamacpp-python", default=default_llamacpp(), help="the one that has xllamacpp")
    parser.add_argument("--threads", type=int, default=0, help="of every engine; 0 leaves it to them")
    parser.add_argument("--warmup", type=int, default=1, help="prompts that an engine's own process decodes before")
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation: starts at once")
    parser.add_argument("--speeds", action="store_true", help="serve plain decoding too, in turn, and measure both")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    parser.add_argument("--seed", type=int, default=7, help="of the maths problems")
    parser.add_argument("--work", default="out/engines-check", help="exports, logs and what was measured")
    parser.add_argument("--out", default="out/engines-check.json")
    options = parser.parse_args(words)
    options.engines = [name.strip() for name in options.engines.split(",") if name.strip()]
    unknown = [name for name in options.engines if name not in ENGINES]
    if unknown:
        raise UserError(f"unknown engine {unknown[0]!r}; choose among: {', '.join(ENGINES)}")
    if min(options.gamma, options.count) < 1 or options.max_new_tokens < 2:
        raise UserError("--gamma and --count must be at least 1, --max-new-tokens at least 2")
    return options


def default_llamacpp() -> str:
    """This interpreter where it has xllamacpp, else the environment that the Makefile makes."""
    return sys.executable if importlib.util.find_spec("xllamacpp") else ".venv-llamacpp/bin/python"


def main() -> int:
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        options = parse()
        if options.threads:
            torch.set_num_threads(options.threads)
        with quiet():
            job = prepare(options)
        result = measure(job, console)
    except UserError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
    result = {"schema": SCHEMA, "setup": setup(job, options.draft)} | result
    atomic_write_json(Path(options.out), result | {"provenance": collect(seed=options.seed, device="cpu")})
    show(result, console)
    console.print(f"written: {options.out}")
    outside = [each for found in result["engines"].values() for each in found.values() if not each["within_interval"]]
    return 1 if result["failed"] or outside or not result["engines"] else 0


if __name__ == "__main__":
    sys.exit(main())
