"""The file and the prompts of ``redraft study``. What a study does with them: ``tests/integration/test_study.py``."""

from __future__ import annotations

import copy
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.adaptation.study.run import StudyRun, speed_cells
from redraft.adaptation.study.targets import read_prompts, read_source
from redraft.errors import UserError
from redraft.settings.studies import parse_study
from redraft.settings.texts import parse_source

DATA = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "study_data.py")))
settings, prompts = DATA.settings, DATA.prompts
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def place(tmp_path: Path, tmp_path_factory: Any, tiny_target: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with all that a study needs."""
    monkeypatch.chdir(DATA.furnished(tmp_path, tmp_path_factory.getbasetemp() / "study", tiny_target))
    return tmp_path


# -- the file --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": {"methods": ["edda"]}}, "unknown method 'edda' (did you mean eda?); choose one of: eda, again, none"),
        ({"grid": {"methods": ["fc"], "data": ["web"]}}, "unknown data 'web'; choose one of: regenerated"),
        ({"grid": {"methods": ["fc"], "targets": ["x"]}}, "unknown target 'x'"),
        ({"grid": {"methods": ["fc"], "losses": ["hinge"]}}, "unknown loss 'hinge'"),
        ({"grid": {"methods": ["fc"], "starts": ["warm"]}}, "unknown start 'warm'"),
        ({"grid": {"methods": ["fc"], "selections": ["best"]}}, "unknown selection 'best'"),
        ({"grid": {"methods": ["fc"], "selections": ["luck@50%"]}}, "unknown scorer 'luck'"),
        ({"grid": {"methods": ["fc"], "selections": ["length@0%"]}}, "selects nothing"),
        ({"grid": {"methods": ["fc", "fc"]}}, "grid 1 lists fc twice"),
        ({"grid": [{"methods": ["fc"]}, {"methods": ["full", "fc"]}], "cells": []}, "twice (grid 1 and grid 2)"),
        ({"cells": [{"method": "fc"}]}, "t | fc | regenerated | none | kl | none | 0 is there twice (grid 1 and"),
        ({"grid": [], "cells": []}, "no cells"),
        ({"cells": [{"method": "fc", "colour": "red"}]}, "unknown setting colour in cells 0"),
        ({"methods": {"eda": {"breadth": 3}}}, "unknown setting breadth"),
        ({"methods": {"eda": {"width": 0}}}, "width must be 1 or more, not 0"),
        ({"methods": {"eda": {"width": "wide"}}}, "width must be a whole number, not 'wide'"),
        ({"methods": {"fc": {"method": "full"}}}, "fc is the name of a method"),
        ({"methods": {"x": {"method": "fc", "replay": {"again": 1}}}}, "unknown setting again in replay"),
        ({"data": {"a": {"kind": "traces"}}}, "a path belongs to data of kind traces"),
        ({"selections": {"none": {}}}, "cannot be given another meaning"),
        ({"train": {"speed": 1}}, "unknown setting speed"),
        ({"train": {"learning_rate": "much"}}, "learning_rate must be a number, not 'much'"),
        ({"train": {"seed": 1}}, "train seed is set by the study itself"),
        ({"gamma": 0}, "gamma must be above 0, not 0"),
        ({"targets": {}}, "targets must have 1 or more"),
        ({"targets": {"a b": settings()["targets"]["t"]}}, "the name 'a b'"),
        ({"speed": {"shapes": ["star:3"]}}, "star:3"),
        ({"tree": "star:3"}, "star:3"),
        ({"tree": "chain:3"}, "chain:3 is no tree"),
        ({"cells": [{"method": "fc", "selection": "m"}], "selections": {"m": {"general": 0.2}}}, "general: mix"),
    ],
)  # fmt: skip
def test_a_bad_config_is_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as found:
        parse_study(settings(**changes))
    assert words in str(found.value) and "\n" not in str(found.value)


def test_what_needs_the_base_target_says_so() -> None:
    bare = copy.deepcopy(settings(cells=[]))
    del bare["targets"]["t"]["base_target"]
    for cell in ({"method": "fc", "selection": "shift@50%"}, {"method": "none", "start": "ridge"}):
        with pytest.raises(UserError, match="give its base_target"):
            parse_study(bare | {"cells": [cell]}).check_needs()


def test_methods_that_train_nothing_are_one_cell() -> None:
    grid = {"methods": ["none", "fc"], "selections": ["none", "length@50%"], "losses": ["kl", "tv"], "seeds": [0, 1]}
    keys = [cell.key for cell in parse_study(settings(grid=grid, cells=[])).all_cells()]
    assert len(keys) == len(set(keys)) == 1 + 2 * 2 * 2
    grid["starts"] = ["none", "ridge"]
    # the started draft depends on the rows that it starts from, and on nothing else
    keys = [cell.key for cell in parse_study(settings(grid=grid, cells=[])).all_cells()]
    assert len(keys) == 1 + 2 + 2 * 2 * 2 * 2


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, redraft: Any) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("name: x\nname: y\n")
    code, _, err = redraft(f"study {path} --out {tmp_path / 'out'}")
    assert code == 2 and "'name' is there twice" in err and len(err.splitlines()) == 1
    for command in ("study", f"study {path} --tables {path}", "study missing.yaml --out x"):
        assert redraft(command)[0] == 2


def test_the_committed_studies_are_sound(redraft: Any) -> None:
    found = sorted((ROOT / "runs" / "studies").glob("*.yaml"))
    assert {path.stem for path in found} >= {"quickstart-methods", "medical", "code", "eagle1", "guard", "selection"}
    for path in found:
        code, out, err = redraft(f"study {path} --list")
        assert code == 0, err
        assert len(out.splitlines()) > 3


# -- prompts -------------------------------------------------------------------------------------------------------
def test_sources(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_source("maths:1@344").count == 344
    assert (parse_source("datasets:a/b@train").kind, parse_source("datasets:a/b@train").count) == ("file", None)
    for text in ("maths:1", "maths:one@3", "data:", "x.jsonl@0"):
        with pytest.raises(UserError, match=re.escape(text)):
            parse_source(text)
    monkeypatch.delenv("REDRAFT_DATA", raising=False)
    with pytest.raises(UserError, match="set REDRAFT_DATA"):
        read_source("data:train.jsonl")
    monkeypatch.setenv("REDRAFT_DATA", str(place))
    with pytest.raises(UserError, match="missing.jsonl does not exist"):
        read_source("data:missing.jsonl")
    assert len(read_source("data:train.jsonl")) == 26
    taken = [c.id for c in read_source("data:train.jsonl@7")]
    assert len(taken) == 7 and taken != [f"p0-{i}" for i in range(7)]
    with pytest.raises(UserError, match="gives 26 prompts, not 27"):
        read_source("train.jsonl@27")


def test_evaluation_prompts_are_never_trained_on(place: Path) -> None:
    lines = (place / "train.jsonl").read_text().splitlines()
    other = json.loads(lines[3]) | {"id": "copy"}
    (place / "evaluation.jsonl").write_text(json.dumps(other) + "\n")
    asked = {"domain": ("evaluation.jsonl",)}
    with pytest.raises(UserError, match="also in the training prompts"):
        read_prompts(("train.jsonl",), asked, 4, 0, None, False)
    found = read_prompts(("train.jsonl",), asked, 4, 0, None, True)
    assert found.dropped == 1 and len(found.train) + len(found.heldout) == 25
    assert "p0-3" not in {c.id for c in [*found.train, *found.heldout]}


def test_speed_is_that_of_the_first_cell_of_a_method_on_the_common_data() -> None:
    """Whatever it starts from, but for a draft of its own, which may read other states."""
    changes: dict[str, Any] = {
        "starts": {"other": {"draft": "elsewhere"}},
        "grid": {"methods": ["fc"], "starts": ["other", "ridge", "none"], "selections": ["length@50%", "none"]},
        "cells": [],
        "speed": {"methods": ["none", "fc"]},
    }
    config = parse_study(settings(**changes))
    found = speed_cells(config, list(config.all_cells()))
    assert [(cell.method, cell.selection, cell.start) for cell in found] == [
        ("none", "-", "none"),
        ("fc", "none", "ridge"),
    ]


@pytest.mark.parametrize(("budget", "share"), [("epochs", 0.5), ("tokens", 1.0)])
def test_a_bar_counts_less_for_a_shorter_training(budget: str, share: float, tmp_path: Path) -> None:
    config = parse_study(settings(budget=budget, speed=None))
    run = StudyRun(config, tmp_path / "out")
    units = {cell.selection: run._units(cell) for cell in run.cells if cell.method == "fc" and cell.start == "none"}
    assert units["none"] == 1000 and units["length@50%"] == units["early"] == 1000 * share
