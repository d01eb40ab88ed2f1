"""Writing EAGLE drafts: a config.json with a Llama's keys, and safetensors, one tensor after the other.

Shared by the families. What a format's engines make of a file is read off it before anything is written: a draft that
one of them would compute in another way is refused by the name of what differs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from redraft.artifact import check_tensors, dtype_name, holds_tensors, tensors_bytes, write_tensors
from redraft.drafts.eagle.module import EagleDraft
from redraft.drafts.formats.base import (
    CARD_FILE,
    CONFIG_FILE,
    MARK,
    WEIGHTS_FILE,
    ExportReport,
    only_over,
    path_warnings,
)
from redraft.drafts.formats.embeddings import TABLE
from redraft.drafts.formats.meaning import Difference, Reading, TensorFacts, differences
from redraft.drafts.formats.reading import Checkpoint
from redraft.errors import UserError
from redraft.files import atomic_folder, atomic_write_json
from redraft.pieces import Pieced, Table, pieces, table
from redraft.registries import FAMILIES
from redraft.target import Facts

# Numbers by which a tensor is told.
FIRST = 4096
EXPORTED_FILES = {CONFIG_FILE, WEIGHTS_FILE, CARD_FILE}

# Fields of the layers that a Llama's config has under the same name, but for ``target_``.
LAYER_FIELDS = (
    "target_vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
)

# Rotary types whose angles do not depend on max_position_embeddings, so that it may be raised.
FREE_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Dense:
    """A draft without private parts as it is written: its config, and its tensors by our names, made when asked for.

    ``extra`` are tensors of the file that the draft does not have: a copy of the target's embedding, maps of a whole
    vocabulary onto itself.
    """

    config: Any
    state: Mapping[str, Tensor]
    extra: Mapping[str, Tensor | Table] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return self.state["fc.weight"].dtype

    @cached_property
    def facts(self) -> dict[str, TensorFacts]:
        """Types and shapes of all tensors, looked up once."""
        return {name: _facts(self.table(name)) for name in (*self.state, *self.extra)}

    def table(self, name: str) -> Table | Tensor:
        """A tensor of the file, unmade where it must be made."""
        return self.extra[name] if name in self.extra else table(self.state, name)

    def changed(self, config: Any, tensors: Mapping[str, Tensor | None]) -> Dense:
        """With these tensors in place of its own; none takes one away."""
        return Dense(config, Changed(self.state, tensors), self.extra)

    def with_extra(self, tensors: Mapping[str, Tensor | Table]) -> Dense:
        return Dense(self.config, self.state, {**self.extra, **tensors})


def _facts(tensor: Tensor | Table) -> TensorFacts:
    return TensorFacts(dtype_name(tensor.dtype), tuple(tensor.shape))


class Changed(Pieced):
    """A mapping with some entries replaced, added or, where they are none, taken away."""

    def __init__(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor | None]) -> None:
        self.old, self.new = old, {name: tensor for name, tensor in new.items() if tensor is not None}
        self.names = [n for n in old if n not in new] + list(self.new)

    def table(self, name: str) -> Table | Tensor:
        """See :class:`~redraft.pieces.Pieced`."""
        return self.new[name] if name in self.new else table(self.old, name)

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Renamed(Pieced):
    """The tensors of a file: each of ``names`` with the name that it has in ``dense``."""

    def __init__(self, dense: Dense, names: Mapping[str, str]) -> None:
        self.dense, self.names = dense, dict(names)

    def table(self, name: str) -> Table | Tensor:
        """See :class:`~redraft.pieces.Pieced`."""
        return self.dense.table(self.names[name])

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class LayerWriter(ABC):
    """A format of such drafts: a :class:`redraft.drafts.formats.base.Writer`. A family says what its files hold.

    ``readers`` are those that the format is for: all of them must take the file as the draft is. ``others`` load it
    too: what they would compute otherwise is noted.
    """

    family: ClassVar[str]
    trains: ClassVar[bool] = False
    """Whether the format is for training on, rather than for an engine."""

    def __init__(
        self,
        name: str,
        method: str,
        readers: tuple[str, ...],
        others: tuple[str, ...] = (),
        warns: bool = False,
        trainer: str | None = None,
    ) -> None:
        """``method`` is what the engine calls the way in which it drafts; ``warns`` of paths that tell it another.

        ``trainer`` is on whose word the file means what it says, where it does not tell itself.
        """
        self.name, self.method, self.readers, self.others, self.warns = name, method, readers, others, warns
        self.trainer = trainer

    # -- what a family says ----------------------------------------------------------------------------------------
    @abstractmethod
    def read_as(self, reader: str, config: Any, tensors: Mapping[str, TensorFacts], target: Facts) -> Reading:
        """What ``reader`` makes of a file."""

    @abstractmethod
    def meaning(self, config: Any) -> dict[str, Any]:
        """What a draft of this config means, in the same terms."""

    @abstractmethod
    def fitted(self, dense: Dense, target: Facts) -> tuple[Dense, list[str]]:
        """An equal draft in the form that the readers know, and notes: biases of zeros added or left out.

        Raises ``UserError`` for a draft that no file tells, whoever reads it.
        """

    @abstractmethod
    def config(self, dense: Dense, target: Facts, tokens: int) -> dict[str, Any]:
        """The whole config.json."""

    @abstractmethod
    def names(self, dense: Dense) -> dict[str, str]:
        """The file's tensors by the format's names, each with the name that it has in ``dense``."""

    @abstractmethod
    def serve(self, dense: Dense, folder: Path, target: Facts, tokens: int) -> str:
        """The command that loads the file."""

    def told(self, difference: Difference, dense: Dense) -> bool:
        """Whether the reader is told so elsewhere, by the command or by what the target lends."""
        return False

    # -- writing ---------------------------------------------------------------------------------------------------
    def check(self, draft: EagleDraft, target: Facts) -> tuple[Dense, list[str]]:
        """The draft as the format's readers compute it, and notes. Raises ``UserError`` where one would not."""
        dense, notes = prepare(draft, target)
        dense, more = self.fitted(dense, target)
        for reader in self.readers:
            name, faults, said = self.faults(reader, dense, target)
            if faults:
                raise UserError(f"{name} cannot run this draft: {'; '.join(faults)}; {self.elsewhere(draft, target)}")
            more += [note for note in said if note not in more]
        for reader in self.others:
            name, faults, said = self.faults(reader, dense, target)
            more += [f"not for {name}: {'; '.join(faults)}"] if faults else said
        return dense, notes + more

    def faults(self, reader: str, dense: Dense, target: Facts) -> tuple[str, list[str], list[str]]:
        """The reader's name; what it would compute otherwise, or why it would not start, in words; and its notes."""
        facts = {name: dense.facts[ours] for name, ours in self.names(dense).items()}
        reading = self.read_as(reader, self.config(dense, target, 1), facts, target)
        found = [d for d in differences(self.meaning(dense.config), reading) if not self.told(d, dense)]
        named = [in_words(d) + (f" ({reading.mends[d.what]})" if d.what in reading.mends else "") for d in found]
        return reading.reader.split(" ")[0], list(reading.stops) + named, list(reading.notes)

    def elsewhere(self, draft: EagleDraft, target: Facts) -> str:
        """What would help: the formats whose readers take this draft."""
        held = list[str]()
        for name, writer in FAMILIES.get(self.family).writers.items():
            if name != self.name and isinstance(writer, LayerWriter):
                held += [name] if writer.holds(draft, target) else []
        return f"export it as {' or '.join(held)} instead" if held else "no format of an engine holds it"

    def holds(self, draft: EagleDraft, target: Facts) -> bool:
        """Whether the readers of this format take the draft as it is."""
        try:
            dense = self.fitted(prepare(draft, target)[0], target)[0]
            return not any(self.faults(reader, dense, target)[1] for reader in self.readers)
        except UserError:
            return False

    def write(self, dense: Dense, folder: Path, target: Facts, tokens: int) -> ExportReport:
        """Write config and weights, read them back as any checkpoint is read, and only then put the folder in place.

        Raises ``UserError`` on a full disk or a folder that holds other files, and ``RuntimeError`` when reading does
        not give the same draft (a defect of ours).
        """
        written, config = Renamed(dense, self.names(dense)), self.config(dense, target, tokens)
        with atomic_folder(folder, tensors_bytes(written), EXPORTED_FILES, only_over(self.name, config)) as new:
            write_tensors(new / WEIGHTS_FILE, written, {MARK: self.name})
            atomic_write_json(new / CONFIG_FILE, config)
            self.read_back(new, dense, target)
        parameters = sum(math.prod(dense.facts[n].shape) for n in dense.state if n not in ("d2t", "t2d"))
        warnings = path_warnings(folder.absolute()) if self.warns else []
        serve, size = self.serve(dense, folder, target, tokens), tensors_bytes(written)
        copied = dense.extra[TABLE].nbytes if TABLE in dense.extra else 0
        notes = tuple(warnings)
        return ExportReport(
            self.name, folder, len(written), parameters, size, serve, notes, trains=self.trains, copied=copied
        )

    def read_back(self, folder: Path, dense: Dense, target: Facts) -> None:
        """The draft in ``folder`` must be this one, down to every bit. Raises ``RuntimeError``.

        The file is compared piece by piece, and what our own reader makes of it by name, shape and first numbers: a
        second draft in memory is none of the price.
        """
        family, checkpoint = FAMILIES.get(self.family), Checkpoint.at(folder)
        options: dict[str, Any] = {"trainer": self.trainer} if self.trainer else {}
        back = family.read(checkpoint, target, [], values=False, **options)[0]
        theirs = replace(back.config, own_embedding=dense.config.own_embedding)
        found = {name: tensor for name, tensor in back.state_dict().items() if name in dense.state}
        same = self.meaning(theirs) == self.meaning(dense.config) and found.keys() == dense.state.keys()
        same = same and family.recognises(checkpoint) and all(_begin(found[n], dense.table(n)) for n in found)
        if not same or not holds_tensors(folder / WEIGHTS_FILE, Renamed(dense, self.names(dense))):
            raise RuntimeError(f"the {self.name} export does not read back as the draft that was written")


