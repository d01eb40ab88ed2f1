"""Proof on real prompts that speculative decoding changes nothing: greedy texts equal plain decoding's.

Five drafts (good, stale, random, always wrong, sure of itself and often wrong), each as a chain and as trees, on
prompts of several domains. In float32 every text must be the same. In bfloat16 a verification of several tokens
rounds differently from a step of one, and where the target's two best logits nearly tie the texts may part: every
first difference is computed again in bfloat16 and, from the same weights, in float32, so that its gap is shown and not
claimed (redraft/evaluate/divergence.py).

    REDRAFT_DATA=folder python benchmarks/losslessness.py --out benchmarks/results/losslessness.json

``REDRAFT_DATA`` holds the files of ``SETS``; ``--prompts FILE ...`` takes others. Every answer is appended to
``--work`` at once, and the same command goes on where a killed run stopped. Ends with status 1 when a float32 text
differs.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from redraft import provenance
from redraft.adaptation.models import open_draft, open_target, template_prompts
from redraft.artifact import atomic_write_json
from redraft.data.prompts import Conversation, read_conversations
from redraft.decode.auto import make_decoder
from redraft.decode.engine import PlainDecoder
from redraft.decode.requests import Generation
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.errors import UserError
from redraft.evaluate.divergence import Divergence, explain, summary
from redraft.evaluate.speed import Prompt
from redraft.evaluate.statistics import ratio_of_sums
from redraft.progress import Progress, progress_bar
from redraft.settings.shapes import Shape, parse_shape
from redraft.target import Target

SETS = (
    "general/alpaca_9k.test.jsonl.gz",
    "general/dolly_3k.test.jsonl.gz",
    "general/mtbench101.test.jsonl.gz",
    "math/gsm8k.test.jsonl.gz",
    "code/humaneval.test.jsonl.gz",
    "code/mbpp.test.jsonl.gz",
    "medical/medquad.test.jsonl.gz",
)
DRAFTS = ("good", "stale", "random", "wrong", "overconfident")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--adapter", default="src/redraft/assets/maths-lora", help="'' for none")
    parser.add_argument("--draft", default="src/redraft/assets/general-draft", help="the stale draft")
    parser.add_argument("--private", default="src/redraft/assets/maths-private", help="what makes it good; '' for none")
    parser.add_argument("--prompts", type=Path, nargs="+", help=f"prompt files (default: {len(SETS)} of REDRAFT_DATA)")
    parser.add_argument("--count", type=int, default=210, help="prompts over all files")
    parser.add_argument("--longest", type=int, default=384, help="prompt tokens at most; longer ones are passed over")
    parser.add_argument("--tokens", type=int, default=64, help="response tokens at most")
    parser.add_argument("--shapes", nargs="+", default=["chain:5", "tree:5x4x16", "[[0],[1],[2],[0,0],[0,1],[0,0,0]]"])
    parser.add_argument("--drafts", default=",".join(DRAFTS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("out/losslessness"))
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    shapes = [parse_shape(text) for text in options.shapes]
    names, dtypes = options.drafts.split(","), options.dtypes.split(",")
    conversations = read_prompts(options)
    log = Log(options.work / "answers.jsonl", identity(options))
    total = len(dtypes) * options.count * (1 + len(names) * len(shapes))
    with progress_bar("comparing", total, "answers") as progress:
        counter = Counter(progress)
        for dtype in dtypes:
            run = Run(options, dtype, conversations, log, counter)
            run.plain()
            for name in names:
                run.compare(name, shapes)
    cells = summarise(log, dtypes, names, shapes)
    result = {
        "schema": "redraft.losslessness/1",
        "provenance": provenance.collect(options.seed, options.device),
        "setup": identity(options) | {"sampler": "greedy", "shapes": [shape.describe() for shape in shapes]},
        "cells": cells,
        "holds": all(cell["identical"] == cell["prompts"] for cell in cells if cell["dtype"] == "float32"),
    }
    atomic_write_json(options.out, result)
    for cell in cells:
        print(line(cell))
    return 0 if result["holds"] else 1


def identity(options: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    same = ("target", "adapter", "draft", "private", "count", "longest", "tokens", "device", "seed")
    files = [path.name for path in options.prompts] if options.prompts else list(SETS)
    return {name: getattr(options, name) for name in same} | {"prompt_files": files}


def read_prompts(options: argparse.Namespace) -> list[list[Conversation]]:
    """The conversations of every file. Raises ``UserError`` when the folder is not named."""
    files = options.prompts
    if not files:
        folder = os.environ.get("REDRAFT_DATA")
        if not folder:
            raise UserError("set REDRAFT_DATA to the folder of the prompt files, or name files with --prompts")
        files = [Path(folder) / name for name in SETS]
    return [read_conversations(path) for path in files]


# -- the log -----------------------------------------------------------------------------------------------------------
class Log:
    """Answers on disk, one JSON line each, appended at once; a torn last line is dropped."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        """Raises ``UserError`` when the file is of another configuration."""
        self.path, self.found = path, dict[str, dict[str, Any]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        path.write_text("".join(lines), encoding="utf-8")
        if not lines:
            self._append({"config": config})
        elif json.loads(lines[0])["config"] != config:
            raise UserError(f"{path} holds the answers of another configuration; remove it or choose another --work")
        for text in lines[1:]:
            record = json.loads(text)
            self.found[record["key"]] = record

    def once(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of this key, made and kept where there is none."""
        if key not in self.found:
            self.found[key] = make() | {"key": key}
            self._append(self.found[key])
        return self.found[key]

    def _append(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")


@dataclass
class Counter:
    """Counts finished answers into the progress bar."""

    progress: Progress
    done: int = 0

    def tick(self, what: str) -> None:
        self.done += 1
        self.progress.update(self.done, now=what)


# -- one data type -----------------------------------------------------------------------------------------------------
class Run:
    """All comparisons in one data type."""

    def __init__(
        self,
        options: argparse.Namespace,
        dtype: str,
        conversations: Sequence[Sequence[Conversation]],
        log: Log,
        counter: Counter,
    ) -> None:
        self.options, self.dtype, self.log, self.counter = options, dtype, log, counter
        self.target = open_target(options.target, dtype, options.device, options.adapter or None)
        # The same weights in float32: what differs from it is arithmetic alone.
        self.exact = self.target if dtype == "float32" else in_float32(self.target)
        self.prompts = pick(conversations, self.target, options)

    def plain(self) -> None:
        decoder = PlainDecoder(self.target)
        for prompt in self.prompts:
            self.log.once(plain_key(self.dtype, prompt.id), lambda: {"ids": self.answer(decoder, prompt).ids})  # noqa: B023
            self.counter.tick(f"{self.dtype} plain")

    def answer(self, decoder: PlainDecoder, prompt: Prompt) -> Generation:
        return decoder.generate(prompt.ids, self.options.tokens)

    def compare(self, name: str, shapes: Sequence[Shape]) -> None:
        draft = make_draft(name, self.target, self.options)
        for shape in shapes:
            decoder = make_decoder(self.target, draft, shape)
            for prompt in self.prompts:
                key = f"{cell_key(self.dtype, name, shape)}|{prompt.id}"
                self.log.once(key, lambda: self.comparison(decoder, prompt))  # noqa: B023
                self.counter.tick(f"{self.dtype} {name} {shape.describe()}")

    def comparison(self, decoder: PlainDecoder, prompt: Prompt) -> dict[str, Any]:
        """The record of one answer: rounds, and where and how it parts from plain decoding's."""
        expected = self.log.found[plain_key(self.dtype, prompt.id)]["ids"]
        found = self.answer(decoder, prompt)
        difference = explain(prompt.ids, expected, found.ids, self.exact, self.target)
        return {
            "tokens": len(found.ids) - 1,
            "rounds": len(found.rounds),
            "accepted": [record.accepted for record in found.rounds],
            "difference": None if difference is None else asdict(difference) | {"near_tie": difference.near_tie},
        }


def plain_key(dtype: str, prompt: str) -> str:
    return f"{dtype}|plain|{prompt}"


def cell_key(dtype: str, draft: str, shape: Shape) -> str:
    return f"{dtype}|{draft}|{shape.describe()}"


def in_float32(target: Target) -> Target:
    """A copy of the target, its weights as they are, computing in float32."""
    target.tap(())  # hooks would be copied along and fill the original's store
    return Target(copy.deepcopy(target.model).float(), target.tokenizer, name=target.name)


def pick(conversations: Sequence[Sequence[Conversation]], target: Target, options: argparse.Namespace) -> list[Prompt]:
    """``--count`` prompts, the files taking turns, those left out that are too long.

    Raises ``UserError`` when the files hold too few.
    """

    def short(found: Sequence[Conversation]) -> Iterator[Prompt]:
        for conversation in found:
            prompt = template_prompts([conversation], target, options.tokens)[0]
            if len(prompt.ids) <= options.longest:
                yield prompt

    def fits(conversation: Conversation) -> bool:
        # Four characters a token is generous; what is far beyond need not be tokenised.
        return sum(len(message["content"]) for message in conversation.messages[:1]) <= 8 * options.longest

    queues = [short([c for c in found if fits(c)]) for found in conversations]
    picked: list[Prompt] = []
    while queues and len(picked) < options.count:
        for queue in list(queues):
            prompt = next(queue, None)
            if prompt is None:
                queues.remove(queue)
            elif len(picked) < options.count:
                picked.append(prompt)
    if len(picked) < options.count:
        raise UserError(f"the files hold {len(picked)} prompts of at most {options.longest} tokens; lower --count")
    return picked


# -- the drafts --------------------------------------------------------------------------------------------------------
@torch.no_grad()
def make_draft(name: str, target: Target, options: argparse.Namespace) -> Eagle3Draft:
    """One of ``DRAFTS``. Raises ``UserError`` for another name."""
    if name == "good" and options.private:
        return open_draft(options.private, target, base=options.draft).draft
    draft = open_draft(options.draft, target).draft
    generator = torch.Generator().manual_seed(options.seed)
    head = draft.lm_head.weight
    if name == "random":
        for parameter in draft.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    elif name == "wrong":
        # What it believes least, with certainty: never what the target says.
        head.mul_(-40)
    elif name == "overconfident":
        # Disturbed, so that it errs, and sharpened until it gives one token everything: trees lose all other paths.
        head.add_(torch.randn(head.shape, generator=generator) * head.std() * 0.5).mul_(40)
    elif name not in DRAFTS:
        raise UserError(f"there is no draft {name!r}; known: {', '.join(DRAFTS)}")
    return draft


# -- the result --------------------------------------------------------------------------------------------------------
def summarise(log: Log, dtypes: Sequence[str], names: Sequence[str], shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    cells = []
    for dtype in dtypes:
        for name in names:
            for shape in shapes:
                start = cell_key(dtype, name, shape) + "|"
                records = {key.removeprefix(start): r for key, r in log.found.items() if key.startswith(start)}
                cells.append({"dtype": dtype, "draft": name, "shape": shape.describe()} | cell(records))
    return cells


def cell(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One draft, shape and data type: counts, tau, and every difference with its gap."""
    differing = {prompt: r["difference"] for prompt, r in records.items() if r["difference"] is not None}
    counted = [r for r in records.values() if r["rounds"]]
    found = [None if r["difference"] is None else restored(r["difference"]) for r in records.values()]
    counts = summary(found)
    return counts | {
        "unexplained": counts["prompts"] - counts["identical"] - counts["near_ties"],
        "tau_pooled": ratio_of_sums([r["tokens"] for r in counted], [r["rounds"] for r in counted]).to_dict(),
        "rounds": sum(r["rounds"] for r in counted),
        "accepted": sum(sum(r["accepted"]) for r in counted),
        "differences": [{"prompt": prompt} | difference for prompt, difference in differing.items()],
    }


def restored(difference: dict[str, Any]) -> Divergence:
    return Divergence(**{name: value for name, value in difference.items() if name != "near_tie"})


def line(cell: dict[str, Any]) -> str:
    """A cell in one line, for the terminal."""
    parted = cell["prompts"] - cell["identical"]
    shown = f", {parted} parted, {cell['near_ties']} of them near-ties" if parted else ""
    return (
        f"{cell['dtype']:9} {cell['draft']:14} {cell['shape']:42} tau {cell['tau_pooled']['value']:.2f}  "
        f"{cell['identical']} of {cell['prompts']} identical{shown}"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
