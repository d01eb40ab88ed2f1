"""Which architectures redraft serves how: every job on tiny random targets, held against transformers' own text.

    python benchmarks/architectures.py --out benchmarks/results/architectures.json --page docs/architectures.md

A verdict is ``exact`` (passes of ours, equal to the model's own), ``own path`` (the model's own cache or transformers'
own generation, equal too), ``refused`` (one line that says why and what to do instead) or ``wrong``. Greedy, float32,
prompts of 24 to 30 tokens, windows and chunks of 16; drafts propose the true continuation with wrong tokens at changing
places, so that rounds are accepted whole, in part and not at all.
"""

from __future__ import annotations

import argparse
import json
import runpy
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from batched import BatchedChainDecoder
from safetensors.torch import load_file

from redraft import provenance
from redraft.adaptation.adapt import AdaptRun
from redraft.adaptation.models import open_draft
from redraft.artifact import atomic_write_json, atomic_write_text
from redraft.data.generate import Request, generate
from redraft.data.store import Row
from redraft.decode.engine import ChainDecoder
from redraft.decode.tree import TreeDecoder
from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.files import save_draft
from redraft.errors import UserError
from redraft.features import FeatureStore
from redraft.loading import quiet
from redraft.settings.runs import AdaptConfig
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import StaticTree
from redraft.target import Target

TESTS = Path(__file__).resolve().parents[1] / "tests"
ZOO = SimpleNamespace(**runpy.run_path(str(TESTS / "architectures.py")))
BUILDERS = SimpleNamespace(**runpy.run_path(str(TESTS / "tiny_models.py")))
EXPORTS = ("vllm", "sglang", "plain")
JOBS = ("features", "regenerate", "chain", "tree", "batch", "adapt", *(f"export {name}" for name in EXPORTS))
CLOSE = 1e-5  # of a state's length


class Subject:
    """One architecture: the target as redraft has it, prompts, and the text that the model itself writes."""

    def __init__(self, name: str, tokens: int) -> None:
        self.name, self.tokens = name, tokens
        with quiet():
            self.prompts = ZOO.texts(3, 24)
            self.own = ZOO.own_answers(ZOO.build(name), self.prompts, tokens)
            self.target = Target(ZOO.build(name), BUILDERS.build_tokenizer(), name=name)
        # A text that ends early would be past no window.
        self.target.tokenizer.eos_token = None
        self.target.model.generation_config.eos_token_id = None
        self.target.model.config.eos_token_id = self.target.config.eos_token_id = None

    def draft(self) -> Any:
        return fresh_draft(self.target, list(range(100)), seed=1)

    def same(self, answers: list[list[int]], path: str) -> str:
        return path if answers == self.own else "wrong"

    # -- jobs ------------------------------------------------------------------------------------------------------
    def features(self) -> str:
        """Taps and final states of stored rows, against the whole model's hidden states."""
        # Narrower random weights: states of wide ones multiply rounding by a hundred.
        with quiet():
            target = Target(ZOO.build(self.name, 0.1), None, taps=(2, 4, 5))
        rows = [
            Row(f"r{i}", prompt, answer[:40], 0.0, 0, 1.0, 0, "length", "")
            for i, (prompt, answer) in enumerate(zip(self.prompts, self.own, strict=True))
        ]
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            store = FeatureStore(Path(folder), {})
            store.build(target, rows)
            for row in rows:
                ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
                out = target.model(ids, use_cache=False, output_hidden_states=True)
                taps, hidden = store.get(row)
                theirs = torch.cat([out.hidden_states[k][0] for k in target.taps], -1)[: len(taps)]
                first = len(row.prompt_ids)
                logits = target.logits(hidden)
                if not (near(taps, theirs) and near(logits, out.logits[0, first : first + len(hidden)])):
                    return "wrong"
        return "exact"

    def regenerate(self) -> str:
        requests = [Request(str(i), prompt, Sampler()) for i, prompt in enumerate(self.prompts)]
        found = {done.request.key: done.response_ids for done in generate(self.target, requests, self.tokens)}
        answers = [found[str(i)] for i in range(len(requests))]
        return self.same(answers, "exact" if self.target.paths.slots else "own path")

    def chain(self) -> str:
        decoder = ChainDecoder(self.target, self.draft(), 4)
        path = "exact" if self.target.paths.cached else "own path"
        return self.same(self._one_by_one(decoder), path)

    def tree(self) -> str:
        decoder = TreeDecoder(self.target, self.draft(), StaticTree(((0,), (1,), (0, 0), (0, 1), (0, 0, 0))))
        return self.same(self._one_by_one(decoder), "exact")

    def _one_by_one(self, decoder: Any) -> list[list[int]]:
        planted, answers, accepted = ZOO.Planted(decoder, self.prompts, self.own), [], []
        for prompt, own in zip(self.prompts, self.own, strict=True):
            planted.start(own)
            got = decoder.generate(prompt, self.tokens)
            answers.append(got.ids)
            accepted += [record.accepted for record in got.rounds]
        assert max(accepted) == 4 and min(accepted) == 0, "rounds must be accepted whole, in part and not at all"
        return answers

    def batch(self) -> str:
        decoder = BatchedChainDecoder(self.target, self.draft(), 4, slots=2)
        ZOO.Planted(decoder, self.prompts, self.own)
        return self.same([one.ids for one in decoder.generate(self.prompts, self.tokens)], "exact")


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether vectors differ by rounding alone."""
    return bool(((ours - theirs).norm(dim=-1) <= CLOSE * theirs.norm(dim=-1)).all())


def judged(job: Callable[[], str]) -> tuple[str, str]:
    """The verdict of a job, and the line of a refusal."""
    try:
        return job(), ""
    except UserError as error:
        return "refused", " ".join(str(error).split())


def adapted(subject: Subject) -> dict[str, tuple[str, str]]:
    """A whole adaptation through every stage, and each export read back: the same draft as the merged one."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        world = Path(folder)
        target, draft = ZOO.build(subject.name), subject.draft()
        target.save_pretrained(world / "target")
        BUILDERS.build_tokenizer().save_pretrained(world / "target")
        save_draft(world / "draft", draft, {})
        asked = ["".join(chr(97 + (7 * i + j * j) % 26) for j in range(24)) for i in range(40)]
        lines = [json.dumps({"id": f"p{i}", "messages": [{"role": "user", "content": q}]}) for i, q in enumerate(asked)]
        (world / "prompts.jsonl").write_text("\n".join(lines))
        config = AdaptConfig(
            **{"target": str(world / "target"), "draft": str(world / "draft"), "prompts": str(world / "prompts.jsonl")}
            | {"out": world / "run", "dtype": "float32", "max_new_tokens": 24, "bench_tokens": 24, "gamma": 3}
            | {"heldout_prompts": 4, "bench_prompts": 4, "train": {"epochs": 1}, "exports": EXPORTS}
        )
        run = AdaptRun(config, say=lambda line: None)
        found = {"adapt": judged(lambda: whole_run(run))}
        for name in EXPORTS:
            found[f"export {name}"] = judged(lambda name=name: read_back(run, name))  # type: ignore[misc]
    return found


