"""Drafts that trainers' own packages wrote compute here what they computed there, or are refused by name.

Each folder of ``trainers`` is a case as the scripts in ``benchmarks/trainers`` make it: a checkpoint, the input, and
the logits of the package's own model over three draft steps.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from redraft.drafts.opening import open_checkpoint
from redraft.errors import UserError
from redraft.loading import read_facts

CASES = Path(__file__).parent / "trainers"
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "trainers" / "compare.py"


@pytest.fixture(scope="module")
def compare():
    """The script that compares; it is no part of the package."""
    spec = importlib.util.spec_from_file_location("compare_trainers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.parent.name for path in CASES.glob("*/case.json")))
def test_a_trainers_draft_computes_what_its_package_computed_or_is_refused_by_name(compare, name):
    case = json.loads((CASES / name / "case.json").read_text())
    facts = read_facts(str(CASES / case["target"]), tokenizer=False)
    if refused := case.get("refused"):
        with pytest.raises(UserError, match=refused) as caught:
            open_checkpoint(CASES / name / "checkpoint", facts)
        assert "\n" not in str(caught.value)
        return
    found = compare.differences(CASES / name, open_checkpoint(CASES / name / "checkpoint", facts).draft)
    assert not found["why"], found
