"""The first line of every command: what will be done, with the counts that can be had without loading anything heavy.

It goes to standard output, where the other lines on what was done go: standard error has the progress, and the one line
of an error. A run directory that holds something already gets a second line, which says what.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redraft.errors import UserError
from redraft.places import without_secrets
from redraft.settings.base import Settings
from redraft.settings.texts import self_prompts

# Larger files are not read only to count their lines.
MOST_BYTES = 100 * 2**20


def announce(settings: Settings) -> None:
    """Print the lines for a command. What cannot be read is left for the command itself to refuse."""
    command = settings.COMMAND
    try:
        lines = [PLANS[command](settings), found(getattr(settings, "out", None))]
    except Exception:  # a plan that fails must not hide what the command says about the same input
        return
    for line in filter(None, lines):
        print(f"{command}: {without_secrets(line)}", flush=True)


OUTPUTS = ("out", "keep", "json_out", "full", "png", "report")


def refuse_overwriting(settings: Settings) -> None:
    """Raise ``UserError`` where a command would write over something that it reads, or two results over each other."""
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    named = [(name, one) for name, value in values.items() for one in (value if type(value) is tuple else (value,))]
    paths = [(name, Path(one)) for name, one in named if isinstance(one, str | Path)]
    places = [(name, path.resolve()) for name, path in paths if name in OUTPUTS or _exists(path)]
    for at, (name, place) in enumerate(places):
        for other, there in places[:at]:
            if place == there and (name in OUTPUTS or other in OUTPUTS):
                out, kept = (name, other) if name in OUTPUTS else (other, name)
                flags = f"--{out.replace('_out', '')} and --{kept.replace('_out', '').replace('_', '-')}"
                raise UserError(f"{flags} are both {place}, which would be overwritten; name another file to write")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a text that no file can be called
        return False


# -- counting --------------------------------------------------------------------------------------------------------
def counted(source: Any, what: str, most: int | None = None) -> str:
    """``40 prompts of prompts.jsonl``, without the number where it is not cheap to know; at ``most`` so many."""
    text = str(source)
    if count := self_prompts(text):
        return f"{count} questions that the target writes itself"
    number = items(Path(text))
    if number is None:
        return f"{what} of {text}" if most is None else f"at most {most} {what} of {text}"
    return f"{number:,} {what} of {text}" if most is None else f"{min(number, most):,} of {number:,} {what} of {text}"


def items(path: Path) -> int | None:
    """How many lines a file has that are not blank, or members its JSON array; ``None`` where nobody knows cheaply."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return None
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data.lstrip()[:1] == b"[":
        return len(json.loads(data))
    return sum(1 for line in data.splitlines() if line.strip())


def asked(s: Any) -> str:
    """The prompts of a command that takes files, suites and a limit."""
    if s.prompts and not s.suite:
        return counted(s.prompts, "prompts", s.limit)
    return f"at most {s.limit} prompts each of {several([*filter(None, [s.prompts]), *s.suite])}"


def several(values: Any) -> str:
    return ", ".join(map(str, values))


def target(s: Any) -> str:
    return f"{s.target}{' + ' + s.adapter if s.adapter else ''}"


def text(s: Any) -> str:
    return counted(s.responses, "responses") if s.responses else counted(s.prompts, "prompts")


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


def found(out: Any) -> str:
    """What a run directory (or a response file) holds from before; nothing for a new one."""
    place = Path(str(out)) if out is not None else None
    if place is not None and (place / "run").is_dir():
        place = place / "run"
    if place is None or not place.exists():
        return ""
    if place.is_file():
        number = items(place) if place.suffix == ".jsonl" else None
        return f"{place} holds {number:,} rows already; they are kept" if number else ""
    there = [f"{n:,} {what}" for file, what in ROWS.items() if (n := items(place / file))]
    there += [f"{what} done" for file, what in FILES.items() if (place / file).is_file()]
    for folder, what in CHECKPOINTS.items():
        state = place / folder / "state.json"
        if state.is_file() and f"{what} done" not in there and f"the {what} done" not in there:
            value = json.loads(state.read_text())
            there.append(f"{what} at step {value['state']['step']:,} of {value['identity']['steps']:,}")
    if cells := sum(1 for _ in place.glob("cells/*/record.json")):
        there.append(f"{cells:,} finished cells")
    if there and (ledger := place / "ledger.json").is_file():
        there.append(f"{json.loads(ledger.read_text())['total']['seconds'] / 60:.1f} minutes of work")
    return f"{place} holds from before: {', '.join(there)}; it goes on from there" if there else ""


