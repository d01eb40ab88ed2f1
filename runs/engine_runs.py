"""How each engine is asked for its answers: our own decoders, transformers, vLLM and llama.cpp's server.

An engine takes some of the formats that drafts are exported in; a draft is served in all of them that its family is
written in. vLLM and llama.cpp run in processes and environments of their own (``vllm_worker.py``,
``llamacpp_worker.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from engine_figures import Row, row
from redraft.decode.engine import ChainDecoder, PlainDecoder
from redraft.drafts.standalone import StandaloneDraft
from redraft.errors import UserError
from redraft.loading import quiet
from redraft.registries import EXPORTERS
from redraft.target import Target
from turns import Worker, take_turns

HERE = Path(__file__).parent
WARM_UP = 16


class AbsentError(UserError):
    """An engine that cannot be asked here, and why."""


@dataclass
class Job:
    """What every engine decodes. ``prompts`` are rows of ``id`` and ``prompt_ids``; ``work`` takes exports and logs."""

    target: Target
    prompts: list[dict[str, Any]]
    options: argparse.Namespace
    work: Path

    @property
    def tokens(self) -> int:
        return self.options.max_new_tokens

    @property
    def file(self) -> str:
        return str(self.work / "asked.jsonl")

    @cached_property
    def target_folder(self) -> str:
        """The target as a Hugging Face folder."""
        with quiet():
            self.target.save(self.work / "target")
        return str(self.work / "target")

    @cached_property
    def target_file(self) -> str:
        """The target as a GGUF file in the same data type."""
        whole = StandaloneDraft(self.target.model, self.target.tokenizer)
        with quiet():
            report = EXPORTERS.get("gguf")(whole, self.work / "target-gguf", self.target)
        return str(report.folder / "model.gguf")


@dataclass(frozen=True)
class Case:
    """A draft in one format. ``name`` is told of, ``folder`` holds the export."""

    name: str
    draft: Any
    format: str
    folder: Path


# -- in this process -------------------------------------------------------------------------------------------------
def our_rows(job: Job, draft: Any) -> list[Row]:
    """Our chain's answers, which go on for the length of a draft beyond the limit. Their text is plain decoding's."""
    gamma, found = job.options.gamma, []
    decoder, limit = ChainDecoder(job.target, draft, gamma), job.tokens + gamma
    for prompt in job.prompts:
        began = time.perf_counter()
        run = decoder.generate(prompt["prompt_ids"], limit)
        seconds = time.perf_counter() - began
        accepted, drafted = [r.accepted for r in run.rounds], [len(r.proposed) for r in run.rounds]
        found.append(row(prompt["id"], run.ids, seconds, accepted, drafted, gamma))
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


def assisted(job: Job, case: Case) -> dict[str, list[Row]]:
    """transformers with the export as assistant. It drafts for the first token too, so it is handed that one."""
    gamma, target = job.options.gamma, job.target
    with quiet():
        assistant = AutoModelForCausalLM.from_pretrained(case.folder, dtype=target.dtype).eval()
    settings = assistant.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = gamma, "constant"
    settings.assistant_confidence_threshold = 0.0
    firsts = [PlainDecoder(target).generate(prompt["prompt_ids"], 1).ids for prompt in job.prompts]
    found: dict[str, list[Row]] = {}
    for name, model in (("plain", None), ("draft", assistant)) if job.options.speeds else (("draft", assistant),):
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
def served(job: Job, engine: str, case: Case, command: list[str], environment: dict[str, str]) -> dict[str, list[Row]]:
    """The answers of a worker with the draft and, where speeds are asked for, of one without, in turn."""
    common = ["--prompts", job.file, "--speculative-tokens", str(job.options.gamma)]
    common += ["--max-new-tokens", str(job.tokens), "--warmup", str(job.options.warmup)]
    start = {}
    for name in ("plain", "draft") if job.options.speeds else ("draft",):
        record = job.work / f"{engine}-{case.name.replace(' ', '-')}-{name}.served.json"
        more = [] if name == "draft" else ["--draft", ""]  # the last word counts
        failure = f"{engine} failed on {case.name}, {name}"
        start[name] = partial(Worker, failure, [*command, *common, "--out", str(record), *more], record, environment)
    return {name: each["prompts"] for name, each in take_turns(start, len(job.prompts)).items()}


def vllm(job: Job, case: Case) -> dict[str, list[Row]]:
    """vLLM on Hugging Face folders of target and draft."""
    options = job.options
    command = [options.vllm_python, str(HERE / "vllm_worker.py"), "--target", job.target_folder]
    command += ["--draft", str(case.folder), "--method", method_of(case.folder), "--dtype", options.dtype]
    command += ["--max-model-len", str(options.context), *(["--eager"] if options.eager else [])]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    }
    if options.threads:
        environment |= {"OMP_NUM_THREADS": str(options.threads), "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return served(job, "vllm", case, command, environment)


def method_of(draft: Path) -> str:
    """vLLM's name of the kind of an exported draft."""
    config = json.loads((draft / "config.json").read_text())
    kinds = {"EagleLlamaForCausalLM": "eagle", "LlamaForCausalLMEagle3": "eagle3", "Eagle3Speculator": "eagle3"}
    kinds["Eagle3Qwen3ForCausalLM"] = "eagle3"
    return next((kinds[name] for name in config.get("architectures", []) if name in kinds), "draft_model")


def llamacpp(job: Job, case: Case) -> dict[str, list[Row]]:
    """llama.cpp's server on GGUF files of target and draft."""
    options = job.options
    command = [options.llamacpp_python, str(HERE / "llamacpp_worker.py"), "--target", job.target_file]
    command += ["--draft", str(case.folder / "model.gguf"), "--type", "eagle3" if case.draft.taps else "simple"]
    command += ["--context", str(options.context), *(["--full-cache"] if options.dtype == "float32" else [])]
    command += ["--threads", str(options.threads)] if options.threads else []
    return served(job, "llamacpp", case, command, {})


@dataclass(frozen=True)
class Engine:
    """``formats`` are those that it loads; ``beyond``: it drafts beyond an answer's last token.

    ``python`` is the option that names its interpreter, ``package`` what must be installed there and ``module`` what
    is imported of it.
    """

    answer: Callable[[Job, Case], dict[str, list[Row]]]
    formats: tuple[str, ...]
    beyond: bool
    package: str
    module: str
    python: str = ""


ENGINES = {
    "transformers": Engine(assisted, ("hf",), False, "transformers", "transformers"),
    "vllm": Engine(vllm, ("vllm", "plain", "hf"), True, "vllm-cpu", "vllm", "vllm_python"),
    "llamacpp": Engine(llamacpp, ("gguf",), False, "xllamacpp", "xllamacpp", "llamacpp_python"),
}


def version_of(engine: Engine, options: argparse.Namespace) -> str:
    """The version of what is installed. Raises ``AbsentError`` where nothing is."""
    if not engine.python:
        return str(__import__(engine.module).__version__)
    python = str(getattr(options, engine.python))
    names = f"({engine.package!r}, {engine.module!r})"
    asked = f"from importlib.metadata import packages_distributions as p, version as v\nd = p().get({engine.module!r})"
    asked += f"\nprint(v(([n for n in {names} if n in d] or d)[0]))"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    how = f"pip install {engine.package} there, or name another with --{engine.python.replace('_', '-')}"
    try:
        told = subprocess.run([python, "-c", asked], env=environment, capture_output=True, text=True)
    except OSError:
        raise AbsentError(f"there is no {python}; {how}") from None
    if told.returncode:
        raise AbsentError(f"{python} has no {engine.module}; {how}")
    return told.stdout.strip()
