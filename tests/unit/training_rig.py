"""What the tests of training share: a target, its own answers, their features and a fresh draft, all tiny.

Test files load it with ``runpy`` and take what they need by name, fixtures included.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from redraft.data.store import Row
from redraft.decode.engine import PlainDecoder
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.features import FeatureStore
from redraft.rows import anchors
from redraft.target import Target

TOYS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toys.py"))))


def answers(target: Target, count: int, tokens: int = 24, seed: int = 0) -> list[Row]:
    """Greedy responses of the target to random prompts."""
    generator, plain, rows = torch.Generator().manual_seed(seed), PlainDecoder(target), []
    for i in range(count):
        prompt = torch.randint(4, 128, (2 + i % 7,), generator=generator).tolist()
        done = plain.generate(prompt, tokens)
        rows.append(Row(f"p{seed}/{i}", prompt, done.ids, 0.0, 0, 1.0, 0, done.finish_reason, "hash"))
    return rows


# Nothing below changes the target, its answers or their features: they are made once.
@pytest.fixture(scope="module")
def target(tiny_target) -> Target:
    return tiny_target("llama", **TOYS.SMALL)


@pytest.fixture(scope="module")
def rows(target) -> list[Row]:
    return [row for row in answers(target, 32) if anchors(row)][:24]


@pytest.fixture
def draft(target) -> Eagle3Draft:
    return fresh_draft(target, range(0, 120), seed=2)


@pytest.fixture(scope="module")
def store(target, rows, tmp_path_factory) -> FeatureStore:
    store = FeatureStore(tmp_path_factory.mktemp("training") / "features", {"target": "tiny"})
    store.build(target, rows)
    return store
