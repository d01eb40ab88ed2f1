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

import shutil
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import and_, eq
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from redraft.artifact import tensors_hash, write_tensors
from redraft.errors import UserError
from redraft.features.index import CHECKSUMS, Sums, shard_header, shard_name, tokens_hash
from redraft.features.index import INDEX_FILE as INDEX_FILE
from redraft.features.index import Index as Index
from redraft.features.index import read_index as read_index
from redraft.files import clean, use_folder
from redraft.inputs import loads, require_file, typed
from redraft.locks import LOCK_FILE, is_helper, lock
from redraft.rows import AnyRow, TokenRow, anchors, length_batches, sizes
from redraft.target import KeyValueCache, Target

# A shared opening of fewer tokens is not worth a pass of its own.
LEAST_PREFIX = 8

SHARD_BYTES = 256 * 2**20
# What keeping features on the way leaves of a disk to everybody else.
SPARE_BYTES = 2**30
# Systems let a process open about a thousand files.
OPEN_SHARDS = 256
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
    """Takes features as they come."""

    def wants(self, needed: int) -> bool:
        """Whether it has room for features of ``needed`` bytes at most. The first answer holds for good: features that
        are made at another time, in other batches, are other bits."""
        ...

    def put(self, found: Sequence[RowFeatures]) -> None: ...


