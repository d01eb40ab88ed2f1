"""What came of a mutation, and whether that is right.

Each opening has a time limit, runs on a copy of its own, and is held against the judge's own forward.
"""

from __future__ import annotations

import contextlib
import io
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from trainers.compare import decoded

from mutating import language
from mutating.answers import STEPS, Answer
from mutating.base import RAN, Change, Mutation
from mutating.sources import Source, fields_of
from redraft.drafts.opening import OpenDraft
from redraft.errors import UserError

SECONDS = 20

# Verdicts that are right, and those that are faults.
RIGHT = ("refused", "same", "other")
FAULTS = ("wrong", "traceback", "late", "unnamed", "needless")

# Fields that are not computed with on short texts, or are compared by what is computed of them.
LOOSE = frozenset(
    {
        "max_position_embeddings",
        "rope_parameters",
        "own_embedding",
        "balance",
        "low_rank",
        "low_rank_alpha",
        "private_experts",
        "private_active",
    }
)


class Late(BaseException):
    """The time was up. It is no ``Exception``, so that nothing on the way takes it for an error of its own."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises :class:`Late` in the block after so many seconds, also where it waits for a file."""

    def late(*_: Any) -> None:
        raise Late

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def judged(source: Source, mutation: Mutation, folder: Path) -> tuple[str, str]:
    """The verdict on what ``folder``, changed by the mutation, is opened as, and why it is a fault."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        verdict = _opened(source, mutation, folder)
    # Whatever came of it then: files here that could be run say so.
    return ("wrong", "code of the file was run") if RAN in said.getvalue() else verdict


def _opened(source: Source, mutation: Mutation, folder: Path) -> tuple[str, str]:
    try:
        with within(SECONDS):
            opened = source.opened(folder)
            if not mutation.expect.reads:
                return "wrong", "it was read"
            return compared(source, mutation, opened)
    except UserError as error:
        return _refused(mutation, str(error))
    except Late:
        return "late", f"no answer in {SECONDS} s"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"[:300]


def _refused(mutation: Mutation, text: str) -> tuple[str, str]:
    """A refusal is right where it may be, in one line that names the thing."""
    if not mutation.expect.refuse:
        return "needless", text[:300]
    if "\n" in text or not text.strip() or len(text) > 8000:
        return "unnamed", f"not one line of words: {text[:300]!r}"
    if not any(name in text for name in mutation.names):
        return "unnamed", f"none of {', '.join(mutation.names)} in: {text[:300]}"
    return "refused", ""


def compared(source: Source, mutation: Mutation, opened: OpenDraft) -> tuple[str, str]:
    """Whether the draft is one of those that the mutation may mean: by its config, its vocabulary and its logits."""
    draft = _ready(source, opened)
    whys = []
    for change in mutation.expect.reads:
        why = _differs(source, change, draft)
        if not why:
            noted = mutation.expect.noted
            notes = " ".join(opened.meta.get("notes", []))
            if noted and not any(word in notes for word in noted):
                return "wrong", f"read as {dict(change.fields)} without a note"
            return ("other" if change.fields or change.tensors else "same"), ""
        whys.append(why)
    return "wrong", "; or ".join(whys)[:400]


def _ready(source: Source, opened: OpenDraft) -> Any:
    """The draft as one dense module in float32, on the tables of its target."""
    draft: Any = opened.draft.float().merged().eval()
    return draft if source.family == "standalone" else draft.bind(source.lender)


def meant(source: Source, change: Change) -> Answer:
    """The judge's draft of this meaning."""
    tensors = {**source.state, **change.tensors}
    fields = {**source.fields, **change.fields}
    return Answer(source.family, fields, {n: t for n, t in tensors.items() if t is not None}, source.given)


def _differs(source: Source, change: Change, draft: Any) -> str:
    """In what the draft is not what the change means; nothing where it is."""
    if source.family == "standalone":
        tensors = {name: t for name, t in {**source.state, **change.tensors}.items() if t is not None}
        wanted = language.logits({**source.fields, **change.fields}, tensors, source.given.ids)
        with torch.inference_mode():
            found = draft.model.eval()(source.given.ids[None]).logits[0]
        same = found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)
        return "" if same else "the language model says something else"
    answer, found = meant(source, change), fields_of(draft)
    for name, value in answer.fields.items():
        if name in LOOSE or name not in found:
            continue
        if _plain(found[name]) != _plain(value):
            return f"{name} is {found[name]!r} for {value!r}"
    ids = draft.vocabulary().tolist()
    if ids != answer.vocabulary():
        return "another vocabulary"
    taps = source.given.taps(found["taps"] if source.family == "eagle3" else [-1])
    logits = decoded(draft, source.lender.embedding, source.given.ids, taps, STEPS)
    wanted = answer.steps()
    if not torch.allclose(logits, wanted, atol=1e-4, rtol=1e-4):
        return f"logits differ by {float((logits - wanted).abs().max()):.2g}"
    return ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def checked(source: Source) -> None:
    """Raise where the judge and the package do not agree on the good checkpoint itself: then the judge is wrong."""
    draft = _ready(source, source.opened())
    if why := _differs(source, Change(), draft):
        raise AssertionError(f"the judge does not know {source.name}: {why}")


__all__ = ["FAULTS", "RIGHT", "Late", "checked", "judged", "replace", "within"]
