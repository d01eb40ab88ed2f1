"""The index of a folder of features: a line a shard, nothing written twice, old ones go on, damage told or mended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from redraft.artifact import write_sealed
from redraft.data.store import Row
from redraft.errors import UserError
from redraft.features import FeatureStore, RowFeatures, read_index
from redraft.features.index import INDEX_FILE, OLD_INDEX, OLD_SCHEMA

WHOSE = {"target": "tiny", "taps": [1, 3]}


def features(number: int, add: float = 0.0) -> RowFeatures:
    row = Row(f"r{number}", [5, 6], [7, 8, number], 0.0, 0, 1.0, 0, "stop", "")
    return RowFeatures(row, torch.full((3, 4), number + add), torch.full((2, 2), number + add))


def filled(folder: Path, shards: int = 4, each: int = 3) -> list[RowFeatures]:
    """A folder of so many shards of so many rows, closed again."""
    store, found = FeatureStore(folder, WHOSE), [features(number) for number in range(shards * each)]
    assert store.wants(1)
    for start in range(0, len(found), each):
        store.put(found[start : start + each])
    return found


def check(folder: Path, found: list[RowFeatures]) -> FeatureStore:
    store = FeatureStore(folder, WHOSE)
    assert sorted(store.index) == sorted(each.row.key for each in found)
    for row, taps, hidden in found:
        assert torch.equal(store.get(row)[0], taps) and torch.equal(store.get(row)[1], hidden)
    return store


def test_what_is_written_grows_with_the_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    store = FeatureStore(tmp_path, WHOSE)
    for number in range(30):
        before = (tmp_path / INDEX_FILE).read_bytes() if number else b""
        store.put([features(number)])
        data = (tmp_path / INDEX_FILE).read_bytes()
        assert data.startswith(before)
        sizes.append(len(data) - len(before))
    assert max(sizes[1:]) - min(sizes[1:]) < 8, "the last shard's line is as long as the first one's, but for digits"
    check(tmp_path, [features(number) for number in range(30)])


@pytest.mark.parametrize("with_sums", [True, False])
def test_an_index_of_an_older_version_is_read_and_goes_on(with_sums: bool, tmp_path: Path) -> None:
    found = filled(tmp_path)
    known = read_index(tmp_path)
    old = {"identity": WHOSE, "index": known.index, "kept": True}
    if with_sums:
        write_sealed(tmp_path / OLD_INDEX, old | {"sums": known.sums, "tokens": known.tokens}, OLD_SCHEMA)
    else:
        (tmp_path / OLD_INDEX).write_text(json.dumps(old))
    (tmp_path / INDEX_FILE).unlink()
    store = check(tmp_path, found)
    assert store.wants(1) and not (tmp_path / INDEX_FILE).exists(), "reading writes nothing"
    store.put([features(99)])
    assert not (tmp_path / OLD_INDEX).exists()
    check(tmp_path, [*found, features(99)])
    again = read_index(tmp_path)
    assert again.kept is True and again.sums.keys() == (known.sums.keys() if with_sums else set()) | {"r99@T0"}


def test_cut_anywhere_behind_its_first_line_nothing_is_lost(tmp_path: Path) -> None:
    """A shard tells of its rows itself, so that what a killed writer had not yet listed is there."""
    found = filled(tmp_path)
    data = (tmp_path / INDEX_FILE).read_bytes()
    first = data.index(b"\n") + 1
    for cut in (*range(first, first + 3), len(data) // 2, len(data) - 1):
        (tmp_path / INDEX_FILE).write_bytes(data[:cut])
        check(tmp_path, found)
    store = FeatureStore(tmp_path, WHOSE)
    store.put([features(99)])
    assert not (tmp_path / INDEX_FILE).read_bytes().endswith(data[cut - 9 : cut])
    check(tmp_path, [*found, features(99)])


def test_a_shard_without_a_line_that_is_another_s_is_written_over(tmp_path: Path) -> None:
    found, other = filled(tmp_path / "own"), FeatureStore(tmp_path / "other", {"target": "another"})
    other.put([features(77)])
    (tmp_path / "other" / "shard-00000.safetensors").rename(tmp_path / "own" / "shard-00004.safetensors")
    store = check(tmp_path / "own", found)
    store.put([features(99)])
    assert store.index["r99@T0"] == "shard-00004.safetensors"
    check(tmp_path / "own", [*found, features(99)])


def lines_of(folder: Path) -> list[bytes]:
    return (folder / INDEX_FILE).read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("how", ["flip", "drop", "swap", "first", "newline"])
def test_a_line_that_is_changed_lost_or_moved_is_one_line(how: str, tmp_path: Path) -> None:
    filled(tmp_path)
    lines = lines_of(tmp_path)
    if how == "flip":
        lines[3] = lines[3].replace(b"shard-00001", b"shard-00000")
    elif how == "drop":
        del lines[3]
    elif how == "swap":
        lines[2], lines[3] = lines[3], lines[2]
    elif how == "first":
        del lines[0]
    else:
        lines[3] = lines[3][:-1] + b" "
    (tmp_path / INDEX_FILE).write_bytes(b"".join(lines))
    number = {"flip": 4, "drop": 4, "swap": 3, "first": 1, "newline": 4}[how]
    with pytest.raises(UserError, match=rf"index\.jsonl:{number} is damaged.*; delete the folder"):
        FeatureStore(tmp_path, WHOSE)


def test_a_deleted_shard_is_made_anew_under_its_name(tmp_path: Path) -> None:
    found = filled(tmp_path)
    (tmp_path / "shard-00003.safetensors").unlink()
    store = FeatureStore(tmp_path, WHOSE)
    assert store.missing([each.row for each in found]) == [each.row for each in found[9:]]
    store.put([features(9, add=0.5), features(20)])
    assert store.altered == ["r9@T0"]
    check(tmp_path, [*found[:9], features(9, add=0.5), features(20)])