# -- one line a command ----------------------------------------------------------------------------------------------
def _regenerate(s: Any) -> str:
    number = items(Path(s.prompts))
    total = number * len(s.temperature) * s.max_new_tokens if number else 0
    most = f" = at most {total:,} tokens where each asks one question" if total else ""
    return (
        f"{counted(s.prompts, 'prompts')}, answered by {f'the server {s.server}' if s.server else target(s)} at "
        f"temperature {several(s.temperature)}, at most {s.max_new_tokens} tokens each{most}, into {s.out}"
    )


def _adapt(s: Any) -> str:
    steps = ["take served responses" if s.responses else "answer", "train", "export", "measure", "write the page"]
    if s.budget != "100%":
        steps.insert(0 if s.select_on == "prompts" else 1, f"select {s.budget}")
    return f"{text(s)}; {several(steps)}; {target(s)} with the draft {s.draft}; run directory {s.out}"


def _distill(s: Any) -> str:
    begin = f"the drafter {s.draft}" if s.draft else f"a new drafter, pretrained on {several(s.text)}"
    return f"{begin}, aligned with {target(s)} on its answers to {text(s)}; run directory {s.out}"


def _train(s: Any) -> str:
    what = f"{s.method} of the draft {s.draft}" if s.draft else "a new draft"
    times = f"{s.train_config().epochs:g} times {counted(s.responses, 'responses')}"
    return f"{what} for {target(s)}, trained on {times}; run directory {s.out}"


def _probe(s: Any) -> str:
    beside = f" and by {s.base_target} for comparison" if s.base_target else ""
    most = f"at most {s.max_new_tokens} tokens each"
    return f"the draft {s.draft} on {asked(s)}, answered by {target(s)}{beside}, {most}; chain of {s.gamma}"


def _bench(s: Any) -> str:
    measured = f"{several(s.server or s.draft)} and plain decoding of {target(s)}"
    return f"{measured} on {asked(s)}, at most {s.max_new_tokens} tokens each, {s.shape}, into {s.out}"


def _vocabulary(s: Any) -> str:
    does = f"refreshed into {s.out}" if s.refresh else "looked at"
    return f"the vocabulary of {s.draft} against {counted(s.responses, 'responses')} of {target(s)}, {does}"


def _study(s: Any) -> str:
    if s.tables:
        return f"tables and pictures of {s.tables}"
    return f"the cells of {s.config}" + (", listed" if s.list_cells else f"; folder {s.out}")


def _watch(s: Any) -> str:
    what = counted(s.prompts, "prompts", s.limit) if s.prompts else "one prompt"
    most = f"at most {s.max_new_tokens} tokens{' each' if s.prompts and s.limit > 1 else ''}"
    return f"{what}, answered by {target(s)} with the draft {s.draft}, {s.shape}, {most}"


PLANS: dict[str, Callable[[Any], str]] = {
    "adapt": _adapt,
    "bench": _bench,
    "distill": _distill,
    "export": lambda s: f"{s.draft} for {s.target} in the format {s.format}, written to {s.out}",
    "merge": lambda s: f"{s.private} (scale {s.scale:g}) into {s.base_draft}, written to {s.out}",
    "merge-target": lambda s: f"the adapter {s.adapter} into {s.target}, written to {s.out}",
    "probe": _probe,
    "quickstart": lambda s: (
        "344 maths problems answered, a draft trained on them, measured on 16 others; about ten minutes on two cores; "
        f"folder {s.out}"
    ),
    "regenerate": _regenerate,
    "report": lambda s: f"{several(s.results)} as one page, {s.out}",
    "select": lambda s: f"{s.budget} of {text(s)}, scored by {s.scorer}, into {s.out}",
    "study": _study,
    "train": _train,
    "vocabulary": _vocabulary,
    "watch": _watch,
}
