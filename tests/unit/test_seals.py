"""What a run keeps carries a mark: any change to it is told, in one line with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from redraft.adaptation.cards import run_card
from redraft.adaptation.claim import SETTINGS, check_files, fingerprints, settled
from redraft.artifact import read_checked, read_json, read_sealed, write_checked, write_sealed
from redraft.errors import UserError
from redraft.loading.places import UNPACKED, UNPACKED_FILE, _check_unpacked
from redraft.seals import SEAL, digest, file_digest, sealed, unsealed

VALUE = {"a": [1, 2.5, None, "ü"], "b": {"z": True}, "3": "x"}


def test_a_seal_comes_off_again(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_sealed(path, VALUE, "redraft.train/1", digest("mine"))
    assert json.loads(path.read_text())[SEAL].startswith("redraft.train/1 ")
    assert read_json(path) == VALUE == read_sealed(path, "redraft.train/1", digest("mine"), "-")
    path.write_text(json.dumps(VALUE))
    assert read_json(path) == VALUE == read_sealed(path, "redraft.train/1", digest("mine"), "-"), "an older version's"


def test_every_single_changed_bit_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_sealed(path, VALUE, "redraft.train/1", digest("mine"))
    data = path.read_bytes()
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            found = read_sealed(path, "redraft.train/1", digest("mine"), "delete it")
        except UserError as error:
            assert str(path) in str(error) and str(error).endswith("; delete it")
        else:
            assert found == VALUE, "only blanks between its parts may change"


OTHERS = [
    ("redraft.bench/1", "mine", "holds"),
    ("redraft.train/2", "mine", "holds"),
    ("redraft.train/1", "x", "belongs"),
]


@pytest.mark.parametrize(("kind", "of", "says"), OTHERS)
def test_another_files_or_runs_is_told(kind: str, of: str, says: str) -> None:
    with pytest.raises(UserError, match=f"^x.json {says} .*; delete it$"):
        unsealed(sealed(VALUE, "redraft.train/1", digest("mine")), "x.json", "delete it", kind, digest(of))


def test_tensors_know_their_place(tmp_path: Path) -> None:
    path, state = tmp_path / "best.safetensors", {"w": torch.arange(6.0)}
    write_checked(path, state, run="abc", step="4")
    assert torch.equal(read_checked(path, "-", run="abc", step="4")["w"], state["w"])
    for other in ({"run": "abd"}, {"run": "abc", "step": "5"}):
        with pytest.raises(UserError, match="best.safetensors belongs to another (run|step); delete it"):
            read_checked(path, "delete it", **other)
    data = path.read_bytes()
    for place in range(8 * 8, 8 * len(data), 7):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            found = read_checked(path, "delete it", run="abc", step="4")
        except UserError as error:
            assert "best.safetensors" in str(error) and str(error).endswith("; delete it")
        else:
            assert found.keys() == state.keys() and torch.equal(found["w"], state["w"])


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace("float32", "float64")])
def test_damaged_settings_of_a_run_say_to_begin_anew(damage: Any, tmp_path: Path) -> None:
    path, config = tmp_path / "config.json", cast(Any, SimpleNamespace(dtype="auto"))
    write_sealed(path, {"dtype": "float32"}, SETTINGS)
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=r"config.json is .*; give another run directory, or delete this one"):
        settled(config, path, None)


def test_a_card_says_what_to_do_about_a_damaged_file_of_its_run(tmp_path: Path) -> None:
    nobody: Any = None
    (tmp_path / "config.json").write_text('{"a": 1')
    with pytest.raises(UserError, match=r"config.json is not JSON: line 1: .*; delete it and give the command"):
        run_card(tmp_path, "vllm", nobody, nobody)


def test_an_unpacked_model_is_looked_at_before_it_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    _check_unpacked(folder, "embedded:tiny")  # an older version's says nothing of its files
    _check_unpacked.cache_clear()
    write_sealed(folder / UNPACKED_FILE, {"files": {"config.json": file_digest(folder / "config.json")}}, UNPACKED)
    _check_unpacked(folder, "embedded:tiny")
    for spoil in (lambda: (folder / "config.json").write_text("{ }"), (folder / "config.json").unlink):
        _check_unpacked.cache_clear()
        spoil()
        with pytest.raises(
            UserError, match=f"config.json is damaged: .*; delete the folder {folder} and give the same"
        ):
            _check_unpacked(folder, "embedded:tiny")


def test_drafts_that_a_stage_has_left_are_told_from_others(tmp_path: Path) -> None:
    for name in ("merged", "private"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "draft.safetensors").write_bytes(name.encode())
        (tmp_path / name / "README.md").write_text("a card")
    known = fingerprints(tmp_path, "merged", "private", "absent")
    assert known.keys() == {"merged/draft.safetensors", "private/draft.safetensors"}
    (tmp_path / "merged" / "README.md").write_text("another card")
    check_files(tmp_path, known, "delete train.json")
    (tmp_path / "private" / "draft.safetensors").write_bytes(b"merged")
    with pytest.raises(UserError, match="private/draft.safetensors is damaged or another run's: .*; delete train.json"):
        check_files(tmp_path, known, "delete train.json")
