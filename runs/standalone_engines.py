"""A standalone drafter in four engines on the same prompts, greedy, a fixed number of drafted tokens, batch 1.

  redraft       our own chain decoder
  transformers  assisted generation (assistant_model, constant schedule, confidence threshold 0)
  vllm          the method draft_model, in an environment of its own (vllm_worker.py)
  llamacpp      llama.cpp's server, draft-simple, on GGUF exports of both models (llamacpp_worker.py)

What is compared is block efficiency as every engine counts it: 1 + accepted / rounds, over rounds in which tokens were
drafted. Rounds begin after the first token, which prefill gives (transformers drafts that one too, so it is handed the
first token). Engines differ in the last round of an answer: where the limit leaves room for one token, redraft still
drafts one and transformers and llama.cpp none, and what stands behind an end token counts or not. In bfloat16
near-ties fall differently in each engine, and texts and rounds with them; in float32 they should not. An engine that is
not installed is left out, with the reason. `standalone-engines.sh` sets all of them up.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from redraft.adaptation.models import open_any, open_target, template_prompts
from redraft.artifact import atomic_write_json, atomic_write_text
from redraft.data.prompts import read_conversations
from redraft.data.suites.maths import maths_conversations
from redraft.decode.engine import ChainDecoder, PlainDecoder
from redraft.drafts.standalone import StandaloneDraft
from redraft.errors import UserError
from redraft.loading import quiet
from redraft.provenance import collect
from redraft.registries import EXPORTERS
from redraft.target import Target
from turns import Worker, take_turns
from vllm_check import against, counts, served, speeds

EMBEDDED_TARGET = "embedded:smollm2-135m-instruct"
LLAMACPP_WORKER = Path(__file__).with_name("llamacpp_worker.py")
WARM_UP = 16


class AbsentError(UserError):
    """An engine that cannot be asked here, and why."""


@dataclass
class Job:
    """What every engine decodes. ``prompts`` are rows of ``id`` and ``prompt_ids``; ``work`` takes exports and logs."""

    target: Target
    draft: StandaloneDraft
    prompts: list[dict[str, Any]]
    options: argparse.Namespace
    work: Path

    @property
    def tokens(self) -> int:
        return self.options.max_new_tokens

    @property
    def file(self) -> str:
        return str(self.work / "prompts.jsonl")


def row(id: str, ids: list[int], seconds: float, accepted: Sequence[int], drafted: Sequence[int], gamma: int) -> dict:
    """One answer as the workers record theirs, from the accepted and drafted tokens of every round."""
    per_position = [sum(count > position for count in accepted) for position in range(gamma)]
    found = {"id": id, "ids": ids, "seconds": seconds, "rounds": len(accepted), "per_position": per_position}
    return found | {"drafted": sum(drafted), "accepted": sum(accepted), "accepted_by_round": list(accepted)}


# -- in this process -------------------------------------------------------------------------------------------------
def ours(job: Job) -> dict[str, Any]:
    """Our own decoders."""
    gamma, found = job.options.gamma, {}
    for name, decoder in (
        ("plain", PlainDecoder(job.target)),
        ("draft", ChainDecoder(job.target, job.draft, gamma)),
    ):
        decoder.generate(job.prompts[0]["prompt_ids"], min(WARM_UP, job.tokens))
        rows = []
        for prompt in job.prompts:
            began = time.perf_counter()
            run = decoder.generate(prompt["prompt_ids"], job.tokens)
            seconds = time.perf_counter() - began
            accepted, drafted = [r.accepted for r in run.rounds], [len(r.proposed) for r in run.rounds]
            rows.append(row(prompt["id"], run.ids, seconds, accepted, drafted, gamma))
        found[name] = rows
    return found


@contextmanager
def watched(rounds: list[tuple[int, int]]) -> Iterator[None]:
    """Accepted and proposed tokens of every round of assisted generation, which itself tells neither."""
    from transformers.generation.candidate_generator import AssistedCandidateGenerator as Generator

    before = Generator.update_candidate_strategy

    def count(self: Any, input_ids: Any, scores: Any, num_matches: int) -> None:
        rounds.append((int(num_matches), scores.shape[1] - 1))
        before(self, input_ids, scores, num_matches)

    Generator.update_candidate_strategy = count
    try:
        yield
    finally:
        Generator.update_candidate_strategy = before


def assisted(job: Job) -> dict[str, Any]:
    """transformers, plain and with an assistant."""
    gamma, target = job.options.gamma, job.target
    assistant = copy.deepcopy(job.draft.model).to(target.dtype).eval()
    assistant.generation_config.num_assistant_tokens = gamma
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    firsts = [PlainDecoder(target).generate(prompt["prompt_ids"], 1).ids for prompt in job.prompts]
    found: dict[str, Any] = {}
    for name, model in (("plain", None), ("draft", assistant)):
        generate(target, [*job.prompts[0]["prompt_ids"], *firsts[0]], min(WARM_UP, job.tokens) - 1, model)
        rows = []
        for prompt, first in zip(job.prompts, firsts, strict=True):
            rounds: list[tuple[int, int]] = []
            with watched(rounds):
                began = time.perf_counter()
                more = first[0] not in target.eos_ids and job.tokens > 1
                text = [*prompt["prompt_ids"], *first]
                ids = [*first, *(generate(target, text, job.tokens - 1, model) if more else [])]
                seconds = time.perf_counter() - began
            drafted = [pair for pair in rounds if pair[1]]
            rows.append(row(prompt["id"], ids, seconds, [a for a, _ in drafted], [p for _, p in drafted], gamma))
        found[name] = rows
    return found


@torch.inference_mode()
def generate(target: Target, text: Sequence[int], tokens: int, assistant: Any) -> list[int]:
    """New ids after ``text`` from transformers' own loop, greedy."""
    start = torch.tensor([list(text)], device=target.device)
    options = {"attention_mask": torch.ones_like(start), "max_new_tokens": tokens, "do_sample": False}
    options |= {"eos_token_id": list(target.eos_ids), "pad_token_id": target.eos_ids[0] if target.eos_ids else 0}
    return target.model.generate(start, assistant_model=assistant, **options)[0, len(text) :].tolist()