def whole_run(run: AdaptRun) -> str:
    """Every stage; the answers that it trained on must be the model's own, and decoding lossless."""
    result = run.run()
    rows = [json.loads(line) for line in (run.folder / "responses.jsonl").read_text().splitlines()]
    model = run.target.model
    for row in rows[:6]:
        ids = torch.tensor([row["prompt_ids"]])
        limits = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 2, "pad_token_id": 3}
        own = model.generate(ids, attention_mask=torch.ones_like(ids), **limits)
        if own[0, ids.shape[1] :].tolist() != row["response_ids"]:
            return "wrong"
    if any(draft["identical"] < draft["prompts"] for draft in result["drafts"].values() if "identical" in draft):
        return "wrong"
    return "exact" if run.target.paths.slots else "own path"


def read_back(run: AdaptRun, name: str) -> str:
    """Whether an engine's folder, opened as any public checkpoint, is the merged draft."""
    folder = run.folder / f"export-{name}"
    merged, back = run.aligned, open_draft(folder, run.target).draft
    mine, theirs = merged.state_dict(), back.state_dict()
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    return "exact" if same and load_file(folder / "model.safetensors") else "wrong"


def page(rows: list[dict[str, str]]) -> str:
    """The table as a page."""
    names = list(dict.fromkeys(row["model_type"] for row in rows))
    found = {(row["model_type"], row["job"]): row["verdict"] for row in rows}
    jobs = [job for job in JOBS if any(row["job"] == job for row in rows)]
    lines = [
        "# Architectures",
        "",
        "What redraft does for a target of each architecture, tried on tiny random models of it in float32: 200 greedy",
        "tokens past every window and chunk (16 tokens here), token for token against transformers' own `generate`.",
        "Made by `benchmarks/architectures.py`; a test tries a shorter text again at every change.",
        "",
        "- **exact**: fast passes of ours (buffers that roll back, many sequences in one pass, trees under one mask).",
        "- **own path**: the model's own cache or transformers' own generation does the work. Slower, as exact.",
        "- **refused**: one line that says why and names the way out, before anything is spent.",
        "",
        "Which one holds is not looked up in this table: redraft tries it when a target is opened, on 24 tokens with",
        "every window narrowed, and says the verdict. So an architecture that is not listed is right too, or refused.",
        "",
        "| | " + " | ".join(jobs) + " |",
        "| --- |" + " --- |" * len(jobs),
    ]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(found.get((name, job), "") for job in jobs) + " |")
    refused = dict.fromkeys(row["says"] for row in rows if row["verdict"] == "refused")
    if refused:
        lines += ["", "What is said where a job is refused:", "", *(f"- {text}" for text in refused)]
    return "\n".join(lines) + "\n"


def table(names: list[str], jobs: list[str], tokens: int, say: Callable[[str], None] = print) -> list[dict[str, str]]:
    """One row for every architecture and job."""
    rows = []
    for name in names:
        subject = Subject(name, tokens)
        found = {job: judged(getattr(subject, job)) for job in jobs if hasattr(subject, job)}
        if "adapt" in jobs:
            found |= adapted(subject)
        rows += [{"model_type": name, "job": job, "verdict": v, "says": says} for job, (v, says) in found.items()]
        say(f"{name}: " + ", ".join(f"{job} {verdict}" for job, (verdict, _) in found.items()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--only", action="append", default=[], help="architectures, for a trial")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = table(options.only or list(ZOO.ARCHITECTURES), list(JOBS), options.tokens)
    wrong = sum(row["verdict"] == "wrong" for row in rows)
    record = {"rows": rows, "wrong": wrong, "tokens": options.tokens, "provenance": provenance.collect(0, "cpu")}
    atomic_write_json(options.out, record)
    atomic_write_text(options.page, page(rows))


if __name__ == "__main__":
    main()
