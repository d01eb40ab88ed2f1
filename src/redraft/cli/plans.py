"""Before a command does anything: its first line, and whether the files that it names are there and are safe.

The line says what was asked for, with the counts that can be had without loading anything heavy. It goes to standard
output, where the other lines on what was done go: standard error has the progress, and the one line of an error. A run
directory that holds something already gets a second line, which says what.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from redraft.errors import UserError
from redraft.inputs import loads, read_bytes, read_json
from redraft.places import at_home, without_secrets
from redraft.settings.base import Settings
from redraft.settings.texts import self_prompts

# Larger files are not read only to count their lines.
MOST_BYTES = 100 * 2**20
# Settings that the first line tells even where they are left to their defaults.
TOLD = "method budget scorer temperature temperatures gamma shape limit max_new_tokens out".split()
# What says which prompts are asked, and the settings that only then have a meaning.
ASKED, OF_ANSWERS = ("prompts", "suite", "responses", "prompt"), ("limit", "max_new_tokens")


# -- the first line ----------------------------------------------------------------------------------------------------
def announce(settings: Settings) -> None:
    """Print the lines for a command. What cannot be read is left for the command itself to refuse."""
    try:
        lines = ["; ".join(told(settings)), found(out) if (out := getattr(settings, "out", None)) else ""]
    except Exception:  # a line that fails must not hide what the command says about the same input
        return
    for line in filter(None, lines):
        print(f"{settings.COMMAND}: {without_secrets(line)}", flush=True)


def told(settings: Any) -> Iterator[str]:
    """What was asked for, with counts: what a command cannot do without, what was given, and what matters most."""
    fields = type(settings).model_fields
    asks = any(getattr(settings, name, None) for name in ASKED)
    for name in sorted(fields, key=lambda name: not fields[name].is_required()):
        value = getattr(settings, name)
        default = name in TOLD and (asks or name not in OF_ANSWERS)
        if (name in settings.model_fields_set or default) and value not in (None, (), {}) and value is not False:
            number = counted(str(value)) if name in ("prompts", "responses") else None
            parts = [f"{key}={one}" for key, one in value.items()] if isinstance(value, dict) else value
            text = ", ".join(map(str, parts)) if isinstance(parts, tuple | list) else str(parts)
            text, extra = "" if value is True else text, dict[str, Any](fields[name].json_schema_extra)
            flag = (extra["flag"] or name).lstrip("-").replace("_", "-")
            yield f"{flag} {text}".rstrip() + ("" if number is None else f" ({number:,})")
    longest, number = getattr(settings, "max_new_tokens", 0), counted(str(getattr(settings, "prompts", "")))
    if longest and number:
        drawn = getattr(settings, "temperatures", getattr(settings, "temperature", 0))
        number = min(number, getattr(settings, "limit", number)) * (len(drawn) if isinstance(drawn, tuple) else 1)
        yield f"at most {number * longest:,} tokens of answers where each prompt asks one question"


def counted(source: str) -> int | None:
    """How many prompts or responses a source has; ``None`` where it is not cheap to know."""
    return self_prompts(source) or items(Path(source))


def items(path: Path) -> int | None:
    """How many lines a file has that are not blank, or members its JSON array; ``None`` where nobody knows cheaply."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return None
    try:
        data = read_bytes(path, most=MOST_BYTES)
    except UserError:
        return None
    if data.lstrip()[:1] == b"[":
        return len(loads(data.decode("utf-8-sig")))
    return sum(1 for line in data.splitlines() if line.strip())


# -- what is there already -------------------------------------------------------------------------------------------
ROWS = {"responses.jsonl": "responses", "heldout.jsonl": "held-out responses", "tops.jsonl": "log-probability rows"}
FILES = {
    "pretrain.json": "pretraining",
    "selection.json": "the selection",
    "train.json": "the training",
    "align.json": "the alignment",
    "bench.json": "the benchmark",
    "distill.json": "the whole",
}
CHECKPOINTS = {"train": "training", "pretrain": "pretraining", "align": "alignment"}


