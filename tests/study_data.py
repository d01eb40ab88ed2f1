"""A tiny base target, a fine-tuned one, a draft, prompts and a small study of them, for the tests of studies.

The tests load it with ``runpy``, since test files cannot import each other.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.files import save_draft
from redraft.loading import tokenizer_hash
from redraft.target import Target

WORDS = "one two three four five six seven eight nine ten apples pears boxes cost each are there how many".split()


def prompts(seed: int, count: int) -> str:
    """Prompt lines with an answer, of which no two are the same."""
    order = random.Random(seed)
    lines = []
    for i in range(count):
        asked = {"role": "user", "content": f"{' '.join(order.choices(WORDS, k=5))} {seed} {i}"}
        said = {"role": "assistant", "content": " ".join(order.choices(WORDS, k=6))}
        lines.append(json.dumps({"id": f"p{seed}-{i}", "messages": [asked, said]}))
    return "\n".join(lines) + "\n"


def furnish(folder: Path, base: Target) -> None:
    """A base target, a fine-tuned one, a draft, another one that reads other layers, and prompts."""
    folder.mkdir()
    base.save(folder / "base")
    meta = {"target": {"name": "b", "hash": base.content_hash()}, "tokenizer_hash": tokenizer_hash(base.tokenizer)}
    save_draft(folder / "draft", fresh_draft(base, range(0, 120), seed=1, intermediate=32), meta)
    taps = base.taps
    base.tap((0, 2, 4))
    save_draft(folder / "elsewhere", fresh_draft(base, range(0, 120), seed=1, intermediate=32), meta)
    base.tap(taps)
    generator = torch.Generator().manual_seed(1)
    for weight in base.model.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    base.save(folder / "target")
    lines = [json.loads(line) for line in prompts(9, 12).splitlines()]
    (folder / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, seed, count in (("train", 0, 26), ("evaluation", 1, 5), ("other", 2, 4), ("general", 3, 4)):
        (folder / f"{name}.jsonl").write_text(prompts(seed, count))


def furnished(folder: Path, made: Path, tiny_target: Callable[..., Target]) -> Path:
    """The folder, with a copy of what :func:`furnish` makes once, in ``made``."""
    if not made.exists():
        furnish(made, tiny_target(seed=0, taps=(1, 3, 5)))
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder


def settings(**changes: Any) -> dict[str, Any]:
    """A small study; ``changes`` replace keys."""
    return {
        "name": "tiny",
        "targets": {
            "t": {
                "target": "target",
                "base_target": "base",
                "draft": "draft",
                "prompts": "train.jsonl",
                "evaluation": {"domain": "evaluation.jsonl", "other": "other.jsonl"},
                "heldout_prompts": 4,
            }
        },
        "data": {
            "regenerated": {},
            "reference": {"kind": "reference"},
            "served": {"kind": "traces", "path": "traces.jsonl"},
        },
        "selections": {
            "early": {"scorer": "length", "budget": "50%", "on": "prompts"},
            "early-rejection": {"scorer": "rejection", "budget": "50%", "on": "prompts"},
        },
        "starts": {"elsewhere": {"draft": "elsewhere"}},
        "general": {"prompts": "general.jsonl"},
        "grid": {"methods": ["fc", "full"], "seeds": [0, 1]},
        "cells": [
            {"method": "eda", "data": "reference"},
            {"method": "fc", "data": "served"},
            {"method": "fc", "selection": "length@50%"},
            {"method": "fc", "selection": "early"},
            {"method": "fc", "selection": "rejection@50%"},
            {"method": "fc", "selection": "early-rejection"},
            {"method": "fc", "data": "reference", "selection": "rejection@50%"},
            {"method": "fc", "selection": "rejection@50%", "start": "elsewhere"},
            {"method": "again"},
            {"method": "none", "start": "ridge"},
        ],
        "methods": {"eda": {"width": 16}, "again": {"method": "fc", "replay": {"passes": 1, "epochs": 0.5}}},
        "max_new_tokens": 12,
        "evaluation_tokens": 12,
        "gamma": 3,
        "tree": "tree:3x2x6",
        "train": {"epochs": 2, "batch_anchors": 64, "evaluate_every": 3},
        "speed": {
            "methods": ["none", "fc"],
            "shapes": ["chain:2", "tree:2x2x4"],
            "temperatures": [0, 1],
            "prompts": 2,
        },
        "dtype": "float32",
    } | changes
