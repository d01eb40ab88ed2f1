"""The training text: the target's own answers, and what of them to keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redraft.adaptation import models
from redraft.adaptation.models import AnyTarget, TargetSpec, check_output, prompt_rows
from redraft.adaptation.runs import supervised_rows
from redraft.api.opening import AnyDraft, checked
from redraft.artifact import atomic_write_text
from redraft.data.prompts import Conversation, read_conversations
from redraft.data.regenerate import InProcessEngine, RegenerationReport, ServerEngine, expected_rows
from redraft.data.regenerate import regenerate as answer
from redraft.data.shapes import row_of
from redraft.data.store import encode_row
from redraft.errors import UserError
from redraft.progress import progress_bar
from redraft.selection.manifest import Manifest, choose
from redraft.selection.states import scoring_context
from redraft.settings.scorers import parse_scorer
from redraft.settings.steps import RegenerateSettings, SelectSettings
from redraft.target import Facts


def regenerate(
    target: AnyTarget,
    prompts: str | Path,
    out: str | Path,
    *,
    temperature: Sequence[float] = (0.0,),
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    server: str | None = None,
    server_model: str | None = None,
    seed: int = 0,
) -> RegenerationReport:
    """The target's own answers to the prompts, appended to the response file ``out``: the text that a draft must learn.

    One answer a prompt and ``temperature``. With ``server``, the address of an OpenAI-compatible one, that answers. A
    stopped run goes on where it was.

        redraft.regenerate(target, "prompts.jsonl", "responses.jsonl", temperature=[0.0, 0.7], top_p=0.95)
    """
    s, spec = checked(RegenerateSettings, locals()), TargetSpec.of(target)
    check_output(s.out, ".jsonl")
    conversations = read_conversations(s.prompts)
    facts: Facts
    engine: Any
    if s.server:
        facts = spec.facts()
        engine = ServerEngine(s.server, s.server_model, s.batch_size, vocab_size=facts.vocab_size)
    else:
        facts = opened = spec.open()
        engine = InProcessEngine(opened, s.batch_size)
    with progress_bar("regenerate", expected_rows(conversations, s.samplers), "rows") as progress:
        told = progress.update
        return answer(engine, conversations, facts, s.samplers, s.out, s.max_new_tokens, s.seed, told)


def select(
    out: str | Path,
    *,
    responses: str | Path | None = None,
    prompts: str | Path | None = None,
    scorer: str = "rejection",
    budget: str = "75%",
    order: str = "highest",
    keep: str | Path | None = None,
    target: AnyTarget | None = None,
    base_target: AnyTarget | None = None,
    draft: AnyDraft | None = None,
    seed: int = 0,
) -> Manifest:
    """Choose what is worth training on, of ``responses`` or of ``prompts`` before any is answered.

    The manifest, written to ``out``, says every score and why a row is in; ``keep`` is a file for the kept rows or
    prompts. ``budget`` is ``"25%"``, ``"400"`` rows or ``"60k tokens"``; ``scorer`` is ``NAME`` or ``NAME:KEY=VALUE``.
    What a scorer needs (the target, its base, the draft) must be given; this is checked before any model is loaded.

        redraft.select("selection.json", responses="responses.jsonl", target=target, draft="old-draft", budget="50%")
    """
    s, by = checked(SelectSettings, locals()), parse_scorer(scorer)
    for path in filter(None, (s.out, s.keep)):
        check_output(path)
    spec = None if target is None else TargetSpec.of(target)
    needs_target = bool({"target", "alpha_of"} & by.needs) or s.responses is None
    if needs_target and spec is None:
        raise UserError(f"scorer {by.name} needs the fine-tuned target here; give --target")
    if "alpha_of" in by.needs and draft is None:
        raise UserError(f"scorer {by.name} measures the present draft here; give --draft")
    if "base_target" in by.needs and base_target is None:
        raise UserError(f"scorer {by.name} compares the target with its base; give --base-target")
    asked = read_conversations(s.prompts) if s.prompts is not None else []
    opened = spec.open() if spec and needs_target else None
    rows: list[Any] = prompt_rows(asked, opened) if opened and asked else supervised_rows(s.responses or Path())
    with progress_bar("select", len(rows), "rows") as progress:
        present = models.open_draft(draft, opened).draft if opened and draft and "alpha_of" in by.needs else None
        base = (lambda: TargetSpec.of(base_target).open()) if base_target else lambda: None
        context = scoring_context(by, opened, present, base, s.seed, s.out.parent, progress)
        source = s.responses or (Path(s.prompts) if s.prompts and Path(s.prompts).is_file() else None)
        manifest = choose(by, rows, context, s.budget, s.order, source)
    manifest.write(s.out)
    if s.keep is not None:
        _write_kept(manifest, rows, asked, s.keep)
    return manifest


def _write_kept(manifest: Manifest, rows: Sequence[Any], asked: Sequence[Conversation], keep: Path) -> None:
    """The selected rows as a response file, or the selected prompts as a prompt file."""
    if not asked:
        atomic_write_text(keep, b"".join(encode_row(row) for row in manifest.apply(rows)).decode())
        return
    chosen = set(manifest.selected_keys)
    kept = [json.dumps(row_of(c)) for c in asked if c.id in chosen]
    atomic_write_text(keep, "\n".join(kept) + "\n")
