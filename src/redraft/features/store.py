"""Target features of stored responses, computed once and shared by every epoch and every method.

They are kept while the target writes its responses (:func:`redraft.data.generate.generate`), or made by one pass over
responses that came from elsewhere.

For a row of P prompt and R response tokens x_0 .. x_{P+R-1} the pair (h_t, x_{t+1}) stands at position t. A draft
predicts response tokens only, and the first one comes from prefill, so there are R - 1 *anchors*
t = P - 1 .. P + R - 3. Kept are the taps at positions 0 .. P + R - 3 (earlier ones serve as keys) and the target's
final-norm states at t + 1 of every anchor, from which the teacher's logits follow.

Shape legend: B rows, T tokens, K taps, F target width.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from redraft.artifact import atomic_write_json, read_json, tensors_hash, write_shard
from redraft.data.regenerate import Kept
from redraft.data.store import Row
from redraft.errors import UserError
from redraft.rows import anchors, length_batches
from redraft.target import KeyValueCache, Target

SHARD_BYTES = 256 * 2**20
# What keeping features on the way leaves of a disk to everybody else.
SPARE_BYTES = 2**30
# Systems let a process open about a thousand files.
OPEN_SHARDS = 256
INDEX_FILE, CHECKSUMS = "index.json", "checksums"
MEND = "delete that file and give the same command again, which computes its rows anew"


def feature_bytes(rows: Sequence[Row], target: Target) -> int:
    """Bytes that the features of ``rows`` take on disk."""
    width = target.hidden_size * target.head.weight.element_size()
    positions = sum(len(r.prompt_ids) + anchors(r) - 1 for r in rows if anchors(r))
    return positions * len(target.taps) * width + sum(anchors(r) for r in rows) * width


def common_prefix(rows: Sequence[Row]) -> list[int]:
    """The token ids that all prompts begin with (a chat template's opening, a system prompt), short of their last."""
    first = min((row.prompt_ids for row in rows), default=[])
    last = max((row.prompt_ids for row in rows), default=[])
    length = 0
    while length < min(len(first), len(last)) - 1 and first[length] == last[length]:
        length += 1
    return list(first[:length])


@dataclass
class Prefix:
    """What a build computes once for the tokens that all its prompts share."""

    ids: list[int]
    cache: KeyValueCache
    taps_PKF: Tensor


class FeatureStore:
    """Features on disk in safetensors shards; a killed build goes on with the rows that are missing.

    A shard's header has the fingerprint of every row in it, compared when the row is first read (shards of older
    versions have none). A shard that is gone is computed anew.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """``identity`` says which target and taps the features come from.

        Raises ``UserError`` when the folder holds the features of another target, or its index is damaged.
        """
        self.folder, self.identity = folder, identity
        self.index: dict[str, str] = {}
        self._open: dict[str, tuple[Any, dict[str, str]]] = {}
        self._sound: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / INDEX_FILE
        if path.exists():
            stored = read_json(path)
            if not {"identity", "index"} <= stored.keys():
                raise UserError(f"{path} is damaged; delete the folder and give the same command again")
            if stored["identity"] != identity:
                raise UserError(f"{folder} holds features of another target or other taps; remove it or choose another")
            there = {shard.name for shard in folder.glob("shard-*.safetensors")}
            self.index = {key: name for key, name in stored["index"].items() if name in there}

    def build(
        self,
        target: Target,
        rows: Sequence[Row],
        batch_tokens: int = 2048,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Compute what is missing; returns the tokens that went through the target.

        Raises ``UserError`` before the start when the disk cannot hold the result.
        """
        missing = [r for r in rows if anchors(r) and r.key not in self.index]
        needed, free = feature_bytes(missing, target), shutil.disk_usage(self.folder).free
        if needed * 1.05 > free:
            raise UserError(
                f"features of {len(missing)} rows need {needed / 2**30:.1f} GiB in {self.folder}, "
                f"{free / 2**30:.1f} GiB are free; use fewer rows or another disk"
            )
        shard: dict[str, Tensor] = {}
        done = size = 0
        # Batches are cut from all rows, so that a resumed build computes each row among the same neighbours and
        # gets the same bits; so is the prefix that they share.
        prefix = _prefix(target, rows) if missing else None
        for batch in length_batches([r for r in rows if anchors(r)], batch_tokens):
            if all(row.key in self.index for row in batch):
                continue
            for row, taps_TKF, hidden_AF in _compute(target, batch, prefix):
                shard |= _entry(row, taps_TKF, hidden_AF)
                size += taps_TKF.nbytes + hidden_AF.nbytes
                done += len(row.prompt_ids) + len(row.response_ids)
            if size >= SHARD_BYTES:
                self._write(shard)
                shard, size = {}, 0
            if progress:
                progress(done)
        if shard:
            self._write(shard)
        return done

    def put(self, found: Sequence[Kept]) -> bool:
        """Store features that were kept while the responses were written, in the place of older ones of these rows.

        False, and nothing stored, when the disk would be left with less than ``SPARE_BYTES``.
        """
        shard: dict[str, Tensor] = {}
        for row, taps_TKF, hidden_AF in found:
            shard |= _entry(row, taps_TKF, hidden_AF)
        size = sum(tensor.nbytes for tensor in shard.values())
        if shutil.disk_usage(self.folder).free < size + SPARE_BYTES:
            return False
        if shard:
            self._write(shard)
        return True

    def _write(self, shard: dict[str, Tensor]) -> None:
        last = max((int(name[6:-12]) for name in self.index.values()), default=-1)
        name = f"shard-{last + 1:05d}.safetensors"
        keys = [key.removesuffix("/taps") for key in shard if key.endswith("/taps")]
        sums = {key: tensors_hash(_of_row(key, shard.__getitem__)) for key in keys}
        write_shard(self.folder / name, shard, {CHECKSUMS: json.dumps(sums, sort_keys=True)})
        self.index.update(dict.fromkeys(keys, name))
        self._sound.difference_update(keys)
        atomic_write_json(self.folder / INDEX_FILE, {"identity": self.identity, "index": self.index})

    def get(self, row: Row) -> tuple[Tensor, Tensor]:
        """Taps [P + R - 2, K*F] and final-norm states [R - 1, F] of a row.

        Raises ``KeyError`` if not built, ``UserError`` that names the shard if it is damaged.
        """
        name = self.index[row.key]
        path = self.folder / name
        try:
            shard, sums = self._opened(name)
            found = _of_row(row.key, shard.get_tensor)
            sound = row.key in self._sound or sums.get(row.key, "") in ("", tensors_hash(found))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); {MEND}") from error
        if not sound:
            raise UserError(f"{path} is damaged: row {row.key} no longer holds what was written; {MEND}")
        self._sound.add(row.key)
        return found["taps"], found["hidden"]

    def _opened(self, name: str) -> tuple[Any, dict[str, str]]:
        """A shard and the fingerprints of its rows."""
        if name not in self._open:
            while len(self._open) >= OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))
            shard = safe_open(self.folder / name, "pt")
            self._open[name] = shard, json.loads((shard.metadata() or {}).get(CHECKSUMS, "{}"))
        return self._open[name]


