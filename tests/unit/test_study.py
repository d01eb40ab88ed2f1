"""``redraft study`` on tiny random models: cells, sharing, resuming, and tables from raw results alone."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from redraft.artifact import save_draft
from redraft.drafts.eagle3 import fresh_draft
from redraft.errors import UserError
from redraft.evaluate.statistics import paired_difference, paired_recovery
from redraft.evaluate.study import derive
from redraft.loading import tokenizer_hash
from redraft.pipeline.study.config import parse_study
from redraft.pipeline.study.run import StudyRun
from redraft.pipeline.study.sources import parse_source, read_prompts, read_source
from redraft.target import Target
from redraft.train.loop import Trainer

ROOT = Path(__file__).resolve().parents[2]
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
    """A base target, a fine-tuned one, a draft and prompts."""
    folder.mkdir()
    base.save(folder / "base")
    meta = {"target": {"name": "b", "hash": base.content_hash()}, "tokenizer_hash": tokenizer_hash(base.tokenizer)}
    save_draft(folder / "draft", fresh_draft(base, range(0, 120), seed=1, intermediate=32), meta)
    generator = torch.Generator().manual_seed(1)
    for weight in base.model.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    base.save(folder / "target")
    lines = [json.loads(line) for line in prompts(9, 12).splitlines()]
    (folder / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, seed, count in (("train", 0, 26), ("evaluation", 1, 5), ("other", 2, 4), ("general", 3, 4)):
        (folder / f"{name}.jsonl").write_text(prompts(seed, count))


@pytest.fixture
def place(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_target: Callable[..., Target],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The working folder, with a copy of what :func:`furnish` makes once."""
    made = tmp_path_factory.getbasetemp() / "study"
    if not made.exists():
        furnish(made, tiny_target(seed=0, taps=(1, 3, 5)))
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
        "selections": {"early": {"scorer": "length", "budget": "50%", "on": "prompts"}},
        "general": {"prompts": "general.jsonl"},
        "grid": {"methods": ["fc", "full"], "seeds": [0, 1]},
        "cells": [
            {"method": "eda", "data": "reference"},
            {"method": "fc", "data": "served"},
            {"method": "fc", "selection": "length@50%"},
            {"method": "fc", "selection": "early"},
            {"method": "again"},
            {"method": "none", "start": "ridge"},
        ],
        "methods": {"eda": {"width": 16}, "again": {"method": "fc", "replay": {"passes": 1, "epochs": 0.5}}},
        "max_new_tokens": 12,
        "evaluation_tokens": 12,
        "gamma": 3,
        "train": {"epochs": 2, "batch_anchors": 64, "evaluate_every": 3},
        "speed": {"methods": ["none", "fc"], "prompts": 2},
        "dtype": "float32",
    } | changes


