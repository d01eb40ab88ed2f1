"""Target features of stored responses: where they come from (:class:`FeatureSource`), and the store that keeps them.

For a row of P prompt and R response tokens x_0 .. x_{P+R-1} the pair (h_t, x_{t+1}) stands at position t. A draft
predicts response tokens only, and the first one comes from prefill, so there are R - 1 *anchors*
t = P - 1 .. P + R - 3. The features of a row are the taps at positions 0 .. P + R - 3 (earlier ones serve as keys) and
the target's final-norm states at t + 1 of every anchor, from which the teacher's logits follow.

They come from a pass of the target in this process, or are kept on disk, computed once and shared by every epoch and
every method: while the target writes its responses (:func:`redraft.data.generate.generate`), or fetched for responses
that came from elsewhere.

Shape legend: A anchors, B rows, T tokens, K taps, F target width.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, Protocol

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from redraft.artifact import atomic_write_json, read_json, tensors_hash, write_shard
from redraft.errors import UserError
from redraft.inputs import loads, require_file, there, typed
from redraft.rows import AnyRow, TokenRow, anchors, length_batches
from redraft.target import KeyValueCache, Target

# A shared opening of fewer tokens is not worth a pass of its own.
LEAST_PREFIX = 8

SHARD_BYTES = 256 * 2**20
# What keeping features on the way leaves of a disk to everybody else.
SPARE_BYTES = 2**30
# Systems let a process open about a thousand files.
OPEN_SHARDS = 256
INDEX_FILE, CHECKSUMS = "index.json", "checksums"
# The shard of every row.
Index = dict[str, Annotated[str, Field(pattern=r"^shard-\d+\.safetensors$")]]
Sums = dict[str, str]  # the fingerprint of every row
MEND = "delete that file and give the same command again, which computes its rows anew"


class RowFeatures(NamedTuple, Generic[AnyRow]):
    """The features of a row: ``taps`` [P + R - 2, K*H] and final-norm states ``hidden`` [R - 1, H], on the CPU."""

    row: AnyRow
    taps: Tensor
    hidden: Tensor


class FeatureSource(Protocol):
    """Gives the features of any stored response: a store on disk, or the target in this process."""

    def get(self, row: TokenRow) -> tuple[Tensor, Tensor]:
        """Taps and final-norm states of one row (:class:`RowFeatures`). Raises ``KeyError`` where it has none."""
        ...


class FeatureProducer(Protocol):
    """Makes the features of many responses, for a store to keep: the target in this process, later a serving engine."""

    def row_bytes(self, row: TokenRow) -> int:
        """Bytes that the features of a row take."""
        ...

    def batches(
        self, rows: Sequence[TokenRow], have: Collection[str] = (), batch_tokens: int = 2048
    ) -> Iterator[list[RowFeatures]]:
        """The features of ``rows``, in the order that suits the maker. Batches of rows that are all in ``have`` are
        left out; how rows are put together follows from all of them, so that a resumed pass gives the same bits."""
        ...


class FeatureKeeper(Protocol):
    """Takes features as they come; false when it has no room for them and wants no more."""

    def put(self, found: Sequence[RowFeatures]) -> bool: ...


# -- computed in this process ----------------------------------------------------------------------------------------
def common_prefix(rows: Sequence[TokenRow]) -> list[int]:
    """The token ids that all prompts begin with (a chat template's opening, a system prompt), short of their last."""
    prompts = [list(row.prompt_ids) for row in rows]
    return list(os.path.commonprefix(prompts))[: min(map(len, prompts), default=1) - 1]


@dataclass
class Prefix:
    """What is computed once for the tokens that all prompts share."""

    ids: list[int]
    cache: KeyValueCache
    taps_PKF: Tensor


class ComputedFeatures:
    """Runs the target over the rows it is asked for: a source for one row at a time, and a producer for a store."""

    def __init__(self, target: Target) -> None:
        """The taps are those that ``target`` has when it is asked."""
        self.target = target

    def get(self, row: TokenRow) -> tuple[Tensor, Tensor]:
        """See :class:`~redraft.features.FeatureSource`."""
        found = next(self._compute([row], None))
        return found.taps, found.hidden

    def row_bytes(self, row: TokenRow) -> int:
        """See :class:`~redraft.features.FeatureProducer`."""
        if not anchors(row):
            return 0
        width = self.target.hidden_size * self.target.dtype.itemsize
        return width * ((len(row.prompt_ids) + anchors(row) - 1) * len(self.target.taps) + anchors(row))

    def batches(
        self, rows: Sequence[TokenRow], have: Collection[str] = (), batch_tokens: int = 2048
    ) -> Iterator[list[RowFeatures]]:
        """Rows of similar length together; what all their prompts begin with is run once."""
        asked = [row for row in rows if anchors(row)]
        if all(row.key in have for row in asked):
            return
        prefix = self._prefix(asked)
        for batch in length_batches(asked, batch_tokens):
            if any(row.key not in have for row in batch):
                yield list(self._compute(batch, prefix))

    def _prefix(self, rows: Sequence[TokenRow]) -> Prefix | None:
        """The shared opening of all prompts, run once. Nothing when it is not worth a pass of its own."""
        ids = common_prefix(rows)
        if len(ids) < LEAST_PREFIX or not self.target.paths.cached:
            return None
        cache = self.target.new_buffers(len(ids))
        taps = self.target.forward(torch.tensor([ids], device=self.target.device), cache).taps_BTKH
        assert taps is not None
        return Prefix(ids, cache, taps[0])

    def _compute(self, batch: Sequence[TokenRow], prefix: Prefix | None) -> Iterator[RowFeatures]:
        shared = len(prefix.ids) if prefix else 0
        lengths = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in batch]
        ids_BT = torch.zeros(len(batch), max(lengths) - shared, dtype=torch.long)
        for i, row in enumerate(batch):
            ids_BT[i, : lengths[i] - shared] = torch.tensor([*row.prompt_ids, *row.response_ids][shared : lengths[i]])
        cache = prefix.cache.spread(len(batch), max(lengths)) if prefix else None
        # Right padding: causal attention never looks at it.
        step = self.target.forward(ids_BT.to(self.target.device), cache)
        assert step.taps_BTKH is not None
        for i, row in enumerate(batch):
            first, end = len(row.prompt_ids) - shared, lengths[i] - shared
            taps_TKF = step.taps_BTKH[i, : end - 1]
            whole = torch.cat([prefix.taps_PKF, taps_TKF]) if prefix else taps_TKF.clone()
            yield RowFeatures(row, whole.cpu(), step.hidden_BTH[i, first:end].cpu().clone())