# -- in processes of their own ---------------------------------------------------------------------------------------
def need_module(python: str, module: str, how: str) -> None:
    """Raise ``AbsentError`` unless this interpreter is there and finds the module."""
    asked = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        missing = subprocess.run([python, "-c", asked], env=environment, capture_output=True).returncode
    except OSError:
        raise AbsentError(f"there is no {python}; {how}") from None
    if missing:
        raise AbsentError(f"{python} has no {module}; {how}")


def vllm(job: Job) -> dict[str, Any]:
    """vLLM's method draft_model, on Hugging Face folders of both models."""
    options = job.options
    need_module(options.vllm_python, "vllm", "make .venv-vllm/.made, or name another with --vllm-python")
    with quiet():
        job.target.save(job.work / "target")
        EXPORTERS.get("hf")(job.draft, job.work / "draft", job.target, speculative_tokens=options.gamma)
    asked = argparse.Namespace(
        vllm_python=options.vllm_python,
        target=str(job.work / "target"),
        prompts=job.file,
        max_model_len=options.context,
        speculative_tokens=options.gamma,
        max_new_tokens=job.tokens,
        eager=options.eager,
    )
    more = ("--method", "draft_model", "--dtype", options.dtype, "--warmup", str(options.warmup))
    start = {
        "plain": partial(served, "vllm-plain", "", asked, job.work, *more),
        "draft": partial(served, "vllm-draft", str(job.work / "draft"), asked, job.work, *more),
    }
    found = take_turns(start, len(job.prompts))
    return {name: each["prompts"] for name, each in found.items()} | {"version": found["draft"]["vllm"]}


