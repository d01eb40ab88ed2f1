"""``redraft study`` on tiny random models, run once: cells, sharing, resuming, and tables from raw results alone."""

from __future__ import annotations

import json
import math
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from redraft.adaptation.study.figures import derive
from redraft.adaptation.study.run import StudyRun
from redraft.errors import UserError
from redraft.evaluate.statistics import paired_difference, paired_recovery
from redraft.settings.studies import parse_study
from redraft.training.trainer import Trainer

DATA = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "study_data.py")))
settings = DATA.settings


@pytest.fixture
def place(tmp_path: Path, tmp_path_factory: Any, tiny_target: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with all that a study needs."""
    monkeypatch.chdir(DATA.furnished(tmp_path, tmp_path_factory.getbasetemp() / "study", tiny_target))
    return tmp_path


@pytest.fixture
def done(place: Path, redraft: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like ``place`` with the finished study in ``out``, run once by the command line."""
    kept = tmp_path_factory.getbasetemp() / "study-done"
    if not kept.exists():
        (place / "study.yaml").write_text(yaml.safe_dump(settings(), sort_keys=False))
        code, out, err = redraft("study study.yaml --out out --full full.json")
        assert code == 0, err
        assert "15 of 15 cells" in out
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
    assert set(facts["sets"]) == {"greedy", "sampled", "greedy-tree", "sampled-tree", "general", "general-base"}
    assert facts["sets"]["greedy-tree"]["tree"] == "dynamic tree, depth 3, top-k 2, 6 nodes"
    assert facts["sets"]["greedy"]["tasks"] == ["domain"] * 5 + ["other"] * 4
    for cell in cells.values():
        for name, asked in facts["sets"].items():
            assert len(cell["rounds"][name]) == len(asked["tokens"]) > 0
            pairs = zip(cell["rounds"][name], asked["tokens"], strict=True)
            assert all(0 < rounds <= tokens + 1e-6 for rounds, tokens in pairs)
    assert stale["trained_parameters"] == stale["private_bytes"] == 0 and stale["flops"] == {}
    # A few small steps leave most stored rows as they were, and such rows take no room.
    assert fc["trained_parameters"] == 32 * 96 and 0 < fc["private_bytes"] <= 2 * fc["trained_parameters"]
    # The target's own answers bring their features along; reference answers need a pass.
    assert set(fc["flops"]) == {"generation", "heldout", "train", "evaluations"}
    reference = cells["t | eda | reference | none | kl | none | 0"]
    assert set(reference["flops"]) == {"features", "heldout", "train", "evaluations"}
    assert reference["flops"]["heldout"] == fc["flops"]["heldout"]
    full = cells["t | full | regenerated | none | kl | none | 0"]
    assert full["trained_parameters"] == full["full_parameters"] and full["flops"]["train"] > fc["flops"]["train"]
    assert cells["t | eda | reference | none | kl | none | 0"]["private_width"] == 16
    assert cells["t | again | regenerated | none | kl | none | 0"]["epochs"] == 1.5
    assert cells["t | none | regenerated | none | - | ridge | 0"]["flops"]["start"] > 0
    stages = [entry["stage"] for entry in results["ledger"]["stages"]]
    assert {"t: generate regenerated", "t: train", "base base: generate general"} <= {*stages}
    passes = [stage for stage in stages if ": features " in stage and stage.endswith(" at 1,3,5")]
    assert "t: features reference at 1,3,5" in passes
    assert not any(name in stage for stage in passes for name in ("regenerated", "heldout", "general"))
    speed = results["targets"]["t"]["speed"]
    assert len(speed) == 4 and all(run["drafts"].keys() == {"none", "fc"} for run in speed)
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


def test_a_pass_for_features_is_paid_once_and_by_those_who_need_it(done: Path) -> None:
    results = results_of(done)
    cells = {cell["key"]: cell["flops"] for cell in results["cells"]}
    kept = cells["t | fc | regenerated | rejection@50% | kl | none | 0"]
    early = cells["t | fc | regenerated | early-rejection | kl | none | 0"]
    reference = cells["t | fc | reference | rejection@50% | kl | none | 0"]
    elsewhere = cells["t | fc | regenerated | rejection@50% | kl | elsewhere | 0"]
    # Kept while the answers were written: scoring is the draft's pass alone. Of prompts there is nothing to keep.
    assert "features" not in kept and 0 < kept["selection"] < kept["generation"] / 2
    assert early["selection"] > kept["selection"] and "features" not in early
    # Reference answers were never written by the target: one pass over all of them, in the cost of scoring.
    whole = cells["t | eda | reference | none | kl | none | 0"]["features"]
    assert "features" not in reference and reference["selection"] > whole
    # A draft that reads other layers pays for its own pass, whoever scored.
    assert elsewhere["selection"] == kept["selection"] and elsewhere["features"] > 0
    assert elsewhere["heldout"] > kept["heldout"]


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
    assert row["recovery"] == {k: v if v is not None and math.isfinite(v) else None for k, v in expected.items()}
    assert stale["gain"]["greedy"]["value"] == 0
    assert set(row["tasks"]) == {"domain", "other"}
    assert derive(results) == results["figures"]


def test_tables_are_made_again_from_the_results_alone(done: Path, redraft: Any, tmp_path: Path) -> None:
    written = {path.name: path.read_bytes() for path in (done / "out").glob("*.png")}
    text = (done / "out" / "tables.md").read_text()
    results = results_of(done)
    del results["figures"], results["seal"]
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


def test_results_without_cells_are_no_results(done: Path, redraft: Any) -> None:
    path = done / "out/results.json"
    results = json.loads(path.read_text())
    results.pop("seal")
    path.write_text(json.dumps(results | {"cells": []}))
    code, _, err = redraft("study --tables out/results.json --out tables")
    assert code == 2 and "results.json has no cells" in err and not (done / "tables").exists()


def test_a_kill_right_behind_a_record_leaves_nothing_of_its_training(done: Path) -> None:
    cell = next(path.parent for path in (done / "out/cells").glob("*fc*/record.json"))
    (cell / "train").mkdir()
    (cell / "train/best.safetensors").write_bytes(b"no longer needed")
    StudyRun(parse_study(settings()), done / "out", lambda _: None).run()
    assert not (cell / "train").exists()


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
