"""The feature store's passes: rows of like length together, what all prompts share run once, nothing lost."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft.adaptation.core import build_features
from redraft.adaptation.runs import Log
from redraft.data.generate import Completion, Request, generate
from redraft.data.store import Row
from redraft.errors import UserError
from redraft.features import SPARE_BYTES, FeatureStore, RowFeatures, common_prefix
from redraft.provenance import Ledger
from redraft.rows import ENOUGH_TOKENS, MOST_PADDING, anchors, length_batches
from redraft.settings.sampler import Sampler
from redraft.target import Target


def rows_with(opening: list[int], lengths: list[int], seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(4, 128, (count,), generator=generator).tolist()

    return [
        Row(f"r{i}", [*opening, *ids(3 + i % 4)], ids(length), 0.0, 0, 1.0, 0, "stop", "")
        for i, length in enumerate(lengths)
    ]


def test_a_shared_opening_changes_no_feature(tiny_target, tmp_path):
    target = tiny_target("llama")
    rows = rows_with(list(range(5, 25)), [7, 1, 12, 9, 30, 2])
    assert common_prefix(rows) == list(range(5, 25))
    assert target.paths.cached, "what of ours is the model's own is tried before passes are counted"
    seen = []
    forward = target.forward
    target.forward = lambda ids, *rest: seen.append(ids.numel()) or forward(ids, *rest)
    store = FeatureStore(tmp_path / "features", {})
    store.build(target, rows, batch_tokens=128)
    del target.forward
    for row in filter(anchors, rows):
        taps, hidden = store.get(row)
        step = target.forward(torch.tensor([[*row.prompt_ids, *row.response_ids]]))
        first, end = len(row.prompt_ids), len(row.prompt_ids) + anchors(row)
        torch.testing.assert_close(taps, step.taps_BTKH[0, : end - 1])
        torch.testing.assert_close(hidden, step.hidden_BTH[0, first:end])
    # The opening went through the target once, and is in no batch.
    assert seen[0] == 20
    assert sum(seen) < sum(len(r.prompt_ids) + len(r.response_ids) for r in rows)


def test_the_common_prefix_stops_short_of_the_last_prompt_token():
    same = [Row(f"r{i}", [7, 8, 9], [4, 5], 0.0, 0, 1.0, 0, "stop", "") for i in range(3)]
    assert common_prefix(same) == [7, 8]
    assert common_prefix([]) == []
    assert common_prefix(rows_with([], [5, 5, 5])) == []


def test_batches_hold_every_row_once_and_little_padding():
    lengths = torch.randint(2, 200, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = rows_with([5, 6], lengths)
    batches = list(length_batches(rows, 2048))
    assert sorted(r.key for batch in batches for r in batch) == sorted(r.key for r in rows)
    for batch in batches:
        sizes = [len(r.prompt_ids) + len(r.response_ids) for r in batch]
        assert len(batch) * max(sizes) <= 2048
        if sum(sizes) - sizes[-1] >= ENOUGH_TOKENS:
            assert (len(batch) - 1) * sizes[-1] <= (1 + MOST_PADDING) * sum(sizes[:-1])


def test_features_survive_a_restart(tiny_target, tmp_path):
    target, rows = tiny_target("llama"), rows_with([], [7, 1, 12])
    FeatureStore(tmp_path / "features", {"target": "tiny"}).build(target, rows)
    again = FeatureStore(tmp_path / "features", {"target": "tiny"})
    assert again.build(target, rows) == 0
    assert again.get(rows[0])[1].shape == (6, target.hidden_size)
    with pytest.raises(UserError, match="another target"):
        FeatureStore(tmp_path / "features", {"target": "other"})


def test_features_that_the_disk_cannot_hold_are_refused(tiny_target, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="GiB are free"):
        FeatureStore(tmp_path / "none", {}).build(tiny_target("llama"), rows_with([], [7, 9]))


@pytest.mark.parametrize("byte", [20, -1])  # in the header, in the last number
def test_one_changed_byte_of_a_shard_is_named_and_the_shard_made_again(byte, tiny_target, tmp_path):
    target, rows, folder = tiny_target("llama"), rows_with([], [7, 1, 12]), tmp_path / "features"
    whole = FeatureStore(folder, {})
    whole.build(target, rows)
    expected = [[tensor.clone() for tensor in whole.get(row)] for row in (rows[0], rows[2])]
    shard = folder / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[byte] ^= 1
    shard.write_bytes(data)
    store = FeatureStore(folder, {})
    with pytest.raises(UserError, match="shard-00000.safetensors is damaged.*delete that file"):
        [store.get(row) for row in (rows[0], rows[2])]
    shard.unlink()
    again = FeatureStore(folder, {})
    assert again.build(target, rows) > 0
    for row, old in zip((rows[0], rows[2]), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(again.get(row), old, strict=True))


def test_shards_of_the_days_before_checksums_are_read(tiny_target, tmp_path):
    target, rows = tiny_target("llama"), rows_with([], [7])
    store = FeatureStore(tmp_path, {})
    store.build(target, rows)
    taps, _ = store.get(rows[0])
    shard = tmp_path / "shard-00000.safetensors"
    save_file(load_file(shard), shard)  # no fingerprints in the header
    assert torch.equal(FeatureStore(tmp_path, {}).get(rows[0])[0], taps)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_damaged_index_is_one_line(text, tmp_path):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match="index.json is"):
        FeatureStore(tmp_path, {})


# -- kept while the responses are written ----------------------------------------------------------------------------
@pytest.fixture
def answered(tiny_target) -> tuple[Target, list[Completion]]:
    """Answers of many lengths, greedy and sampled, more of them than slots, with what the target computed."""
    target = tiny_target("llama")
    rows = rows_with(list(range(5, 12)), [1] * 9)
    requests = [Request(row.key, row.prompt_ids, Sampler(0.8 * (i % 2)), i) for i, row in enumerate(rows)]
    stops = [8, 9, 10, 11, 12, 13, 14, 15]
    found = list(generate(target, requests, 20, batch_size=4, stop_ids=stops, features=True))
    assert len({len(done.response_ids) for done in found}) > 3
    return target, found


def kept_rows(found: Sequence[Completion]) -> list[RowFeatures]:
    return [RowFeatures(row_of(done), *done.features) for done in found if done.features is not None]


def row_of(done: Completion) -> Row:
    texts = (done.request.key, list(done.request.prompt_ids), done.response_ids)
    return Row(*texts, done.request.sampler.temperature, 0, 1.0, 0, done.finish_reason, "")


def test_features_kept_on_the_way_are_those_of_a_pass(answered, tmp_path):
    target, found = answered
    assert {len(done.response_ids) > 1 for done in found} == {done.features is not None for done in found}
    store = FeatureStore(tmp_path / "built", {})
    store.build(target, [row_of(done) for done in found])
    for row, taps, hidden in kept_rows(found):
        for one, other in zip((taps, hidden), store.get(row), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_without_being_asked_nothing_is_kept(tiny_target):
    target, row = tiny_target("llama"), rows_with([], [3])[0]
    (done,) = generate(target, [Request("a", row.prompt_ids, Sampler())], 4)
    assert done.features is None


def test_stored_features_leave_a_build_nothing_to_do(answered, tmp_path):
    target, found = answered
    kept, folder = kept_rows(found), tmp_path / "features"
    older = [each._replace(taps=each.taps + 1) for each in kept]
    for part in (older[:2], older[2:], kept[:2], kept[2:]):
        FeatureStore(folder, {}).put(part)
    store = FeatureStore(folder, {})
    assert store.build(target, [row for row, *_ in kept]) == 0
    for row, taps, hidden in kept:
        assert torch.equal(store.get(row)[0], taps) and torch.equal(store.get(row)[1], hidden)


def test_few_shards_are_open_at_once(answered, tmp_path, monkeypatch):
    monkeypatch.setattr("redraft.features.OPEN_SHARDS", 2)
    store = FeatureStore(tmp_path / "features", {})
    kept = kept_rows(answered[1])
    for each in kept:
        store.put([each])
    for row, taps, _ in [*kept, *kept]:
        assert torch.equal(store.get(row)[0], taps) and len(store._open) <= 2


def test_whether_features_are_kept_on_the_way_is_settled_once(answered, tmp_path, monkeypatch):
    """On a disk with more or less room next time a run does what it did, for other features are other bits."""

    def free(space):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40, space))

    free(SPARE_BYTES + 99)
    assert not FeatureStore(tmp_path / "without", {}).wants(100) and FeatureStore(tmp_path / "with", {}).wants(99)
    free(2**35)
    assert not FeatureStore(tmp_path / "without", {}).wants(100)
    free(0)
    store = FeatureStore(tmp_path / "with", {})
    assert store.wants(100)
    monkeypatch.setattr("redraft.files.os.replace", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match="no room on the disk for .*shard-00000.safetensors"):
        store.put(kept_rows(answered[1]))
    assert not FeatureStore(tmp_path / "with", {}).index


def test_features_of_another_text_are_not_taken_for_a_rows_own(answered, tmp_path):
    target, found = answered
    rows = [row_of(done) for done in found]
    store = FeatureStore(tmp_path, {})
    store.build(target, rows)
    row = next(row for row in rows if anchors(row))
    other = replace(row, response_ids=[*row.response_ids[:-1], row.response_ids[-1] ^ 1])
    with pytest.raises(UserError, match=r"shard-00000.safetensors holds .* of another text; delete that file"):
        FeatureStore(tmp_path, {}).get(other)
    assert store.missing(rows) == [] and store.missing([other, *rows]) == [other]
    assert store.build(target, [other, *(each for each in rows if each.key != row.key)])
    store.get(other)


def test_another_runs_shard_and_a_lost_index_are_told(answered, tmp_path):
    target, found = answered
    rows = [row_of(done) for done in found if done.features is not None]
    FeatureStore(tmp_path / "own", {}).build(target, rows)
    other = FeatureStore(tmp_path / "other", {})
    other.put([each._replace(hidden=each.hidden + 1) for each in kept_rows(found)])
    shutil.copy(tmp_path / "other" / "shard-00000.safetensors", tmp_path / "own")
    with pytest.raises(UserError, match="shard-00000.safetensors is another than index.jsonl beside it knows"):
        FeatureStore(tmp_path / "own", {}).get(rows[0])
    (tmp_path / "own" / "index.jsonl").unlink()
    with pytest.raises(UserError, match="index.jsonl does not exist, and there are 1 shards .*delete the folder"):
        FeatureStore(tmp_path / "own", {})


def test_features_that_are_made_anew_otherwise_are_told(answered, tmp_path):
    target, found = answered
    rows = [row_of(done) for done in found if done.features is not None]
    FeatureStore(tmp_path, {}).put([each._replace(hidden=each.hidden + 1) for each in kept_rows(found)])
    (tmp_path / "shard-00000.safetensors").unlink()
    store = FeatureStore(tmp_path, {})
    store.build(target, rows)
    assert sorted(store.altered) == sorted(row.key for row in rows)
    (tmp_path / "shard-00000.safetensors").unlink()
    again = FeatureStore(tmp_path, {})
    again.build(target, rows)
    assert not again.altered


def test_what_is_kept_already_stays_when_a_row_beside_it_is_computed(answered, tmp_path):
    target, found = answered
    marked = [each._replace(hidden=each.hidden + 1) for each in kept_rows(found)]
    own, more = [each.row for each in marked], [replace(each.row, id=f"general-{each.row.id}") for each in marked]
    store = FeatureStore(tmp_path, {})
    store.put(marked)
    assert store.build(target, [*own, *more]) > 0
    assert not store.altered and not store.missing([*own, *more])
    assert all(torch.equal(store.get(row)[1], hidden) for row, _, hidden in marked)


def test_a_row_beyond_what_the_target_reads_is_named_before_anything_is_computed(tiny_target, tmp_path):
    target = tiny_target("llama")
    log = Log(Ledger())
    rows = [Row(key, [5] * 4, [6] * tokens, 0.0, 0, 1.0, 0, "length", "h") for key, tokens in (("a", 3), ("long", 600))]
    store = FeatureStore(tmp_path, {"target": "tiny"})
    with pytest.raises(UserError, match=r"response long@T0 and its prompt have 604 tokens, and the target reads \d+;"):
        build_features("features", store, target, rows, log)
    assert not log.ledger.stages
