"""The harness of files with one thing wrong: good files are read as its judge reads them, and its judge sees faults."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from faults.inputs import FAULTS, Bench, summary
from faults.reading.base import Reader

LIGHT = ("static tree", "cost ledger", "prompts: messages", "manifest")


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path, "")
    made.readers = [reader for reader in made.readers if reader.name in LIGHT]
    return made


def told(found):
    return [f"{one['reader']}: {one['change']}: {one['verdict']}: {one['why']}" for one in found]


def test_light_readers_refuse_or_read_what_a_file_says(bench):
    found = [bench.once(5, number) for number in range(40)]
    assert {one["reader"] for one in found} == set(LIGHT)
    assert told([one for one in found if one["verdict"] in FAULTS]) == []
    result = summary(found, {5})
    assert result["tried"] == 40 == sum(row["tried"] for row in result["by"].values())
    assert result["clear"] > 10 and result["seeds"]["5"]["mended_on"]
    assert bench.once(5, 7)["change"] == found[7]["change"]


def _lazy(place: Path) -> list[float]:
    """A reader that believes everything, and ends in an error of Python's where it cannot."""
    found = json.loads((place / "tree.json").read_text())
    return [float(rank) for path in found for rank in path]


def test_a_reader_that_believes_everything_is_found_out(bench):
    tree = next(reader for reader in bench.readers if reader.name == "static tree")
    lazy: Reader = replace(tree, call=_lazy, confirms=None)
    bench.readers = [lazy]
    verdicts = {bench.once(6, number)["verdict"] for number in range(30)}
    assert {"tracebacks", "silent"} <= verdicts
