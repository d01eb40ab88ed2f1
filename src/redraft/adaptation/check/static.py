"""What can be told without computing anything: how the file is read here and by an engine, whether the pair fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from redraft.artifact import read_pickled
from redraft.drafts.files import META_FILE
from redraft.drafts.formats.base import path_warnings, served_name
from redraft.drafts.formats.meaning import Reading, TensorFacts, differences
from redraft.drafts.formats.reading import Checkpoint, weight_files
from redraft.drafts.opening import OpenDraft
from redraft.errors import UserError
from redraft.loading import load_tokenizer, tokenizer_hash
from redraft.registries import FAMILIES
from redraft.shown import value_words
from redraft.target import Facts

# Names that safetensors gives its types.
TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64", "BOOL": "bool"}
# What a field of the meaning is a cause of, where two readers take it in different ways.
CAUSE_OF = {
    "norm_before_residual": "norm_side",
    "norm_output": "norm_side",
    "rope_parameters": "rope_lost",
    "windows": "window_lost",
    "embedding": "embedding_replaced",
    "draft_vocab_size": "map_scrambled",
}
# Trainers that load no exported draft, with the engine that they write theirs for.
WRITES_ALONE = {"modelopt": "tensorrt-llm"}
ADDED_NORMS = ("head_norm", "norm_before_fc", "fc_norm", "qk_norm")


@dataclass(frozen=True)
class Suspicion:
    """A cause that shows without computing, with the evidence. ``sure``: nothing more needs to be tried."""

    cause: str
    evidence: str
    sure: bool = False


@dataclass(frozen=True)
class Line:
    """One thing of the file: what it means here, what to the engine, and on whose word."""

    what: str
    ours: str
    theirs: str
    word: str
    differs: bool = False


@dataclass
class Static:
    """All of it. ``lines`` are the table, ``stops`` why the engine would not load the file at all."""

    reader: str = ""
    lines: list[Line] = field(default_factory=list)
    suspicions: list[Suspicion] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def format_for(opened: OpenDraft | None, engine: str | None) -> str | None:
    """The format whose files ``engine`` is given, of one that reads none that of its own; none where nobody knows.

    A version that is not known here takes the format of those that are.
    """
    if opened is None or not engine:
        return None
    writers = FAMILIES.get(opened.draft.family).writers
    wanted, product = WRITES_ALONE.get(engine, engine), engine.partition("-")[0]
    known = [(name, [*getattr(one, "readers", ())], [*getattr(one, "others", ())]) for name, one in writers.items()]
    steps = (
        lambda readers, others: wanted in readers,
        lambda readers, others: wanted in others,
        lambda readers, others: any(one.partition("-")[0] == product for one in readers),
    )
    return next((name for step in steps for name, readers, others in known if step(readers, others)), None)


# -- the pair --------------------------------------------------------------------------------------------------------
def fits(source: str | Path, target: Facts) -> Suspicion | None:
    """Whether draft and target share a tokenizer, as far as the draft's folder tells; none where they do.

    Raises ``UserError`` where the folder cannot be read.
    """
    checkpoint = Checkpoint.at(source)
    own = tokenizer_hash(target.tokenizer) if target.tokenizer is not None else ""
    told = checkpoint.meta.get("tokenizer_hash")
    if own and told and told != own:
        return Suspicion(
            "other_tokenizer", f"the draft's record names the tokenizer {told}, the target's is {own}", True
        )
    if own and (checkpoint.folder / "tokenizer.json").is_file() and checkpoint.folder != Path():
        found = tokenizer_hash(load_tokenizer(str(checkpoint.folder)))
        if found != own:
            return Suspicion("other_tokenizer", "the tokenizer in the draft's folder is not the target's", True)
    return None


def vocabulary_of(source: str | Path) -> int | None:
    """The vocabulary that a draft's config names; none where it names none."""
    checkpoint = Checkpoint.at(source)
    layer = checkpoint.config.get("transformer_layer_config")
    places = [checkpoint.meta.get("config"), layer, checkpoint.config]
    for place in places:
        for key in ("target_vocab_size", "vocab_size"):
            if isinstance(place, Mapping) and type(place.get(key)) is int:
                return int(place[key])
    return None


def claims(opened: OpenDraft, target: Facts) -> bool:
    """Whether the draft's own record says that it was made for this target: by its hash, else by its name.

    An old draft that a run kept was not, whatever the run's record names.
    """
    guard = opened.meta.get("guard")
    if isinstance(guard, Mapping) and guard.get("kept") == "old":
        return False
    stated = opened.meta.get("target")
    if isinstance(stated, Mapping) and stated.get("hash"):
        return bool(stated["hash"] == target.content_hash())
    named = opened.meta.get("verifier") or (stated or {}).get("name")
    if not isinstance(named, str) or not named or not target.name:
        return False
    return named in (target.name, served_name(target)) or Path(named).name == Path(target.name).name