def llamacpp(job: Job) -> dict[str, Any]:
    """llama.cpp's server, on GGUF files of both models in the same data type."""
    options = job.options
    need_module(options.llamacpp_python, "xllamacpp", "pip install xllamacpp, or name another with --llamacpp-python")
    whole = StandaloneDraft(job.target.model, job.target.tokenizer)
    files = {}
    for name, model in (("target", whole), ("draft", job.draft)):
        report = EXPORTERS.get("gguf")(model, job.work / f"{name}-gguf", job.target, speculative_tokens=options.gamma)
        files[name] = str(report.folder / "model.gguf")
    start = {}
    for name, draft in (("plain", ""), ("draft", files["draft"])):
        record = job.work / f"llamacpp-{name}.json"
        command = [options.llamacpp_python, str(LLAMACPP_WORKER), "--target", files["target"], "--draft", draft]
        command += ["--prompts", job.file, "--out", str(record), "--context", str(options.context)]
        command += ["--speculative-tokens", str(options.gamma), "--max-new-tokens", str(job.tokens)]
        command += ["--warmup", str(options.warmup)]
        command += ["--threads", str(options.threads)] if options.threads else []
        start[name] = partial(Worker, f"llama.cpp failed on the {name} configuration", command, record, {})
    found = take_turns(start, len(job.prompts))
    return {name: each["prompts"] for name, each in found.items()} | {"version": found["draft"]["xllamacpp"]}


ENGINES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "redraft": ours,
    "transformers": assisted,
    "vllm": vllm,
    "llamacpp": llamacpp,
}


# -- figures ---------------------------------------------------------------------------------------------------------
def figures(found: dict[str, Any], reference: list[dict[str, Any]] | None) -> dict[str, Any]:
    """What the result says of one engine. ``reference`` are our own answers: how many are the same, and round by round.

    Raises ``UserError`` when the engine drafted nothing.
    """
    plain, rows = found["plain"], found["draft"]
    if not any(each["rounds"] for each in rows):
        raise UserError("it drafted nothing: it served the target without the drafter")
    numbers = counts(rows)
    result = {
        "block_efficiency": numbers["tau_counters"],
        "rounds": numbers["rounds"],
        "proposed": numbers["drafted"],
        "accepted": numbers["accepted"],
        "acceptance_unconditional": numbers["acceptance_unconditional"],
        "plain": speeds(plain),
        "draft": speeds(rows),
        **against(rows, plain),
        "per_prompt": [{k: v for k, v in each.items() if k not in ("ids", "seconds")} for each in rows],
    }
    if reference is not None:
        pairs = list(zip(rows, reference, strict=True))
        result["same_text_as_redraft"] = sum(mine["ids"] == other["ids"] for mine, other in pairs)
        if all("accepted_by_round" in mine for mine in rows):
            # The last round of an answer ends differently in every engine.
            cut = [(mine["accepted_by_round"][:-1], other["accepted_by_round"][:-1]) for mine, other in pairs]
            result["same_rounds_as_redraft"] = sum(a == b[: len(a)] for a, b in cut)
    return result | ({"version": found["version"]} if "version" in found else {})


