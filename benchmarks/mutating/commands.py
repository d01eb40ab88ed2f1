"""The same folders through the command line: exit code, one line of words, nothing half written."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mutating.base import RAN, Change, Mutation
from mutating.judging import Late, judged, within
from mutating.sources import Source
from mutating.tables import EMBEDDING
from redraft.cli.commands import COMMANDS
from redraft.cli.main import main

SECONDS = 120

# Formats that are tried, by family.
FORMATS = {"eagle3": ("vllm", "plain", "specforge", "gguf"), "eagle1": ("vllm", "sglang"), "standalone": ("hf", "gguf")}


def known() -> set[str]:
    """The names of the commands."""
    return {kind.COMMAND for kind in COMMANDS}


def arguments(source: Source, folder: Path, out: Path) -> Iterator[list[str]]:
    """Command lines for a folder, each with a folder of its own below ``out`` to write to."""
    target = ["--target", source.facts.name]
    base = ["--base-draft", str(source.base)] if source.base else []
    if "import" in known():
        options = {"trainer": source.options.get("trainer"), "taps": ",".join(map(str, source.options.get("taps", ())))}
        given = [f"--{name}={value}" for name, value in options.items() if value]
        yield ["import", f"{folder}", *target, *base, *given, "--out", str(out / "import" / "draft")]
    for name in FORMATS[source.family]:
        yield ["export", f"--draft={folder}", *target, *base, "--format", name, "--out", str(out / name / "draft")]
    if "check" in known():
        yield ["check", f"{folder}", *target, *base]


def called(line: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``redraft`` with these arguments, in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["redraft", *line]
    try:
        with within(SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code: int | str | None = 0
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = before
    return code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue()


def commanded(source: Source, mutation: Mutation, folder: Path, out: Path) -> Iterator[tuple[str, str, str]]:
    """(command, verdict, why it is a fault) of every command; none for a source whose target lies in no folder."""
    if not source.facts.name:
        return
    for line in arguments(source, folder, out):
        place = Path(line[-1]) if "--out" in line else None
        shown = " ".join([line[0], *(line[line.index("--format") + 1 :][:1] if "--format" in line else [])])
        try:
            code, said, error = called(line)
        except Late:
            yield shown, "late", f"no end in {SECONDS} s"
            continue
        except Exception as failure:
            yield shown, "traceback", f"{type(failure).__name__}: {failure}"[:300]
            continue
        yield shown, *_verdict(source, mutation, place, code, said, error)


def _verdict(
    source: Source, mutation: Mutation, place: Path | None, code: int, said: str, error: str
) -> tuple[str, str]:
    """What the end of a command tells; a refusal for another reason, as an engine's limit, is one too."""
    words = error.strip()
    if RAN in words + said:
        return "wrong", "code of the file was run"
    if "Traceback" in words + said or "defect" in words or code not in (0, 2):
        return "traceback", f"exit code {code}: {words[:300]}"
    left = [] if place is None or not place.parent.exists() else [p.name for p in place.parent.iterdir()]
    if code == 2:
        if left:
            return "wrong", f"refused, and left {left}"
        if "\n" in words or not words.startswith("redraft: error:"):
            return "unnamed", f"not one line: {words[:300]!r}"
        return "refused", ""
    if place is None:
        return "same", ""
    if left != [place.name]:
        return "wrong", f"it should have written {place.name} alone, and there is {left}"
    if not mutation.expect.reads:
        return "wrong", "it was written, and should have been refused"
    if not (place / "redraft.json").is_file():
        return "same", ""
    # What was imported is opened again: it must still be what it was read as.
    again = replace(
        mutation, expect=replace(mutation.expect, refuse=False, noted=(), reads=_borrowing(source, mutation))
    )
    verdict, why = judged(replace(source, options={}, base=None), again, place)
    return verdict, why and f"imported: {why}"


def _borrowing(source: Source, mutation: Mutation) -> tuple[Change, ...]:
    """What a draft may mean once it is written: one whose table is the target's, rounded, may take the target's."""
    reads, own = mutation.expect.reads, source.state.get(EMBEDDING)
    table = source.given.embedding.bfloat16()
    if own is None or own.shape != table.shape or not torch.equal(own.bfloat16(), table):
        return reads
    return reads + tuple(replace(one, tensors={**one.tensors, EMBEDDING: source.given.embedding}) for one in reads)
