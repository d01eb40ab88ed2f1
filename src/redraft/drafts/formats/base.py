"""What every format shares: the entry that the registry holds, the report, serve commands.

A format is what an engine loads. ``EXPORTERS`` holds one :class:`Format` for each, which any draft may be given: it
asks the draft's family for the writer (``Family.writers``). A writer gives a complete checkpoint or raises
``UserError`` and leaves nothing behind: engines fill what is absent with zeros or noise and say nothing, so
completeness is checked here. A format of one family is filed beside its writer, those of several are filed here.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from redraft.artifact import read_json
from redraft.errors import UserError
from redraft.loading.places import split_name
from redraft.registries import EXPORTERS, FAMILIES
from redraft.shown import Shown, lines
from redraft.target import Facts

# The folder that an adapter's target is told to be merged into.
MERGED = "merged-target"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

# The key in a weight file's header under which an export says its format, and the line of a model card that says it.
MARK = "redraft"
CARD_FILE, CARD_LINE = "README.md", re.compile(r"^- Files: format `([\w-]+)`$", re.M)
# The keys of a config.json by which an export that does not say its format is told from the checkpoint of others.
TELLING = ("architectures", "speculators_model_type", "hidden_size", "num_hidden_layers", "draft_vocab_size")

# Parts of a path that change which speculative method vLLM takes the draft for.
TELLING_PATH_PARTS = ("eagle-", "eagle3", "dflash", "dspark")


@dataclass(frozen=True)
class ExportReport(Shown):
    """What was written, and what the reader should know.

    ``serve`` is the command that loads it, of a format to go on training in (``trains``) that which trains on.
    ``copied`` are the bytes of a copy of the target's embedding, which the format wants and the draft does not have.
    """

    format: str
    folder: Path
    tensors: int
    parameters: int
    bytes: int
    serve: str
    warnings: tuple[str, ...] = ()
    merged_private: bool = False
    trains: bool = False
    copied: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "folder": str(self.folder), "warnings": list(self.warnings)}

    def __rich__(self) -> Any:
        size = f"{self.folder}: {self.parameters:,} parameters, {self.bytes / 1e6:.1f} MB"
        if self.copied:
            copied = f"{self.copied / 1e6:.1f} MB are a copy of the target's embedding and no part of the draft"
            size += f", of which {copied}"
        return lines(*(f"note: {warning}" for warning in self.warnings), size, f"{self.use} with: {self.serve}")

    @property
    def use(self) -> str:
        """What ``serve`` does, in words."""
        return "go on training" if self.trains else "serve"


class Writer(Protocol):
    """How the drafts of one family are written in one format.

    One whose file holds the target's tokenizer says so by ``holds_tokenizer``.
    """

    def check(self, draft: Any, target: Facts) -> tuple[Any, list[str]]:
        """The dense draft as the format's engine computes it, and notes. Raises ``UserError``; writes nothing."""

    def write(self, dense: Any, folder: Path, target: Facts, tokens: int) -> ExportReport:
        """Write what :meth:`check` gave, whole or not at all. Raises ``UserError``."""


def exported_as(folder: Path) -> str | None:
    """The format in which ``folder`` was exported, by the header of its weights or by its card; none if nobody says."""
    try:
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            marked: str | None = (file.metadata() or {}).get(MARK)
        card = (folder / CARD_FILE).read_text(encoding="utf-8") if marked is None else ""
    except (SafetensorError, OSError, UnicodeDecodeError):
        return None
    told = CARD_LINE.search(card)
    return marked or (told[1] if told else None)


def only_over(name: str, config: Mapping[str, Any]) -> Callable[[Path], None]:
    """The check of a folder that an export in the format ``name`` would replace: only an earlier one in that format.

    Exports of older versions do not say what they are: they are told by the ``config`` that is now written. The check
    raises ``UserError``.
    """

    def check(folder: Path) -> None:
        found, path = exported_as(folder), folder / CONFIG_FILE
        if found is None and path.is_file():
            there = read_json(path)
            alike = all(there.get(key) == config.get(key) for key in TELLING) and "speculators_version" not in there
            found = name if alike else None
        if found != name:
            what = f"a draft that was exported as {found}" if found else f"files that are no {name} export of redraft"
            raise UserError(f"{folder} holds {what}; name a new or empty folder")

    return check