def found(out: Path) -> str:
    """What a run directory (or a response file) holds from before; nothing for a new one."""
    place = Path(out) / "run" if (Path(out) / "run").is_dir() else Path(out)
    if not place.exists():
        return ""
    if place.is_file():
        number = items(place) if place.suffix == ".jsonl" else None
        return f"{place} holds {number:,} rows already; they are kept" if number else ""
    there = [f"{n:,} {what}" for file, what in ROWS.items() if (n := items(place / file))]
    there += [f"{what} done" for file, what in FILES.items() if (place / file).is_file()]
    for folder, what in CHECKPOINTS.items():
        state = place / folder / "state.json"
        if state.is_file() and f"{what} done" not in there and f"the {what} done" not in there:
            value = read_json(state, finite=False)
            there.append(f"{what} at step {value['state']['step']:,} of {value['identity']['steps']:,}")
    if cells := sum(1 for _ in place.glob("cells/*/record.json")):
        there.append(f"{cells:,} finished cells")
    if there and (ledger := place / "ledger.json").is_file():
        there.append(f"{read_json(ledger)['total']['seconds'] / 60:.1f} minutes of work")
    return f"{place} holds from before: {', '.join(there)}; it goes on from there" if there else ""


# -- places that settings name -----------------------------------------------------------------------------------------
OUTPUTS = ("out", "keep", "json_out", "full", "png", "report")
FILES_ALONE = ("keep", "json_out", "png", "report")


# What a folder with a model or a draft holds, beside weights, and no command writes as a file of its own.
PARTS_OF_MODELS = ("redraft.json", "config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json")


def refuse_overwriting(settings: Settings) -> None:
    """Raise ``UserError`` where a command would write over something that it reads, or two results over each other."""
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    named = [(name, one) for name, value in values.items() for one in (value if type(value) is tuple else (value,))]
    paths = [(name, Path(one)) for name, one in named if isinstance(one, str | Path)]
    places = [(name, path.resolve()) for name, path in paths if name in OUTPUTS or _exists(path)]
    for (other, there), (name, place) in combinations(places, 2):
        if place == there and (name in OUTPUTS or other in OUTPUTS):
            out, kept = (name, other) if name in OUTPUTS else (other, name)
            flags = f"--{out.replace('_out', '')} and --{kept.replace('_out', '').replace('_', '-')}"
            raise UserError(f"{flags} are both {place}, which would be overwritten; name another file to write")
    for name, path in paths:
        if name in OUTPUTS and _exists(path) and not path.is_file() and (name in FILES_ALONE or not path.is_dir()):
            what = "a folder" if path.is_dir() else "no ordinary file"
            raise UserError(f"--{name.replace('_out', '')} is {path}, {what}; name another file to write")
    for name, place in places:
        if name in OUTPUTS and place.is_file() and any((place.parent / part).is_file() for part in PARTS_OF_MODELS):
            if place.name in PARTS_OF_MODELS or place.suffix == ".safetensors":
                flag = f"--{name.replace('_out', '')}"
                raise UserError(f"{flag} is {place}, a file of a model or a draft; name another file to write")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a text that no file can be called
        return False


INSTEAD = {
    "file": "name a file that is there",
    "prompts": "name a file, or datasets:NAME",
    "model": "name a folder, a hub id or embedded:smollm2-135m-instruct",
}


def check_places(settings: Settings) -> None:
    """Raise ``UserError`` that names every file or folder that is not there. Hub ids are left to the hub."""
    if missing := list(dict.fromkeys(_missing(settings))):
        raise UserError("; ".join(missing))


def _missing(settings: Settings) -> Iterator[str]:
    for name, field in type(settings).model_fields.items():
        extra: Any = field.json_schema_extra
        value = getattr(settings, name)
        for text in map(str, value if isinstance(value, tuple) else (value,)):
            if value is not None and extra["reads"] and not _there(text, extra["reads"]):
                yield f"{text} does not exist; {INSTEAD[extra['reads']]}"


def _there(text: str, kind: str) -> bool:
    """Whether the place is there, as far as its name tells where it would be."""
    if kind == "prompts" and (self_prompts(text) or text.startswith("datasets:")):
        return True
    path = at_home(text)
    if kind == "model" and not path.exists():
        # org/name, or a name alone, may be on the hub
        return text.startswith("embedded:") or not (text.startswith((".", "/", "~")) or text.count("/") > 1)
    return path.exists()