def show(result: dict[str, Any], console: Console) -> None:
    """The table for a reader."""
    setup = result["setup"]
    length, dtype = setup["gamma"], setup["dtype"]
    table = Table(title=f"{setup['prompts']} prompts, {setup['sampler']}, {length} drafted tokens, {dtype}, batch 1")
    shown = ("block efficiency", "accepted", "proposed", "rounds", "tok/s plain", "tok/s draft")
    for heading in ("", *shown, "text as plain", "as redraft"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for name, found in result["engines"].items():
        tau = found["block_efficiency"]
        table.add_row(
            name,
            f"{tau['value']:.2f} [{tau['low']:.2f}, {tau['high']:.2f}]",
            *(str(found[key]) for key in ("accepted", "proposed", "rounds")),
            *(f"{found[key]['tok_s']:.1f}" if not setup["counts_only"] else "-" for key in ("plain", "draft")),
            f"{found['identical_to_plain']} of {setup['prompts']}",
            f"{found['same_text_as_redraft']} of {setup['prompts']}" if "same_text_as_redraft" in found else "-",
        )
    console.print(table)
    for name, reason in result["left_out"].items():
        console.print(f"{name} is left out: {reason}", markup=False, soft_wrap=True)


# -- the job ---------------------------------------------------------------------------------------------------------
def prepare(options: argparse.Namespace) -> Job:
    """Open both models and the prompts. Raises ``UserError``."""
    target = open_target(options.target, options.dtype, "cpu", options.adapter)
    draft = open_any(options.draft, target, options.base_draft).draft
    if draft.taps:
        raise UserError(f"{options.draft} reads the target's states; the four engines share standalone drafts alone")
    asked = read_conversations(options.prompts) if options.prompts else maths_conversations(options.count, options.seed)
    templated = template_prompts(asked[: options.count], target, options.max_new_tokens)
    room = options.context - options.max_new_tokens - options.gamma - 1
    prompts = [{"id": prompt.id, "prompt_ids": prompt.ids} for prompt in templated if len(prompt.ids) <= room]
    if not prompts:
        raise UserError(f"no prompt of at most {room} tokens; raise --context")
    job = Job(target, draft.to(target.dtype), prompts, options, Path(options.out).parent / "standalone-engines")
    job.work.mkdir(parents=True, exist_ok=True)
    atomic_write_text(Path(job.file), "".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return job


def measure(job: Job, console: Console) -> dict[str, Any]:
    """Every engine in turn."""
    options, engines, left_out, failed = job.options, {}, {}, []
    reference = None
    for name in [name for name in ENGINES if name in options.engines]:
        console.print(f"{name} ...")
        try:
            with quiet():
                found = ENGINES[name](job)
            engines[name] = figures(found, reference)
        except UserError as error:
            left_out[name] = str(error)
            failed += [] if isinstance(error, AbsentError) else [name]
            continue
        reference = reference or (found["draft"] if name == "redraft" else None)
        if options.counts_only:
            for part in ("plain", "draft", "speedup"):
                del engines[name][part]
    sizes = {"draft": job.draft.parameters_per_token, "target": job.target.parameters_per_token}
    setup = {
        "target": options.target,
        "adapter": options.adapter,
        "draft": options.draft,
        "gamma": options.gamma,
        "prompts": len(job.prompts),
        "prompts_from": options.prompts or f"gsm_symbolic, seed {options.seed}",
        "max_new_tokens": options.max_new_tokens,
        "sampler": "greedy",
        "dtype": options.dtype,
        "batch": 1,
        "parameters_per_token": sizes,
        "counts_only": options.counts_only,
        "block_efficiency": "1 + accepted / rounds in which tokens were drafted, from each engine's own counters",
    }
    provenance = collect(seed=options.seed, device="cpu")
    schema = "redraft.standalone-engines/1"
    return {"schema": schema, "setup": setup, "engines": engines, "left_out": left_out, "failed": failed} | {
        "provenance": provenance
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises ``UserError`` for an unknown engine or a number that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=EMBEDDED_TARGET)
    parser.add_argument("--adapter", help="PEFT adapter of the target")
    parser.add_argument("--draft", required=True, help="folder of a standalone drafter, or its private part")
    parser.add_argument("--base-draft", help="the drafter that a private part belongs to")
    parser.add_argument("--prompts", help="prompt file, as for `redraft bench`; maths word problems without one")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--gamma", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--engines", default=",".join(ENGINES), help="which of them, with commas between")
    parser.add_argument("--vllm-python", default=".venv-vllm/bin/python", help="the interpreter that has vLLM")
    parser.add_argument("--llamacpp-python", default=default_llamacpp(), help="the one that has xllamacpp")
    parser.add_argument("--threads", type=int, default=0, help="of llama.cpp; 0 is one a core")
    parser.add_argument("--warmup", type=int, default=2, help="prompts that an engine's own process decodes before")
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation: its speeds mean little")
    parser.add_argument("--counts-only", action="store_true", help="leave speeds out, as on a machine that is busy")
    parser.add_argument("--seed", type=int, default=7, help="of the maths problems")
    parser.add_argument("--out", default="out/standalone-engines.json")
    options = parser.parse_args(words)
    options.engines = [name.strip() for name in options.engines.split(",") if name.strip()]
    unknown = [name for name in options.engines if name not in ENGINES]
    if unknown:
        raise UserError(f"unknown engine {unknown[0]!r}; choose among: {', '.join(ENGINES)}")
    if min(options.gamma, options.count) < 1 or options.max_new_tokens < 2:
        raise UserError("--gamma and --count must be at least 1, --max-new-tokens at least 2")
    return options


def default_llamacpp() -> str:
    """This interpreter where it has xllamacpp, else the environment that the shell script makes."""
    return sys.executable if importlib.util.find_spec("xllamacpp") else ".venv-llamacpp/bin/python"


def main() -> int:
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        options = parse()
        with quiet():
            job = prepare(options)
        result = measure(job, console)
    except UserError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
    atomic_write_json(Path(options.out), result)
    show(result, console)
    console.print(f"written: {options.out}")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