def needs_tokenizer(name: str, family: str) -> bool:
    """Whether the target's tokenizer goes into what the exporter ``name`` writes of a draft of this family.

    A draft that is a language model of its own must speak as the target does in every format.
    """
    entry, known = EXPORTERS.get(name), FAMILIES.get(family)
    writer = known.writers.get(name) if isinstance(entry, Format) else None
    return not known.reads_states or getattr(writer, "holds_tokenizer", False)


class Format:
    """An exporter: ``EXPORTERS.get(name)(draft, folder, target)`` writes a draft of any family that has this format."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, draft: Any, folder: str | Path, target: Facts, *, speculative_tokens: int = 5) -> ExportReport:
        """Write the draft, private parts merged, for ``target``, of which the facts are read.

        ``speculative_tokens`` is the draft length that the engine takes by default, or that the report's command
        names. Raises ``UserError`` where the draft does not fit the target, is incomplete, or the engine would
        compute another; nothing is left behind then.
        """
        dense, notes = self.check(draft, target, speculative_tokens)
        report = self.writer(draft.family).write(dense, Path(folder), target, speculative_tokens)
        merged = bool(draft.config.private_width or draft.config.low_rank)
        return replace(report, merged_private=merged, warnings=(*notes, *report.warnings))

    def check(self, draft: Any, target: Facts, speculative_tokens: int = 5) -> tuple[Any, list[str]]:
        """The dense draft to be written, and notes. Raises ``UserError`` wherever writing would; writes nothing."""
        writer = self.writer(draft.family)
        if speculative_tokens < 1:
            raise UserError(f"speculative tokens must be 1 or more, not {speculative_tokens}")
        dense, notes = writer.check(draft, target)
        merged, config = [], draft.config
        if config.private_width:
            merged.append(f"private experts of width {config.private_width} were merged into the MLPs")
        if config.low_rank:
            merged.append(f"the low-rank updates (rank {config.low_rank}) were merged into their matrices")
        return dense, merged + notes

    def writer(self, family: str) -> Writer:
        """How drafts of this family are written. Raises ``UserError`` where they are not."""
        known = FAMILIES.get(family)
        if self.name not in known.writers:
            raise UserError(known.refusal.format(format=self.name))
        writer: Writer = known.writers[self.name]
        return writer


# Written out: names are read from this file's text.
EXPORTERS.register("vllm")(Format("vllm"))
EXPORTERS.register("plain")(Format("plain"))
EXPORTERS.register("sglang")(Format("sglang"))
EXPORTERS.register("specforge")(Format("specforge"))
EXPORTERS.register("tensorrt-llm")(Format("tensorrt-llm"))
EXPORTERS.register("gguf")(Format("gguf"))


def check_formats(names: Sequence[str], family: str) -> None:
    """Raise ``UserError`` for a format that there is not, or that holds no draft of this family."""
    for entry in map(EXPORTERS.get, names):
        if isinstance(entry, Format):
            entry.writer(family)


def check_export(name: str, draft: Any, target: Facts, speculative_tokens: int = 5) -> None:
    """Raise ``UserError`` where the exporter ``name`` would refuse this draft, before anything is spent on it."""
    entry = EXPORTERS.get(name)
    if isinstance(entry, Format):
        entry.check(draft, target, speculative_tokens)


def path_warnings(folder: Path) -> list[str]:
    """vLLM guesses the method from the draft's path when none is given."""
    found = [part for part in TELLING_PATH_PARTS if part in str(folder).lower()]
    if not found:
        return []
    return [f"vLLM reads a method out of the {', '.join(found)} in this path; give the method or rename the folder"]


def served_name(target: Facts) -> str:
    """What an engine is told to serve: the target's name, and where that is an adapter the folder that it is merged
    into (`redraft merge-target`), since the base's name would be another model and an adapter is none by itself."""
    return target.name if not target.name or split_name(target.name)[1] is None else MERGED


def serve_command(folder: Path, target: Facts, tokens: int, method: str, engine: str = "vllm") -> str:
    """The command of vLLM, or of SGLang, that serves the target with this draft."""
    if engine == "sglang":
        words = ["python", "-m", "sglang.launch_server", "--model-path", target.name]
        words += ["--speculative-algorithm", method, "--speculative-draft-model-path", str(folder)]
        words += ["--speculative-num-steps", str(tokens), "--speculative-eagle-topk", "1"]
        return shlex.join([*words, "--speculative-num-draft-tokens", str(tokens + 1)])
    draft = json.dumps({"model": str(folder), "method": method, "num_speculative_tokens": tokens})
    return shlex.join(["vllm", "serve", target.name, "--speculative-config", draft])
