"""The weights of a model as they lie in its files: known by name, shape and place, and read when they are asked for.

A checkpoint is *plain* where transformers would only rename its tensors, or stack those of single experts: then every
tensor of the model is a row of whole tensors of the files, one behind the other. Its head can be read by itself, and
a sample of all weights, as the hash of a target is, costs a few reads a tensor, however large they are. Files are read
and not mapped: a mapped page counts as memory for as long as the file is open.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from redraft.artifact import Entry, read_layout
from redraft.errors import UserError
from redraft.pieces import PIECE
from redraft.target.facts import fingerprint, sampled

# Numbers that are further apart are read one by one; nearer ones lie in the same few pages.
NEAR_BYTES = 2**12


class Weight(Protocol):
    """A tensor of a model that need not be in memory."""

    @property
    def shape(self) -> torch.Size: ...

    def samples(self, step: int) -> Tensor:
        """Every ``step``-th of its numbers, in order, the first among them. Raises ``UserError``."""
        ...

    def pieces(self) -> Iterator[Tensor]:
        """All of its numbers, in order, some at a time. Raises ``UserError``."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor that is one or more tensors of files, in order; ``keys`` are their names there."""

    shape: torch.Size
    parts: tuple[tuple[Path, Entry], ...]
    keys: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The type in the file; that of the first part where they differ."""
        return self.parts[0][1].dtype

    def samples(self, step: int) -> Tensor:
        """See :class:`Weight`."""
        found, first = [], 0
        for path, entry in self.parts:
            count = entry.shape.numel()
            if first < count:
                found.append(_numbers(path, entry, range(first, count, step)))
            first = (first - count) % step if first < count else first - count
        return torch.cat(found or [torch.empty(0, dtype=self.dtype)])

    def pieces(self) -> Iterator[Tensor]:
        """See :class:`Weight`."""
        for path, entry in self.parts:
            for first in range(0, entry.shape.numel(), PIECE):
                yield _numbers(path, entry, range(first, min(first + PIECE, entry.shape.numel())))


def _numbers(path: Path, entry: Entry, which: range) -> Tensor:
    """These numbers of a tensor in a file. Raises ``UserError`` where the file cannot be read."""
    size = entry.dtype.itemsize
    try:
        with open(path, "rb", buffering=0) as file:
            handle = file.fileno()
            if which.step * size > NEAR_BYTES:
                data = b"".join(os.pread(handle, size, entry.begin + size * i) for i in which)
                found = torch.frombuffer(bytearray(data), dtype=entry.dtype)
            else:
                found = _run(handle, entry, which)
            if len(found) != len(which):
                raise OSError("it ends too early")
            return found
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy or download it again") from error


def _run(handle: int, entry: Entry, which: range) -> Tensor:
    """The same, from all that lies between the first and the last."""
    size, runs = entry.dtype.itemsize, []
    for run in (which[i : i + PIECE // which.step + 1] for i in range(0, len(which), PIECE // which.step + 1)):
        length = size * (run[-1] - run[0] + 1)
        data, read = bytearray(length), 0
        view = memoryview(data)
        while read < length and (got := os.preadv(handle, [view[read:]], entry.begin + size * run[0] + read)):
            read += got
        runs.append(torch.frombuffer(data, dtype=entry.dtype)[: read // size : which.step])
    return torch.cat(runs) if len(runs) != 1 else runs[0].clone() if which.step > 1 else runs[0]


def read(weight: Weight, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
    """All of a weight in ``dtype``, and beside it no more than a piece. Raises ``UserError``."""
    whole, done = torch.empty(weight.shape.numel(), dtype=dtype, device=device), 0
    for piece in weight.pieces():
        whole[done : done + len(piece)] = piece.to(device)
        done += len(piece)
    return whole.view(weight.shape)


def weights_hash(weights: Mapping[str, Weight]) -> str:
    """The fingerprint of the model that these weights are, as an opened one gives it. Raises ``UserError``."""
    return fingerprint((name, w.shape, w.samples(sampled(w.shape))) for name, w in sorted(weights.items()))


# -- which tensors of the files a model is made of ---------------------------------------------------------------------
def layouts(files: Sequence[Path]) -> dict[str, tuple[Path, Entry]] | None:
    """Where every tensor of these files lies; none where one of them is damaged, for whoever opens it to say how."""
    found: dict[str, tuple[Path, Entry]] = {}
    for path in files:
        try:
            with open(path, "rb") as file:
                entries, end = read_layout(file), os.fstat(file.fileno()).st_size
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, UserError):
            return None
        if any(entry.begin + entry.shape.numel() * entry.dtype.itemsize > end for entry in entries.values()):
            return None
        found |= {name: (path, entry) for name, entry in entries.items()}
    return found


def stored_weights(
    files: Sequence[Path], model: Any, left_over: Callable[[list[str]], list[str]]
) -> dict[str, Stored] | None:
    """The state of ``model``, which holds no numbers, by its names; none where the files are not plain.

    ``left_over`` says which of the names that the model has no place for are not known to be superfluous.
    """
    known = layouts(files)
    if known is None:
        return None
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    try:
        sources = _sources(known, model, wanted)
    except Exception:  # how names are mapped is transformers' own affair, and changes with its versions
        return None
    places = {name for name in sources if name in wanted}
    ignored = [re.compile(text) for text in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    extra = [name for name in sources if name not in wanted and not any(one.search(name) for one in ignored)]
    if places != {name for name in wanted if name not in tied} or left_over(sorted(extra)):
        return None
    found = {
        name: Stored(wanted[name], tuple(map(known.__getitem__, sources[name])), tuple(sources[name]))
        for name in places
    }
    if not all(_fits(weight) for weight in found.values()):
        return None
    return found | {name: found[source] for name, source in tied.items()}


def _fits(weight: Stored) -> bool:
    """Whether the parts are the weight itself, or the experts that it stacks: of one shape but for their own rows."""
    shapes = [entry.shape for _, entry in weight.parts]
    if len({entry.dtype for _, entry in weight.parts}) > 1:
        return False
    if len(shapes) == 1:
        return shapes[0] == weight.shape
    experts, *inner = weight.shape
    one = shapes[: len(shapes) // max(1, experts)]
    rows = sum(shape[0] for shape in one if len(shape))
    alike = all(list(shape[1:]) == inner[1:] for shape in shapes)
    return alike and shapes == one * experts and [rows, *inner[1:]] == inner


def _sources(known: Mapping[str, Any], model: Any, wanted: Mapping[str, torch.Size]) -> dict[str, list[str]]:
    """For every tensor of the model the names in the files that it is made of, in order; extra names by themselves.

    Raises ``ValueError`` for what is converted in another way than by stacking.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()
    direct: dict[str, list[str]] = {}
    stacked: dict[str, dict[str, list[str]]] = {}
    for key in sorted(known, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if pattern is None or name not in wanted:
            direct.setdefault(name, []).append(key)
        else:
            stacked.setdefault(name, {}).setdefault(pattern, []).append(key)
    if double := [name for name, keys in direct.items() if len(keys) > 1 or name in stacked]:
        raise ValueError(f"{double[0]} is there twice")
    for name, parts in stacked.items():
        converter = of_pattern[next(iter(parts))]
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
        joins = [("Concatenate", 1)] if len(converter.source_patterns) > 1 else []
        if steps != [("MergeModulelist", 0), *joins] or len(converter.target_patterns) != 1:
            raise ValueError(f"{name} is converted")
        rows = [parts[pattern] for pattern in converter.source_patterns]
        direct[name] = [key for expert in zip(*rows, strict=True) for key in expert]
    return direct