# -- computed in this process ----------------------------------------------------------------------------------------
def common_prefix(rows: Sequence[TokenRow]) -> list[int]:
    """The token ids that all prompts begin with (a chat template's opening, a system prompt), short of their last."""
    prompts = (list(row.prompt_ids) for row in rows)
    shared = next(prompts, [])
    shortest = len(shared)
    for prompt in prompts:
        shortest = min(shortest, len(prompt))
        if prompt[: len(shared)] != shared:
            shared = [one for one, same in zip(shared, accumulate(map(eq, shared, prompt), and_), strict=False) if same]
    return shared[: max(0, shortest - 1)]


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
        return width * ((sizes(row)[0] + anchors(row) - 1) * len(self.target.taps) + anchors(row))

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

    The index has the fingerprint of every row's features, and so has the header of its shard; the index that of the
    row's tokens too. All are compared when the row is first read (older versions have none in the index, or none at
    all). A shard that is gone is computed anew. One process at a time writes here, from its first shard on.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """``identity`` says which target and taps the features come from.

        Raises ``UserError`` when the folder holds the features of another target, or its index is damaged.
        """
        self.folder, self.identity = folder, identity
        self._open: dict[str, tuple[Any, dict[str, str]]] = {}
        self._sound: set[str] = set()
        self._lock: Any = None
        # Rows that were made anew and are other bits than those that the index knew.
        self.altered: list[str] = []
        use_folder(folder, "folder of features")
        self._read()

    def _read(self) -> None:
        self.known = read_index(self.folder)
        if self.known.identity not in (None, self.identity):
            raise UserError(
                f"{self.folder} holds features of another target or other taps; remove it or choose another"
            )

    @property
    def index(self) -> dict[str, str]:
        """The shard of every row that is there."""
        return self.known.index

    def missing(self, rows: Sequence[TokenRow]) -> list[TokenRow]:
        """Those of the rows that have features and whose features are not here, or are here of other tokens."""
        return [row for row in rows if anchors(row) and not self.known.holds(row)]

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
        missing = self.missing(rows)
        lacking = {row.key for row in missing}
        needed, free = sum(map(source.row_bytes, missing)), shutil.disk_usage(self.folder).free
        if needed * 1.05 > free:
            raise UserError(
                f"features of {len(missing)} rows need {needed / 2**30:.1f} GiB in {self.folder}, "
                f"{free / 2**30:.1f} GiB are free; use fewer rows or another disk"
            )
        shard: list[RowFeatures] = []
        done, self.altered = 0, []
        for batch in source.batches(rows, self.index.keys() - lacking, batch_tokens):
            # What stands beside a missing row is here already, and made anew it would be other bits.
            shard += [found for found in batch if found.row.key in lacking]
            done += sum(len(found.row.prompt_ids) + len(found.row.response_ids) for found in batch)
            if sum(map(_size, shard)) >= SHARD_BYTES:
                self._write(shard)
                shard = []
            if progress:
                progress(done)
        self._write(shard)
        return done

    def wants(self, needed: int) -> bool:
        """See :class:`FeatureKeeper`. The disk keeps ``SPARE_BYTES`` for others. Raises ``UserError``."""
        if self.known.kept is None:
            self._take()
        if self.known.kept is None:
            # Stores of older versions did not say so; one that holds features had room for them.
            self.known.keep(bool(self.index) or shutil.disk_usage(self.folder).free >= needed + SPARE_BYTES)
        return bool(self.known.kept)

    def put(self, found: Sequence[RowFeatures]) -> None:
        """Store features that were kept while the responses were written, in the place of older ones of these rows.

        Raises ``UserError`` for want of room.
        """
        self._write(found)

    def _take(self) -> None:
        """From now on nobody else writes here; what others have written since the index was read is there too."""
        if self._lock is None and not is_helper():
            self._lock = lock(self.folder / LOCK_FILE, f"folder of features {self.folder}")
            weakref.finalize(self, self._lock.release)
            if self._lock.count == 1:
                clean(self.folder)
            self._read()
            if self.known.identity is None:
                self.known.begin(self.identity)  # shards without an index are then never of this process
            else:
                self.known.settle()

    def _write(self, found: Sequence[RowFeatures]) -> None:
        """A shard of these rows; none of no row."""
        if not found:
            return
        self._take()
        shard: dict[str, Tensor] = {}
        for row, taps_TKF, hidden_AF in found:
            shard |= {f"{row.key}/taps": taps_TKF, f"{row.key}/hidden": hidden_AF}
        known, name = self.known, shard_name(self.known.shards)
        entries = {
            each.row.key: (tensors_hash(_of_row(each.row.key, shard.__getitem__)), tokens_hash(each.row))
            for each in found
        }
        write_tensors(self.folder / name, shard, shard_header(self.identity, entries))
        same = (key for key, (_, tokens) in entries.items() if known.tokens.get(key) == tokens)
        self.altered += [key for key in same if known.sums.get(key) != entries[key][0]]
        self._open.pop(name, None)
        self._sound.difference_update(entries)
        known.add(name, entries)

    def get(self, row: TokenRow) -> tuple[Tensor, Tensor]:
        """Taps [P + R - 2, K*F] and final-norm states [R - 1, F] of a row.

        Raises ``KeyError`` if not built, ``UserError`` that names the shard if it is damaged.
        """
        name = self.index[row.key]
        path = self.folder / name
        try:
            shard, sums = self._opened(name)
            found = _of_row(row.key, shard.get_tensor)
            sound = row.key in self._sound or self._is_sound(row, found, sums.get(row.key, ""), path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); {MEND}") from error
        if not sound:
            raise UserError(f"{path} is damaged: row {row.key} no longer holds what was written; {MEND}")
        self._sound.add(row.key)
        return found["taps"], found["hidden"]

    def _is_sound(self, row: TokenRow, found: dict[str, Tensor], said: str, path: Path) -> bool:
        """Whether the tensors are those that shard and index know. Raises ``UserError`` where the two disagree."""
        known = self.known.sums.get(row.key, "")
        if not self.known.holds(row):
            raise UserError(f"{path} holds {row.key} of another text; {MEND}")
        if not known and not said:
            return True
        actual = tensors_hash(found)
        if known and said == actual != known:
            raise UserError(f"{path} is another than {self.known.name} beside it knows: another run's; {MEND}")
        return actual == (known or said) and said in ("", actual)

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


def _of_row(key: str, take: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The tensors of a row by their plain names."""
    return {name: take(f"{key}/{name}") for name in ("taps", "hidden")}


def _size(found: RowFeatures) -> int:
    return found.taps.nbytes + found.hidden.nbytes
