"""Readers of what redraft itself wrote: files of a run, results, and the pages made of them."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from faults.reading import judge as readings
from faults.reading.base import RUN, STUDY, Outcome, Reader, by, files, written
from redraft.adaptation.claim import claim_run
from redraft.adaptation.study.figures import derive
from redraft.adaptation.study.records import read_results
from redraft.artifact import read_checked, write_checked
from redraft.data.server import read_top_file
from redraft.data.store import Row
from redraft.data.template import kept_moment
from redraft.features import FeatureStore
from redraft.inputs import read_json, typed
from redraft.provenance import Ledger
from redraft.reports.load import read_curve
from redraft.reports.study import markdown
from redraft.selection.manifest import read_manifest
from redraft.settings.runs import AdaptConfig
from redraft.training.loop import Checkpoint
from redraft.training.trainer import TrainResult


# -- files of a run ----------------------------------------------------------------------------------------------------
def _checkpoint(place: Path) -> Outcome:
    stored = json.loads((RUN / "run" / "train" / "state.json").read_text())["identity"]
    found = Checkpoint(place / "train", stored)._stored()
    state = found["state"]
    return [found["file"], state["step"], state["tokens"], state["best"], state["history"]]


def _sealed_state(place: Path) -> None:
    files("run/train")(place)
    path = place / "train" / "state.json"
    stored = json.loads(path.read_text())
    stored.pop("checksum", None)  # as older versions wrote it
    path.write_text(json.dumps(stored))


def _state(path: Path) -> Outcome:
    found = json.loads(readings.text_of(path))
    state, history = found["state"], found["state"]["history"]
    readings.demand(re.fullmatch(r"state-\d+\.safetensors", found["file"]) is not None)
    kept = json.loads((RUN / "run" / "train" / "state.json").read_text())["identity"]
    readings.demand(found["identity"] == kept)
    readings.demand(all(readings.whole(state[name]) for name in ("step", "tokens", "best_step")))
    readings.demand(all(readings.number(state[name]) for name in ("best", "seconds", "start")))
    readings.demand(all(len(h) == 2 and readings.whole(h[0]) and readings.number(h[1]) for h in history))
    readings.demand(isinstance(state["segment"], list) and len(state["segment"]) == 2)
    readings.demand(all(map(readings.number, state["segment"])))
    return [found["file"], state["step"], state["tokens"], state["best"], history]


def _settings(place: Path) -> AdaptConfig:
    return AdaptConfig(
        target="target",
        draft="draft",
        prompts="prompts.jsonl",
        out=place / "run",
        dtype="float32",
        max_new_tokens=16,
        heldout_prompts=4,
        bench_tokens=12,
        bench_prompts=3,
        batch_size=4,
        gamma=3,
        budget="75%",
        train={"epochs": 24, "batch_anchors": 64, "evaluate_every": 8},
    )


def _claimed(place: Path) -> None:
    (place / "run").mkdir()
    claim_run(_settings(place), lambda text: None)
    (place / "run" / "ledger.json").write_text('{"stages": []}\n')


def _tops(place: Path) -> Outcome:
    rows = [Row("a", [1], [2, 3, 4], 0.0, 0, 1.0, 0, "stop", "h"), Row("b", [1], [2, 3], 0.0, 0, 1.0, 0, "stop", "h")]
    return {key: [list(part) for part in top] for key, top in read_top_file(place / "tops.jsonl", rows).items()}


TOPS = [
    {"key": "a@T0", "top": [[[1, 2], [3, 4]], [[-0.5, -1.0], [-0.25, -3.0]]]},
    {"key": "b@T0", "top": [[[5, 6]], [[-0.125, -2.5]]]},
]


def _top_lines(path: Path) -> Outcome:
    found = {}
    counts = {"a@T0": 2, "b@T0": 1}
    if not path.exists():
        readings.demand(not path.is_symlink())
        return {}
    *before, last = readings.text_of(path).split("\n")
    told = [json.loads(line) for line in before if line.strip()]
    try:
        told += [json.loads(last)] if last.strip() else []
    except ValueError:
        pass
    for one in told:
        if one["key"] not in counts:
            continue
        ids, logs = one["top"]
        readings.demand(len(ids) == len(logs) == counts[one["key"]])
        for some, likely in zip(ids, logs, strict=True):
            readings.demand(len(some) == len(likely) > 0 and len(set(some)) == len(some))
            readings.demand(all(readings.whole(i) for i in some) and all(readings.number(x) for x in likely))
        found[one["key"]] = [ids, [[float(x) for x in likely] for likely in logs]]
    return found


def _small_study(place: Path) -> None:
    found = json.loads(STUDY.read_text())
    kept = 4
    found["cells"] = found["cells"][:3]
    for facts in found["targets"].values():
        facts.pop("speed", None)
        for asked in facts["sets"].values():
            asked |= {name: asked[name][:kept] for name in ("prompts", "tasks", "tokens")}
    for cell in found["cells"]:
        cell["rounds"] = {name: rounds[:kept] for name, rounds in cell["rounds"].items()}
        cell["heldout"] = (cell.get("heldout") or [])[:2]
        cell["start_details"] = {}
    for name in ("figures", "provenance", "ledger"):
        found.pop(name)
    (place / "results.json").write_text(json.dumps(found, indent=1))


def _study(place: Path) -> Outcome:
    found = read_results(place / "results.json")
    return markdown(found, derive(found))


def _tau_of(place: Path, found: Outcome) -> bool:
    """Whether every cell's greedy tau, worked out here, stands in the tables, and nothing that is no figure does."""
    told = json.loads((place / "results.json").read_text())
    for cell in told["cells"]:
        rounds, tokens = cell["rounds"]["greedy"], told["targets"][cell["target"]]["sets"]["greedy"]["tokens"]
        if not all(readings.number(x, 0) for x in [*rounds, *tokens]) or len(rounds) != len(tokens):
            return False
        if f"{sum(tokens) / sum(rounds):.2f}" not in found:
            return False
    return not re.search(r"\b(nan|inf|None|True|False)\b", found)