def _of_row(key: str, take: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The tensors of a row by their plain names."""
    return {name: take(f"{key}/{name}") for name in ("taps", "hidden")}


def _entry(row: Row, taps_TKF: Tensor, hidden_AF: Tensor) -> dict[str, Tensor]:
    """A row's tensors as a shard names them."""
    return {f"{row.key}/taps": taps_TKF, f"{row.key}/hidden": hidden_AF}


def _prefix(target: Target, rows: Sequence[Row]) -> Prefix | None:
    """The shared opening of all prompts, run once. Nothing when it is not worth a pass of its own."""
    ids = common_prefix([r for r in rows if anchors(r)])
    if len(ids) < 8 or not target.paths.cached:
        return None
    cache = target.new_buffers(len(ids))
    taps = target.forward(torch.tensor([ids], device=target.device), cache).taps_BTKH
    assert taps is not None
    return Prefix(ids, cache, taps[0])


def _compute(target: Target, batch: Sequence[Row], prefix: Prefix | None) -> Iterator[Kept]:
    """Every row with its taps and the final-norm states that the teacher's logits follow from."""
    shared = len(prefix.ids) if prefix else 0
    lengths = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in batch]
    ids_BT = torch.zeros(len(batch), max(lengths) - shared, dtype=torch.long)
    for i, row in enumerate(batch):
        ids_BT[i, : lengths[i] - shared] = torch.tensor([*row.prompt_ids, *row.response_ids][shared : lengths[i]])
    cache = prefix.cache.spread(len(batch), max(lengths)) if prefix else None
    # Right padding: causal attention never looks at it.
    step = target.forward(ids_BT.to(target.device), cache)
    assert step.taps_BTKH is not None
    for i, row in enumerate(batch):
        first, end = len(row.prompt_ids) - shared, lengths[i] - shared
        taps_TKF = step.taps_BTKH[i, : end - 1]
        whole = torch.cat([prefix.taps_PKF, taps_TKF]) if prefix else taps_TKF.clone()
        yield row, whole.cpu(), step.hidden_BTH[i, first:end].cpu().clone()
