"""An adapter's target as an ordinary checkpoint, written shard by shard in the memory of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.artifact import all_finite, atomic_write_json, write_tensors
from redraft.errors import UserError
from redraft.loading.changes import Changed
from redraft.loading.checkpoint import INDEX, WEIGHTS
from redraft.loading.stored import Stored, Weight
from redraft.loading.targets import Plain
from redraft.pieces import Pieced, Table


@dataclass(frozen=True)
class _Shard(Pieced):
    """The tensors of one file as they are to be written, each made when its turn comes."""

    found: Mapping[str, tuple[str, Weight]]  # the name in the model, and the numbers, by the name in the file
    dtype: torch.dtype
    target: str

    def table(self, name: str) -> Table:
        inside, weight = self.found[name]
        own = weight.dtype if isinstance(weight, Stored) else self.dtype
        dtype = self.dtype if own.is_floating_point else own  # tables of whole numbers stay what they are

        def make() -> Iterator[Tensor]:
            for piece in weight.pieces():
                if not all_finite(piece):
                    raise UserError(f"{self.target} holds NaN or infinity in {inside}; is its training sound?")
                yield piece.to(dtype)

        return Table(dtype, weight.shape, make)

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def merged_bytes(plain: Plain, dtype: torch.dtype) -> int:
    """Bytes of the weights of ``plain`` in ``dtype``."""
    return sum(_size(shard, dtype) for shard in _shards(plain, dtype).values())


def _size(shard: _Shard, dtype: torch.dtype) -> int:
    return sum(weight.shape.numel() * dtype.itemsize for _, weight in shard.found.values())


def _shards(plain: Plain, dtype: torch.dtype) -> dict[str, _Shard]:
    """What is in every file, by its name: the base model's files, without what the model does not read."""
    tied: Mapping[str, str] = getattr(plain.model, "all_tied_weights_keys", None) or {}
    found: dict[str, dict[str, tuple[str, Weight]]] = {}
    for name, weight in plain.weights.items():
        stored = weight.base if isinstance(weight, Changed) else weight
        if name in tied or not isinstance(stored, Stored):
            continue
        for key, part in zip(stored.keys, stored.parts, strict=True):
            own = weight if len(stored.parts) == 1 else Stored(part[1].shape, (part,), (key,))
            found.setdefault(part[0].name, {})[key] = (name, own)
    return {file: _Shard(tensors, dtype, plain.facts.name) for file, tensors in sorted(found.items())}


def write_merged(plain: Plain, folder: Path, dtype: torch.dtype) -> None:
    """Write config, generation settings, tokenizer and weights of ``plain`` in ``dtype``. Raises ``UserError``."""
    facts, shards = plain.facts, _shards(plain, dtype)
    config: Any = facts.whole_config
    config.dtype, config.architectures = dtype, [type(plain.model).__name__]
    config.save_pretrained(folder)
    facts.generation.save_pretrained(folder)
    facts.tokenizer.save_pretrained(folder)
    names = list(shards) if len(shards) > 1 else list(WEIGHTS[:1])
    for file, shard in zip(names, shards.values(), strict=True):
        write_tensors(folder / file, shard)
    if len(shards) > 1:
        places = {key: file for file, shard in shards.items() for key in shard}
        size = sum(_size(shard, dtype) for shard in shards.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        atomic_write_json(folder / (WEIGHTS[0] + INDEX), index)