@pytest.fixture
def done(place: Path, redraft: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like ``place`` with the finished study in ``out``, run once by the command line."""
    kept = tmp_path_factory.getbasetemp() / "study-done"
    if not kept.exists():
        (place / "study.yaml").write_text(yaml.safe_dump(settings(), sort_keys=False))
        code, out, err = redraft("study study.yaml --out out --full full.json")
        assert code == 0, err
        assert "11 of 11 cells" in out
        shutil.copytree(place, kept)
    shutil.copytree(kept, place, dirs_exist_ok=True)
    return place


def results_of(done: Path) -> dict[str, Any]:
    return json.loads((done / "out" / "results.json").read_text())


def test_the_results_hold_what_a_reader_needs(done: Path) -> None:
    results = results_of(done)
    assert results["schema"] == "redraft.study/1" and results["finished"]
    cells = {cell["key"]: cell for cell in results["cells"]}
    stale, fc = cells["t | none | - | - | - | none | 0"], cells["t | fc | regenerated | none | kl | none | 0"]
    facts = results["targets"]["t"]
    assert set(facts["sets"]) == {"greedy", "sampled", "general", "general-base"}
    assert facts["sets"]["greedy"]["tasks"] == ["domain"] * 5 + ["other"] * 4
    for cell in cells.values():
        for name, asked in facts["sets"].items():
            assert len(cell["rounds"][name]) == len(asked["tokens"]) > 0
            pairs = zip(cell["rounds"][name], asked["tokens"], strict=True)
            assert all(0 < rounds <= tokens + 1e-6 for rounds, tokens in pairs)
    assert stale["trained_parameters"] == stale["private_bytes"] == 0 and stale["flops"] == {}
    # A few small steps leave most stored rows as they were, and such rows take no room.
    assert fc["trained_parameters"] == 32 * 96 and 0 < fc["private_bytes"] <= 2 * fc["trained_parameters"]
    assert set(fc["flops"]) == {"generation", "features", "heldout", "train", "evaluations"}
    full = cells["t | full | regenerated | none | kl | none | 0"]
    assert full["trained_parameters"] == full["full_parameters"] and full["flops"]["train"] > fc["flops"]["train"]
    assert cells["t | eda | reference | none | kl | none | 0"]["private_width"] == 16
    assert cells["t | again | regenerated | none | kl | none | 0"]["epochs"] == 1.5
    assert cells["t | none | regenerated | none | - | ridge | 0"]["flops"]["start"] > 0
    stages = [entry["stage"] for entry in results["ledger"]["stages"]]
    assert {"t: generate regenerated", "t: features regenerated", "t: train", "base base: generate general"} <= {
        *stages
    }
    assert results["targets"]["t"]["speed"][0]["drafts"].keys() == {"none", "fc"}
    assert results["provenance"]["seed"] == 0 and results["config"]["name"] == "tiny"


def test_every_cell_sees_as_many_tokens_and_pays_for_its_own_text(done: Path) -> None:
    cells = {(c["method"], c["data"], c["selection"]): c for c in results_of(done)["cells"] if c["seed"] == 0}
    whole = cells["fc", "regenerated", "none"]
    half, early = cells["fc", "regenerated", "length@50%"], cells["fc", "regenerated", "early"]
    served, reference = cells["fc", "served", "none"], cells["eda", "reference", "none"]
    for cell in (half, early, served, reference):
        # whole steps of 64 tokens at most
        assert abs(cell["trained_tokens"] - whole["trained_tokens"]) <= 3 * 64
    assert half["rows"] == early["rows"] == whole["rows"] // 2
    assert half["flops"]["generation"] == whole["flops"]["generation"]
    assert early["flops"]["generation"] < 0.75 * whole["flops"]["generation"]
    assert "generation" not in served["flops"] and "generation" not in reference["flops"]


def test_intervals_are_those_of_the_raw_rounds(done: Path) -> None:
    results = results_of(done)
    tokens = results["targets"]["t"]["sets"]["greedy"]["tokens"]
    rounds: dict[str, list[list[int]]] = {}
    for cell in results["cells"]:
        if cell["data"] in ("regenerated", "-") and cell["selection"] in ("none", "-") and cell["start"] == "none":
            rounds.setdefault(cell["method"], []).append(cell["rounds"]["greedy"])

    def sums(method: str) -> tuple[list[int], list[int]]:
        parts = rounds[method]
        return [len(parts) * t for t in tokens], [sum(part) for part in zip(*parts, strict=True)]

    stale = next(r for r in results["figures"]["pooled"] if r["method"] == "none")
    row = next(r for r in results["figures"]["pooled"] if r["method"] == "fc" and r["data"] == "regenerated")
    assert row["seeds"] == [0, 1] and len(row["tau_by_seed"]) == 2
    assert row["gain"]["greedy"] == paired_difference(sums("fc"), sums("none")).to_dict()
    expected = paired_recovery(sums("fc"), sums("none"), sums("full")).to_dict()
    assert row["recovery"] == {k: v if math.isfinite(v) else None for k, v in expected.items()}
    assert stale["gain"]["greedy"]["value"] == 0
    assert set(row["tasks"]) == {"domain", "other"}
    assert derive(results) == results["figures"]


def test_tables_are_made_again_from_the_results_alone(done: Path, redraft: Any, tmp_path: Path) -> None:
    written = {path.name: path.read_bytes() for path in (done / "out").glob("*.png")}
    text = (done / "out" / "tables.md").read_text()
    results = results_of(done)
    del results["figures"]
    (tmp_path / "raw.json").write_text(json.dumps(results))
    code, out, err = redraft("study --tables raw.json --out again")
    assert code == 0, err
    assert (tmp_path / "again" / "tables.md").read_text() == text
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").glob("*.png")} == written
    assert {"flops-t.png", "kept-t.png", "size-t.png"} <= set(written)
    assert all(data.startswith(b"\x89PNG") for data in written.values())
    for row in (
        "none",
        "fc; regenerated",
        "full; regenerated",
        "fc; regenerated, length@50%",
        "none; regenerated; start ridge",
    ):
        assert f"| {row} |" in text
    tau = next(r for r in results_of(done)["figures"]["pooled"] if r["method"] == "full")["tau"]["greedy"]
    assert f"{tau['value']:.2f} [{tau['low']:.2f}, {tau['high']:.2f}]" in text
    assert json.loads((done / "full.json").read_text())["tau"] == tau["value"]


def test_a_finished_study_runs_nothing_again_and_takes_new_cells(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, ran = results_of(done), []
    whole = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self, *rest: ran.append(self) or whole(self, *rest))
    StudyRun(parse_study(settings()), done / "out", lambda _: None).run()
    assert results_of(done)["cells"] == before["cells"] and not ran
    more = settings(cells=[*settings()["cells"], {"method": "norms"}], about="with one cell more")
    StudyRun(parse_study(more), done / "out", lambda _: None).run()
    after = results_of(done)
    assert len(ran) == 1 and after["cells"][:-1] == before["cells"]
    assert after["cells"][-1]["method"] == "norms"
    with pytest.raises(UserError, match="another gamma"):
        StudyRun(parse_study(settings(gamma=4)), done / "out")
    with pytest.raises(UserError, match="another data served"):
        changed = settings()["data"] | {"served": {"kind": "reference"}}
        StudyRun(parse_study(settings(data=changed)), done / "out")


# -- the file --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": {"methods": ["edda"]}}, "unknown method 'edda'; choose one of eda, again, none"),
        ({"grid": {"methods": ["fc"], "data": ["web"]}}, "unknown data 'web'; choose one of regenerated"),
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
        ({"cells": [{"method": "fc", "colour": "red"}]}, "cells.0.colour"),
        ({"methods": {"eda": {"breadth": 3}}}, "unknown method setting breadth"),
        ({"methods": {"eda": {"width": 0}}}, "width must be 1 or more"),
        ({"methods": {"eda": {"width": "wide"}}}, "width must be like"),
        ({"methods": {"fc": {"method": "full"}}}, "fc is the name of a method"),
        ({"methods": {"x": {"method": "fc", "replay": {"again": 1}}}}, "unknown replay setting again"),
        ({"data": {"a": {"kind": "traces"}}}, "a path belongs to data of kind traces"),
        ({"selections": {"none": {}}}, "cannot be given another meaning"),
        ({"train": {"speed": 1}}, "unknown training setting speed"),
        ({"train": {"learning_rate": "4e-3"}}, "learning_rate must be like 0.001, not '4e-3'"),
        ({"train": {"seed": 1}}, "unknown training setting seed"),
        ({"gamma": 0}, "gamma: "),
        ({"targets": {}}, "targets: "),
        ({"targets": {"a b": settings()["targets"]["t"]}}, "the name 'a b'"),
        ({"speed": {"shapes": ["star:3"]}}, "star:3"),
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
            parse_study(bare | {"cells": [cell]})


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
    assert {path.stem for path in found} >= {"quickstart-methods", "cpu-reduced", "selection"}
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
