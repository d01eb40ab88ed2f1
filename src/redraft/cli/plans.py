"""The first line of every command: what will be done, with the counts that can be had without loading anything heavy.

It goes to standard output, where the other lines on what was done go: standard error has the progress, and the one line
of an error. A run directory that holds something already gets a second line, which says what.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from redraft.errors import UserError
from redraft.redacted import without_secrets

# Larger files are not read only to count their lines.
MOST_BYTES = 100 * 2**20
Given = Mapping[str, Any]


def announce(command: str, given: Given) -> None:
    """Print the lines for ``command``. What cannot be read is left for the command itself to refuse."""
    try:
        if command in ("adapt", "distill") and given.get("config") is not None:
            from redraft.adaptation.yamlfile import read_yaml

            values = read_yaml(Path(given["config"]), "settings")
            flags = {name: value for name, value in given.items() if value not in (None, [], ())}
            given = {**given, **{name.replace("-", "_"): value for name, value in values.items()}, **flags}
        lines = [PLANS[command](given), found(given.get("out"))] if command in PLANS else []
    except Exception:  # a plan that fails must not hide what the command says about the same input
        return
    for line in filter(None, lines):
        print(f"{command}: {without_secrets(line)}", flush=True)


OUTPUTS = ("out", "keep", "json_out", "full")


def refuse_overwriting(given: Given) -> None:
    """Raise ``UserError`` where a command would write over something that it reads, or two results over each other."""
    named = {name: value if isinstance(value, list | tuple) else [value] for name, value in given.items()}
    paths = [(name, Path(str(v))) for name, values in named.items() for v in values if isinstance(v, str | Path)]
    places = [(name, path.resolve()) for name, path in paths if name in OUTPUTS or os.path.exists(path)]
    for at, (name, place) in enumerate(places):
        for other, there in places[:at]:
            if place == there and (name in OUTPUTS or other in OUTPUTS):
                out, kept = (name, other) if name in OUTPUTS else (other, name)
                flags = f"--{out.replace('_out', '')} and --{kept.replace('_out', '').replace('_', '-')}"
                raise UserError(f"{flags} are both {place}, which would be overwritten; name another file to write")


# -- counting --------------------------------------------------------------------------------------------------------
def counted(source: Any, what: str) -> str:
    """``40 prompts of prompts.jsonl``, without the number where it is not cheap to know."""
    text = str(source)
    if text.startswith("self"):
        return f"{text.partition(':')[2] or '400'} questions that the target writes itself"
    number = items(Path(text))
    return f"{what} of {text}" if number is None else f"{number:,} {what} of {text}"


def items(path: Path) -> int | None:
    """How many lines a file has that are not blank, or members its JSON array; ``None`` where nobody knows cheaply."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return None
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data.lstrip()[:1] == b"[":
        return len(json.loads(data))
    return sum(1 for line in data.splitlines() if line.strip())


def asked(given: Given) -> str:
    """The prompts of a command that takes files, suites and a limit."""
    names = [*([str(given["prompts"])] if given.get("prompts") else []), *(given.get("suite") or [])]
    if len(names) == 1 and given.get("prompts"):
        number = items(Path(names[0]))
        most = given.get("limit")
        if number is not None and most is not None:
            return f"{min(number, most):,} of {number:,} prompts of {names[0]}"
    limit = f"at most {given['limit']} prompts each of " if given.get("limit") else ""
    return limit + ", ".join(names or ["no prompts"])


def tokens(given: Given) -> str:
    return f"at most {given['max_new_tokens']} tokens each"


def several(values: Any) -> str:
    return ", ".join(map(str, values or ()))


def target(given: Given) -> str:
    return f"{given.get('target')}{' + ' + given['adapter'] if given.get('adapter') else ''}"


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
def _regenerate(g: Given) -> str:
    temperatures = g["temperature"]
    by = f"the server {g['server']}" if g.get("server") else target(g)
    number = items(Path(g["prompts"]))
    total = number * len(temperatures) * g["max_new_tokens"] if number else 0
    most = f" = at most {total:,} tokens where each asks one question" if total else ""
    return (
        f"{counted(g['prompts'], 'prompts')}, answered by {by} at temperature {several(temperatures)}, "
        f"{tokens(g)}{most}, into {g['out']}"
    )


