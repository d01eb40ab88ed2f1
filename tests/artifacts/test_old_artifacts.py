"""Artifacts that were written by earlier versions keep loading and keep saying the same."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from redraft.drafts.files import SCHEMA, load_draft, load_private, read_meta

HERE = Path(__file__).parent


# Folder by folder, and the schema that its files have.
FOLDERS = {**{f"schema{schema}": schema for schema in range(1, SCHEMA + 1)}, "eagle1": 1, "coarse": 1}


def script(name: str):
    """The script that made the artifacts of a folder; it knows the fixed input."""
    spec = importlib.util.spec_from_file_location(f"make_{name}", HERE / f"make_{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "schema"), FOLDERS.items())
def test_a_draft_and_its_private_part_load_and_answer_as_before(name, schema):
    folder, made = HERE / name, script(name)
    expected = json.loads((folder / "expected.json").read_text())
    draft, meta = load_draft(folder / "draft")
    assert meta["schema"] == schema and draft.config == made.CONFIG
    torch.testing.assert_close(
        torch.tensor(made.answer(draft.float())), torch.tensor(expected["draft"]), atol=1e-5, rtol=1e-5
    )
    split, part = load_private(folder / "private", load_draft(folder / "draft")[0], meta["content_hash"])
    assert part["method"] == getattr(made, "METHOD", "eda+fc")
    assert split.config.private_width == (0 if "coarse" in part else 4)
    answer = torch.tensor(made.answer(split.float()))
    torch.testing.assert_close(answer, torch.tensor(expected["private"]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(torch.tensor(expected["draft"]), torch.tensor(expected["private"]), atol=1e-2)


def test_every_folder_has_its_committed_artifacts():
    for name, schema in FOLDERS.items():
        for kind in ("draft", "private"):
            assert read_meta(HERE / name / kind, kind)["schema"] == schema