# -- on disk ---------------------------------------------------------------------------------------------------------
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
        self._open: dict[str, tuple[Any, dict[str, str]]] = {}
        self._sound: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        found, self.index = read_index(folder)
        if found not in (None, identity):
            raise UserError(f"{folder} holds features of another target or other taps; remove it or choose another")

    def build(
        self,
        source: Target | FeatureProducer,
        rows: Sequence[TokenRow],
        batch_tokens: int = 2048,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Fetch what is missing, from the target in this process or another producer; returns the tokens of the rows
        that it was asked for.

        Raises ``UserError`` before the start when the disk cannot hold the result.
        """
        source = ComputedFeatures(source) if isinstance(source, Target) else source
        missing = [r for r in rows if anchors(r) and r.key not in self.index]
        needed, free = sum(map(source.row_bytes, missing)), shutil.disk_usage(self.folder).free
        if needed * 1.05 > free:
            raise UserError(
                f"features of {len(missing)} rows need {needed / 2**30:.1f} GiB in {self.folder}, "
                f"{free / 2**30:.1f} GiB are free; use fewer rows or another disk"
            )
        shard: list[RowFeatures] = []
        done = 0
        for batch in source.batches(rows, self.index, batch_tokens):
            shard += batch
            done += sum(len(found.row.prompt_ids) + len(found.row.response_ids) for found in batch)
            if sum(map(_size, shard)) >= SHARD_BYTES:
                self._write(shard)
                shard = []
            if progress:
                progress(done)
        self._write(shard)
        return done

    def put(self, found: Sequence[RowFeatures]) -> bool:
        """Store features that were kept while the responses were written, in the place of older ones of these rows.

        False, and nothing stored, when the disk would be left with less than ``SPARE_BYTES``.
        """
        if shutil.disk_usage(self.folder).free < sum(map(_size, found)) + SPARE_BYTES:
            return False
        self._write(found)
        return True

    def _write(self, found: Sequence[RowFeatures]) -> None:
        """A shard of these rows; none of no row."""
        if not found:
            return
        shard: dict[str, Tensor] = {}
        for row, taps_TKF, hidden_AF in found:
            shard |= {f"{row.key}/taps": taps_TKF, f"{row.key}/hidden": hidden_AF}
        last = max((int(name[6:-12]) for name in self.index.values()), default=-1)
        name = f"shard-{last + 1:05d}.safetensors"
        keys = [each.row.key for each in found]
        sums = {key: tensors_hash(_of_row(key, shard.__getitem__)) for key in keys}
        write_shard(self.folder / name, shard, {CHECKSUMS: json.dumps(sums, sort_keys=True)})
        self.index.update(dict.fromkeys(keys, name))
        self._sound.difference_update(keys)
        atomic_write_json(self.folder / INDEX_FILE, {"identity": self.identity, "index": self.index})

    def get(self, row: TokenRow) -> tuple[Tensor, Tensor]:
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
            require_file(self.folder / name, MEND)
            shard = safe_open(self.folder / name, "pt")
            self._open[name] = (
                shard,
                typed(Sums, loads((shard.metadata() or {}).get(CHECKSUMS, "{}")), str(self.folder / name), MEND),
            )
        return self._open[name]


def read_index(folder: Path) -> tuple[Any, dict[str, str]]:
    """What the features in a folder are of (none where there are none), and the shard of every row that is there.

    Raises ``UserError`` for a damaged index.
    """
    path = folder / INDEX_FILE
    if not there(path):
        return None, {}
    stored = read_json(path)
    if not {"identity", "index"} <= stored.keys():
        raise UserError(f"{path} is damaged; delete the folder and give the same command again")
    typed(Index, stored["index"], f"{path} is damaged", MEND)
    shards = {shard.name for shard in folder.glob("shard-*.safetensors")}
    return stored["identity"], {key: name for key, name in stored["index"].items() if name in shards}


def _of_row(key: str, take: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The tensors of a row by their plain names."""
    return {name: take(f"{key}/{name}") for name in ("taps", "hidden")}


def _size(found: RowFeatures) -> int:
    return found.taps.nbytes + found.hidden.nbytes