# -- readings --------------------------------------------------------------------------------------------------------
def look(opened: OpenDraft, target: Facts, engine: str | None) -> Static:
    """The file as it is read here and, where an ``engine`` is named, there. Raises ``UserError``."""
    found, draft = Static(engine or ""), opened.draft
    found.notes += [*opened.meta.get("notes", []), *path_warnings(Path(opened.source))]
    if target.rounding:
        found.notes.append(f"engines that serve this target round {target.rounding}")
    length = getattr(draft.config, "max_position_embeddings", 0)
    if 0 < length < target.context:
        found.notes.append(f"the draft is made for {length} positions, the target for {target.context}")
    family = FAMILIES.get(draft.family)
    ours = family.meaning(draft.config)
    words = _words(opened.meta.get("reading"))
    if engine is None:
        found.lines = [Line(what, value_words(value), "", words.get(what, "")) for what, value in ours.items()]
        return found
    if engine not in family.readers:
        known = f"known are {', '.join(family.readers)}" if family.readers else "no engine's reading of them is"
        raise UserError(
            f"how {engine} reads {draft.family} drafts is not known here, {known}; --prompts measures the draft instead"
        )
    checkpoint = Checkpoint.at(opened.source)
    if checkpoint.meta:
        found.stops.append(f"the folder holds {META_FILE}, redraft's own format, which no engine loads")
        found.suspicions.append(Suspicion("refused", found.stops[0], True))
        found.lines = [Line(what, value_words(value), "", words.get(what, "")) for what, value in ours.items()]
        return found
    theirs: Reading = family.readers[engine](checkpoint.config, tensor_facts(checkpoint.folder), target)
    found.reader = theirs.reader
    there = {entry.what: entry for entry in theirs.entries}
    apart = {one.what for one in differences(ours, theirs)}
    for what, value in ours.items():
        entry = there.get(what)
        told = value_words(theirs.meaning.get(what, "-"))
        how = f"{entry.how}: {entry.word}" if entry else words.get(what, "")
        found.lines.append(Line(what, value_words(value), told, how, what in apart))
    found.lines += [
        Line(entry.what, "read", "dropped", entry.word, True)
        for entry in theirs.entries
        if entry.how == "dropped" and entry.what not in ours
    ]
    found.stops = list(theirs.stops)
    found.notes += [f"{theirs.reader}: {text}" for text in (*theirs.silent, *theirs.notes)]
    if theirs.stops:
        found.suspicions.append(Suspicion("refused", "; ".join(theirs.stops), True))
    for one in differences(ours, theirs):
        said = f"{theirs.reader} takes {one.what} as {value_words(one.theirs)}, "
        said += f"it was trained with {value_words(one.ours)}"
        found.suspicions.append(Suspicion(cause_of(one.what, one.ours, one.theirs), said))
    return found


def cause_of(what: str, ours: Any, theirs: Any) -> str:
    """The cause that a field is, which an engine takes as ``theirs`` while the draft was trained with ``ours``."""
    if what == "taps":
        return layers_cause(ours, theirs)
    if what in ADDED_NORMS:
        return "norm_missing" if ours else "norm_extra"
    return CAUSE_OF.get(what, "misread")


def layers_cause(ours: Any, theirs: Any) -> str:
    """How two lists of layers differ."""
    mine, other = list(ours), list(theirs)
    if sorted(mine) == sorted(other):
        return "layers_in_other_order"
    steps = {a - b for a, b in zip(mine, other, strict=False)}
    return "layers_off_by_one" if len(mine) == len(other) and steps in ({1}, {-1}) else "other_layers"


def _words(reading: Any) -> dict[str, str]:
    return {e.what: f"{e.how}: {e.word}" for e in reading.entries} if isinstance(reading, Reading) else {}


def tensor_facts(folder: Path) -> dict[str, TensorFacts]:
    """Types and shapes of the tensors in a checkpoint, from the headers of its files. Raises ``UserError``."""
    found: dict[str, TensorFacts] = {}
    for path in weight_files(folder):
        if path.suffix == ".bin":
            for name, tensor in read_pickled(path).items():
                found[name] = TensorFacts(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            continue
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - a handle, not a mapping
                    part = file.get_slice(name)
                    kind = part.get_dtype()
                    found[name] = TensorFacts(TYPES.get(kind, kind.lower()), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); copy or download it again") from error
    return found
