"""Drafts that trainers wrote, opened by redraft: do they compute what their own package computed?

    python benchmarks/trainers/compare.py FOLDER [FOLDER ..] --out benchmarks/results/trainers.json

A FOLDER holds cases as the makers beside this script write them (``common.py`` has their form), with their targets.
Each draft is opened as every command opens it, its three draft steps are computed twice, by the unroll of training and
by the proposer of decoding, and both are held against the package's logits. "equal": both within 1e-5; "refused": the
draft was refused in words; "wrong": anything else. Exit status 1 where one is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from redraft.artifact import read_json
from redraft.drafts.base import Draft
from redraft.drafts.eagle.unroll import collate, unroll
from redraft.drafts.opening import open_checkpoint
from redraft.errors import UserError
from redraft.files import atomic_write_json
from redraft.loading import read_facts

WITHIN = 1e-5


class Given:
    """Features that are there already."""

    def __init__(self, taps: Tensor) -> None:
        self.taps = taps

    def get(self, row: Any) -> tuple[Tensor, Tensor]:
        """The taps [T, K*F] of the pairs, and no final states for the anchors."""
        return self.taps, torch.zeros(len(self.taps), 1)


@torch.inference_mode()
def unrolled(draft: Any, embedding: nn.Module, ids: Tensor, taps: Tensor, steps: int) -> Tensor:
    """Logits [J, T, D] as training computes them, from every position."""
    length = len(taps)
    row = SimpleNamespace(key="case", prompt_ids=ids[:1].tolist(), response_ids=ids[1 : length + 2].tolist())
    batch = collate([row], Given(taps), steps)
    batch = replace(batch, future_MJ=F.pad(ids, (0, 1), value=-1)[2:].unfold(0, steps, 1)[:length])
    return torch.stack([draft.logits(states) for states in unroll(draft, embedding, batch, steps)])


@torch.inference_mode()
def decoded(draft: Any, embedding: nn.Module, ids: Tensor, taps: Tensor, steps: int) -> Tensor:
    """The same as decoding computes them: a new request for each position."""
    rows = []
    for anchor in range(len(taps)):
        proposer = draft.proposer(SimpleNamespace(embedding=embedding), len(taps) + steps)
        states = proposer.feed(ids[1 : anchor + 2], taps[: anchor + 1])
        logits = [draft.logits(states)]
        for depth in range(1, steps):
            token = ids[anchor + 1 + depth : anchor + 2 + depth]
            states = proposer.expand(token, states, depth)
            logits.append(draft.logits(states))
        rows.append(torch.cat(logits))
    return torch.stack(rows, 1)


def embedding_of(target: Path) -> nn.Embedding:
    """The target's own table, from its file."""
    tensors = load_file(target / "model.safetensors")
    return nn.Embedding.from_pretrained(tensors["model.embed_tokens.weight"].float())


def differences(folder: Path, draft: Draft) -> dict[str, Any]:
    """What the draft computes otherwise than the case says: the largest difference of logits, and ``why`` in words."""
    case, golden = read_json(folder / "case.json"), load_file(folder / "golden.safetensors")
    ids, taps, logits = golden["ids"], golden["taps"], golden["logits"]
    faults = []
    if case["taps"] and list(draft.config.taps) != case["taps"]:
        faults.append(f"taps {list(draft.config.taps)} for {case['taps']}")
    if not torch.equal(draft.vocabulary(), golden["vocabulary"]):
        faults.append("another vocabulary")
        return {"largest_difference": None, "why": "; ".join(faults)}
    model, embedding = draft.float().eval(), embedding_of(folder.parent / case["target"])
    found = {}
    for way, compute in {"unrolled": unrolled, "decoded": decoded}.items():
        found[way] = compute(model, embedding, ids, taps, len(logits))
        if not torch.allclose(found[way], logits, atol=WITHIN, rtol=WITHIN):
            worst = (found[way] - logits).abs().amax((1, 2)).tolist()
            faults.append(f"{way} differs by {', '.join(f'{value:.2g}' for value in worst)} at its steps")
    largest = max(float((one - logits).abs().max()) for one in found.values())
    row: dict[str, Any] = {"largest_difference": largest, "why": "; ".join(faults)}
    if "logits_trainer" in golden:
        row["to_its_trainer"] = float((found["unrolled"] - golden["logits_trainer"]).abs().max())
    return row


def compare(folder: Path) -> dict[str, Any]:
    """The row of one case."""
    case = read_json(folder / "case.json")
    row = {"case": folder.name, **{key: case[key] for key in ("trainer", "version", "options")}}
    try:
        facts = read_facts(str(folder.parent / case["target"]), tokenizer=False)
        opened = open_checkpoint(folder / "checkpoint", facts)
    except UserError as error:
        shown = str(error).replace(str(folder), folder.name)
        return row | {"verdict": "refused", "largest_difference": None, "why": shown}
    found = differences(folder, opened.draft)
    return row | {"verdict": "wrong" if found["why"] else "equal"} | found


def cases(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/case.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of cases")
    parser.add_argument("--out", type=Path, help="the result file")
    options = parser.parse_args()
    rows = []
    for path in [path for folder in options.folders for path in cases(folder)]:
        try:
            rows.append(compare(path))
        except Exception as error:  # what ends in a traceback is wrong, and the others are still to be seen
            about = read_json(path / "case.json")
            row = {"case": path.name, **{key: about[key] for key in ("trainer", "version", "options")}}
            why = f"{type(error).__name__}: {error}"
            rows.append(row | {"verdict": "wrong", "largest_difference": None, "why": why})
        last = rows[-1]
        size = "" if last["largest_difference"] is None else f"{last['largest_difference']:.1e}"
        print(f"{last['verdict']:8} {size:8} {last['case']}  {last['why']}", flush=True)
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("equal", "refused", "wrong")}
    print(json.dumps(counts))
    if options.out:
        atomic_write_json(options.out, {"within": WITHIN, "counts": counts, "rows": rows})
    sys.exit(counts["wrong"] > 0)


if __name__ == "__main__":
    main()
