"""Artifacts that were written by earlier versions keep loading and keep saying the same."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from redraft.artifact import SCHEMA, load_draft, load_private, read_meta

HERE = Path(__file__).parent


def script(schema: int):
    """The script that made the artifacts of a schema; it knows the fixed input."""
    spec = importlib.util.spec_from_file_location(f"make_schema{schema}", HERE / f"make_schema{schema}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("schema", range(1, SCHEMA + 1))
def test_a_draft_and_its_private_part_load_and_answer_as_before(schema):
    folder, made = HERE / f"schema{schema}", script(schema)
    expected = json.loads((folder / "expected.json").read_text())
    draft, meta = load_draft(folder / "draft")
    assert meta["schema"] == schema and draft.config == made.CONFIG
    torch.testing.assert_close(torch.tensor(made.answer(draft)), torch.tensor(expected["draft"]), atol=1e-5, rtol=1e-5)
    split, part = load_private(folder / "private", draft, meta["content_hash"])
    assert part["method"] == "eda+fc" and split.config.private_width == 4
    answer = torch.tensor(made.answer(split))
    torch.testing.assert_close(answer, torch.tensor(expected["private"]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(torch.tensor(expected["draft"]), torch.tensor(expected["private"]), atol=1e-2)


def test_every_schema_has_its_committed_artifacts():
    for schema in range(1, SCHEMA + 1):
        for kind in ("draft", "private"):
            assert read_meta(HERE / f"schema{schema}" / kind, kind)["schema"] == schema
