"""Provenance records and the cost ledger."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from redraft import provenance
from redraft.errors import UserError
from redraft.provenance import Entry, Ledger, collect, forward_flops, train_flops


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("new=https://me:hush@host:1/v1", "new=https://***@host:1/v1"),
        ("http://host/v1?api_key=hush&x=1", "http://host/v1?***"),
        ("new=vllm serve m --api-key hush --port {port}", "new=vllm serve m --api-key *** --port {port}"),
        ("new=env VLLM_API_KEY='hush hush' vllm serve m", "new=env VLLM_API_KEY=*** vllm serve m"),
        ("--hf-token=hush", "--hf-token=***"),
        ("datasets:gsm8k@train", "datasets:gsm8k@train"),
        ("vllm serve m --max-num-batched-tokens 64", "vllm serve m --max-num-batched-tokens 64"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
    ],
)
def test_secrets_of_a_command_line_are_not_kept(given: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/redraft", "bench", given])
    assert provenance.collect()["argv"] == ["redraft", "bench", kept]


def test_collect_names_command_versions_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/redraft", "bench", "--gamma", "5"])
    record = collect(seed=7, device="cpu", extra={"note": "x"})
    assert record["argv"] == ["redraft", "bench", "--gamma", "5"]
    assert record["seed"] == 7 and record["device"] == "cpu" and record["note"] == "x"
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(record)) == record


def test_extra_wins() -> None:
    assert collect(extra={"seed": 3})["seed"] == 3


def test_revision_outside_a_checkout_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "src" / "redraft" / "provenance.py"))
    assert provenance.revision() is None


def test_revision_tells_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    for arguments in (
        ["init", "-q"],
        ["add", "file"],
        ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"],
    ):
        provenance._git(tmp_path, *arguments)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "src" / "redraft" / "provenance.py"))
    clean = provenance.revision()
    assert clean is not None and len(clean["commit"]) == 40 and not clean["dirty"]
    (tmp_path / "file").write_text("two")
    assert provenance.revision() == {"commit": clean["commit"], "dirty": True}


def test_flop_formulas() -> None:
    names = {"parameters": 3, "tokens": 5, "trained": 7, "frozen_on_the_way": 11}
    assert forward_flops(3, 5) == eval(provenance.FORWARD_FORMULA, {}, names)
    assert train_flops(7, 5, 11) == eval(provenance.TRAIN_FORMULA, {}, names)
    assert train_flops(7, 5) == 210


def test_ledger_keeps_stages_in_order_and_survives_a_reload(tmp_path: Path) -> None:
    path = tmp_path / "run" / "ledger.json"
    ledger = Ledger.load(path)
    with ledger.stage("regenerate") as entry:
        entry.add(tokens=10, flops=100, formula="2 * parameters * tokens", bytes_written=4)
    with ledger.stage("train") as entry:
        entry.add(tokens=5, flops=50, formula="a")
        entry.add(tokens=5, flops=50, formula="b")
        entry.add(tokens=1, formula="a")
    again = Ledger.load(path)
    assert [e.stage for e in again.stages] == ["regenerate", "train"]
    assert again.stages == ledger.stages
    assert again.stages[1].tokens == 11 and again.stages[1].formula == "a; b"
    assert again.stages[0].peak_memory_bytes > 1_000_000
    total = json.loads(path.read_text())["total"]
    assert total["tokens"] == 21 and total["flops"] == 200 and total["bytes_written"] == 4


def test_a_resumed_stage_adds_to_its_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    for tokens in (3, 4):
        ledger = Ledger.load(path)
        with ledger.stage("train") as entry:
            entry.add(tokens=tokens, flops=tokens, formula="a; b")
    (line,) = Ledger.load(path).stages
    assert line.tokens == 7 and line.flops == 7 and line.formula == "a; b"


def test_a_failed_stage_is_charged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    with pytest.raises(KeyError), Ledger.load(path).stage("train") as entry:
        entry.add(tokens=3)
        raise KeyError("stop")
    assert Ledger.load(path).stages[0].tokens == 3


def test_a_ledger_that_cannot_be_written_hides_no_reason(tmp_path: Path, full_disk: Callable[[], None]) -> None:
    ledger = Ledger.load(tmp_path / "ledger.json")
    full_disk()
    with pytest.raises(UserError, match="the one line that was meant"), ledger.stage("regenerate"):
        raise UserError("the one line that was meant")
    with pytest.raises(UserError, match=r"no room on the disk for .* MB are free"), ledger.stage("train"):
        pass
    assert not list(tmp_path.iterdir())


def test_merge_takes_the_higher_memory() -> None:
    first, second = Entry("s", peak_memory_bytes=5, seconds=1.0), Entry("s", peak_memory_bytes=3, seconds=2.0)
    first.merge(second)
    assert first.peak_memory_bytes == 5 and first.seconds == 3.0


@pytest.mark.parametrize("text", ["{", "[]", '{"stages": 3}', '{"stages": [{"tokens": 1}]}'])
def test_a_damaged_ledger_is_one_clear_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"ledger\.json (is not|must hold)") as caught:
        Ledger.load(path)
    assert "\n" not in str(caught.value)