def _text(g: Given) -> str:
    return counted(g["responses"], "responses") if g.get("responses") else counted(g.get("prompts"), "prompts")


def _adapt(g: Given) -> str:
    steps = [
        "take served responses" if g.get("responses") else "answer",
        "train",
        "export",
        "measure",
        "write the page",
    ]
    if g.get("budget") and str(g["budget"]) != "100%":
        steps.insert(0 if g.get("select_on") == "prompts" else 1, f"select {g['budget']}")
    return f"{_text(g)}; {', '.join(steps)}; {target(g)} with the draft {g.get('draft')}; run directory {g.get('out')}"


def _distill(g: Given) -> str:
    begin = f"the drafter {g['draft']}" if g.get("draft") else f"a new drafter, pretrained on {several(g.get('text'))}"
    return f"{begin}, aligned with {target(g)} on its answers to {_text(g)}; run directory {g.get('out')}"


def _train(g: Given) -> str:
    what = "a new draft" if g["from_nothing"] else f"{g['method']} of the draft {g['draft']}"
    epochs = f"{g['epochs']:g} times " if g.get("epochs") else ""
    return (
        f"{what} for {target(g)}, trained on {epochs}{counted(g['responses'], 'responses')}; run directory {g['out']}"
    )


def _select(g: Given) -> str:
    return f"{g['budget']} of {_text(g)}, scored by {g['scorer']}, into {g['out']}"


def _probe(g: Given) -> str:
    beside = f" and by {g['base_target']} for comparison" if g.get("base_target") else ""
    return f"the draft {g['draft']} on {asked(g)}, answered by {target(g)}{beside}, {tokens(g)}; chain of {g['gamma']}"


def _bench(g: Given) -> str:
    measured = several(g.get("server") or g.get("draft") or ())
    return f"{measured} and plain decoding of {target(g)} on {asked(g)}, {tokens(g)}, {g['shape']}, into {g['out']}"


def _vocabulary(g: Given) -> str:
    does = f"refreshed into {g['out']}" if g["refresh"] else "looked at"
    return f"the vocabulary of {g['draft']} against {counted(g['responses'], 'responses')} of {target(g)}, {does}"


def _merge(g: Given) -> str:
    return f"{g['private']} (scale {g['scale']:g}) into {g['base_draft']}, written to {g['out']}"


def _export(g: Given) -> str:
    return f"{g['draft']} for {g['target']} in the format {g['format']}, written to {g['out']}"


def _report(g: Given) -> str:
    return f"{several(g['results'])} as one page, {g['out']}"


def _study(g: Given) -> str:
    if g.get("tables"):
        return f"tables and pictures of {g['tables']}"
    return f"the cells of {g['config']}" + (", listed" if g["list_cells"] else f"; folder {g.get('out')}")


def _watch(g: Given) -> str:
    what = f"at most {g['limit']} of {counted(g['prompts'], 'prompts')}" if g.get("prompts") else "one prompt"
    return f"{what}, answered by {target(g)} with the draft {g['draft']}, {g['shape']}, {tokens(g)}"


def _quickstart(g: Given) -> str:
    return (
        f"344 maths problems answered, a draft trained on them, measured on 16 others; about ten minutes on two cores; "
        f"folder {g['out']}"
    )


PLANS: dict[str, Callable[[Given], str]] = {
    "adapt": _adapt,
    "bench": _bench,
    "distill": _distill,
    "export": _export,
    "merge": _merge,
    "probe": _probe,
    "quickstart": _quickstart,
    "regenerate": _regenerate,
    "report": _report,
    "select": _select,
    "study": _study,
    "train": _train,
    "vocabulary": _vocabulary,
    "watch": _watch,
}