def _begin(one: Tensor, other: Tensor | Table) -> bool:
    """Whether two tensors are alike in type and shape and begin with the same numbers."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    few = min(FIRST, one.numel())
    first = next((piece for piece in pieces(other) if len(piece)), torch.empty(0))[:few]
    return torch.equal(one.reshape(-1)[: len(first)].cpu(), first)


def in_words(difference: Difference) -> str:
    """A field that the reader takes otherwise."""
    what, ours, theirs = difference.what, difference.ours, difference.theirs
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
        parts = [f"{key} {ours.get(key)!r} is taken as {theirs.get(key)!r}" for key in keys]
        return f"{what}: {', '.join(parts)}"
    return f"{what} {shown(ours)} is taken as {shown(theirs)}"


def shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)


# -- checks ----------------------------------------------------------------------------------------------------------
def prepare(draft: EagleDraft, target: Facts) -> tuple[Dense, list[str]]:
    """A dense draft that fits ``target`` and is sound in every tensor, and notes. Raises ``UserError``.

    Its ``max_position_embeddings`` are raised to the target's where that changes no angle, and refused elsewhere.
    """
    state = draft.dense_state()
    config, context = draft.config.dense(), int(target.config.max_position_embeddings)
    config.check_fit(target)
    check_tensors(state, state, "the draft to be exported")
    if config.max_position_embeddings >= context:
        return Dense(config, state), []
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in FREE_ROPE_TYPES:
        raise UserError(
            f"the draft covers {config.max_position_embeddings} positions and the target {context}; raising it "
            f"would change the {kind} rotary angles, so train the draft with the target's length"
        )
    note = f"max_position_embeddings was raised from {config.max_position_embeddings} to the target's {context}"
    return Dense(replace(config, max_position_embeddings=context), state), [note]


# -- biases ----------------------------------------------------------------------------------------------------------
def layers_of(config: Any) -> list[str]:
    """The decoder layers by our names."""
    return ["midlayer", *(f"later.{number}" for number in range(config.num_layers - 1))]


def output_biased(config: Any) -> bool:
    return bool(config.attention_bias if config.output_bias is None else config.output_bias)


def with_biases(dense: Dense, *, attention: bool, output: bool) -> Dense:
    """An equal draft whose attention has these biases: zeros where it has none, none where it has zeros.

    As it is where that cannot be, which the reader's difference then tells.
    """
    config, tensors, state = dense.config, dict[str, Tensor | None](), dense.state
    has = {"attention": bool(config.attention_bias), "output": output_biased(config)}
    wants = {"attention": attention, "output": output}
    for part, letters in (("attention", "qkv"), ("output", "o")):
        places = [f"{layer}.self_attn.{letter}_proj" for layer in layers_of(config) for letter in letters]
        if has[part] == wants[part]:
            continue
        if wants[part]:
            tensors |= {f"{place}.bias": torch.zeros_like(state[f"{place}.weight"][:, 0]) for place in places}
        elif any(bool(state[f"{place}.bias"].any()) for place in places):
            continue
        else:
            tensors |= {f"{place}.bias": None for place in places}
        has[part] = wants[part]
    told = None if has["output"] == has["attention"] else has["output"]
    if not tensors:
        return dense
    return dense.changed(replace(config, attention_bias=has["attention"], output_bias=told), tensors)


def with_fc_bias(dense: Dense, wanted: bool) -> Dense:
    """An equal draft with a bias of ``fc``, of zeros, or without one of zeros."""
    config, state = dense.config, dense.state
    if config.fc_bias == wanted or (config.fc_bias and bool(state["fc.bias"].any())):
        return dense
    new = torch.zeros_like(state["fc.weight"][:, 0]) if wanted else None
    return dense.changed(replace(config, fc_bias=wanted), {"fc.bias": new})


# -- config.json -----------------------------------------------------------------------------------------------------
def layer_config(config: Any) -> dict[str, Any]:
    """The keys that describe the decoder layers in the terms of a Hugging Face config, none left to defaults."""
    found = {ours.removeprefix("target_"): getattr(config, ours) for ours in LAYER_FIELDS} | {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "num_hidden_layers": config.num_layers,
        "hidden_act": "silu",
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    if any(config.reach):
        kinds = ["sliding_attention" if window else "full_attention" for window in config.reach]
        found |= {"layer_types": kinds, "sliding_window": max(config.reach)}
        found |= {"use_sliding_window": True} if config.qk_norm else {}
    return found


def legacy_config(dense: Dense, architecture: str) -> dict[str, Any]:
    """The keys of a config.json that is a Llama's.

    Its rotary settings are ``rope_theta`` and ``rope_scaling``, which older engines read and newer ones turn into
    ``rope_parameters``; a share of each head that alone is turned stands beside them too, where some look for it.
    """
    rest = dict(dense.config.rope_parameters)
    theta = rest.pop("rope_theta", 10000.0)
    plain = rest.get("rope_type", "default") == "default" and set(rest) <= {"rope_type"}
    part = {key: rest[key] for key in ("partial_rotary_factor",) if key in rest}
    return {
        "architectures": [architecture],
        **layer_config(dense.config),
        "rope_theta": theta,
        "rope_scaling": None if plain else rest,
        **part,
        "torch_dtype": dtype_name(dense.dtype),
    }


def numbered(name: str) -> str:
    """A tensor's name in formats that number their layers: ``midlayer`` is ``layers.0``, ``later.0`` ``layers.1``."""
    if name.startswith("later."):
        _, number, rest = name.split(".", 2)
        return f"layers.{int(number) + 1}.{rest}"
    return name.replace("midlayer.", "layers.0.", 1)