# -- pages -------------------------------------------------------------------------------------------------------------
def _report(place: Path) -> list[str]:
    return [
        *("report", str(place / "bench.json"), "--curve", str(place / "train" / "curve.jsonl")),
        *("--ledger", str(place / "ledger.json"), "--out", str(place / "page.html")),
    ]


def _page(place: Path, said: str) -> Outcome:
    text = (place / "page.html").read_text()
    return re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<script.*?</script>|<[^>]*>", " ", text, flags=re.S))


def _sane(place: Path, found: Outcome) -> bool:
    """Of a page only this is judged, beside what is refused: that no figure on it is none."""
    return not re.search(r"(?<![\w.])(nan|inf|None|True|False)(?![\w.])", found)


def _tensors(place: Path) -> Outcome:
    found = read_checked(place / "best.safetensors", "delete it")
    return {name: hashlib.sha256(found[name].numpy().tobytes()).hexdigest() for name in sorted(found)}


def _result(path: Path) -> Outcome:
    found = typed(TrainResult, read_json(path, finite=False), str(path))
    floats = [float(x) for x in (found.best_tau, found.start_tau, found.seconds)]
    return [*floats, found.steps, found.anchors, found.history]


def _kept_identity() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RUN / "run" / "features" / "index.json").read_text())["identity"]
    return found


def _date(path: Path) -> Outcome:
    """The date that is kept, or the day's where none is kept yet."""
    if not path.exists():
        return str(_DAY)
    found = json.loads(readings.text_of(path))["date"]
    readings.demand(readings.text(found))
    return str(datetime.fromisoformat(found))


def _paged(place: Path) -> None:
    files("run/bench.json", "run/ledger.json", "run/train")(place)


def _best(place: Path) -> None:
    write_checked(place / "best.safetensors", load_file(RUN / "run" / "train" / "best.safetensors"))


_DAY = datetime(2026, 11, 3)


def stored() -> list[Reader]:
    """All of them."""
    return [
        Reader(
            "manifest",
            {"selection.json": "json"},
            files("run/selection.json"),
            lambda place: [
                [e.key, e.score, e.tokens, e.selected] for e in read_manifest(place / "selection.json").entries
            ],
            None,
            by(readings.manifest, "selection.json"),
            weight=6,
        ),
        Reader(
            "cost ledger",
            {"ledger.json": "json"},
            files("run/ledger.json"),
            lambda place: [
                [e.stage, e.tokens, e.flops, e.peak_memory_bytes, e.bytes_written, float(e.seconds), e.formula]
                for e in Ledger.load(place / "ledger.json").stages
            ],
            None,
            by(readings.ledger, "ledger.json"),
            weight=6,
        ),
        Reader(
            "training curve",
            {"curve.jsonl": "lines"},
            files("run/train/curve.jsonl"),
            lambda place: [[p.step, p.loss, p.tokens, p.heldout_tau] for p in read_curve(place / "curve.jsonl")],
            None,
            by(readings.curve, "curve.jsonl"),
            weight=5,
        ),
        Reader(
            "state of training",
            {"train/state.json": "json"},
            _sealed_state,
            _checkpoint,
            None,
            by(_state, "train/state.json"),
            names=("train",),
            weight=6,
        ),
        Reader(
            "result of training",
            {"train.json": "json"},
            files("run/train.json"),
            lambda place: _result(place / "train.json"),
            None,
            by(readings.result, "train.json"),
        ),
        Reader(
            "index of features",
            {"features/index.json": "json"},
            files("run/features"),
            lambda place: FeatureStore(place / "features", _kept_identity()).index,
            None,
            by(lambda path: readings.index(path, _kept_identity()), "features/index.json"),
            names=("features",),
        ),
        Reader(
            "claim of a run",
            {"run/config.json": "json"},
            _claimed,
            lambda place: str(claim_run(_settings(place), lambda text: None).dtype),
            names=("run",),
            weight=6,
        ),
        Reader(
            "log-probabilities",
            {"tops.jsonl": "lines"},
            written("tops.jsonl", TOPS),
            _tops,
            None,
            by(_top_lines, "tops.jsonl"),
        ),
        Reader(
            "date of a run",
            {"r.date.json": "json"},
            written("r.date.json", '{"date": "2026-11-02T10:00:00"}\n'),
            lambda place: str(kept_moment(place / "r.jsonl", _DAY)),
            None,
            by(_date, "r.date.json"),
            weight=2,
        ),
        Reader("results of a study", {"results.json": "json"}, _small_study, _study, None, _tau_of, weight=8),
        Reader("page: benchmark", {"bench.json": "json"}, _paged, _report, _page, _sane, ("page.html",), weight=4),
        Reader("page: ledger", {"ledger.json": "json"}, _paged, _report, _page, _sane, ("page.html",), weight=1),
        Reader("page: curve", {"train/curve.jsonl": "lines"}, _paged, _report, _page, _sane, ("page.html",), weight=1),
        Reader(
            "page: state beside the curve",
            {"train/state.json": "json"},
            _paged,
            _report,
            _page,
            _sane,
            ("page.html",),
            weight=1,
        ),
        Reader("best weights", {"best.safetensors": "bytes"}, _best, _tensors, weight=3),
    ]
