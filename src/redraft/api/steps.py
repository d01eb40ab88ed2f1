"""The single steps: opening by name, the training text and what of it to keep, drafts as files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from redraft.adaptation import models
from redraft.adaptation.cards import export_card
from redraft.adaptation.merged_target import adapter_note, merging, served
from redraft.adaptation.models import AnyTarget, TargetSpec, check_output, open_any, prompt_rows, target_info
from redraft.adaptation.runs import half, supervised_rows
from redraft.artifact import atomic_write_text
from redraft.data.prompts import Conversation, read_conversations
from redraft.data.regenerate import InProcessEngine, RegenerationReport, ServerEngine, expected_rows
from redraft.data.regenerate import regenerate as answer
from redraft.data.shapes import row_of
from redraft.data.store import write_rows
from redraft.drafts.files import save_draft
from redraft.drafts.formats.base import ExportReport, needs_tokenizer
from redraft.drafts.formats.meaning import Reading
from redraft.drafts.opening import AnyDraft, OpenDraft, open_checkpoint
from redraft.drafts.scaling import scale_change
from redraft.errors import UserError
from redraft.loading import load_tokenizer
from redraft.progress import progress_bar, tell
from redraft.registries import EXPORTERS
from redraft.reports.card import write_card
from redraft.reports.tables import Imported, Merged
from redraft.selection.manifest import Manifest, choose
from redraft.selection.states import scoring_context
from redraft.settings.base import Settings
from redraft.settings.steps import ExportSettings, ImportSettings, MergeSettings, RegenerateSettings, SelectSettings
from redraft.settings.texts import parse_scorer
from redraft.target import Facts, Target

Say = Callable[[str], None]
Place = str | Path
Kind = TypeVar("Kind", bound=Settings)


def open_target(
    target: Place,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    adapter: str | None = None,
    template_arg: Mapping[str, Any] | None = None,
) -> Target:
    """The frozen target with its tokenizer.

    ``dtype`` is bfloat16, float32 or auto, the one that this machine is faster in; ``adapter`` a PEFT adapter to merge
    in; ``template_arg`` are arguments of its chat template.

        target = redraft.open_target("my-model", device="cuda", template_arg={"enable_thinking": False})
    """
    return TargetSpec(str(target), dtype, device, adapter, template_arg or {}).open()


def open_draft(draft: AnyDraft, target: AnyTarget, *, base_draft: AnyDraft | None = None) -> OpenDraft:
    """A draft of any family and format in float32, bound to its target: ``.draft`` is the module, ``.meta`` its record.

    A private part needs ``base_draft``, the shared draft that it was trained on.

        stale = redraft.open_draft("old-draft", target)
    """
    return open_any(draft, TargetSpec.of(target).parts().shown, base_draft)


def checked(kind: type[Kind], given: Mapping[str, Any], **more: Any) -> Kind:
    """The settings of a command among the arguments ``given`` of a function, each in its type.

    Opened targets and drafts stand there by name. Raises ``UserError`` that tells all mistakes.
    """
    known = {name: value for name, value in {**given, **more}.items() if name in kind.model_fields}
    return kind(**{name: name_of(value) for name, value in known.items() if value is not None})


def name_of(given: Any) -> Any:
    """What an opened target or draft is called; anything else as it is, paths as texts."""
    if isinstance(given, OpenDraft):
        return given.source or "the opened draft"
    if isinstance(given, TargetSpec | Target):
        return TargetSpec.of(given).name or "the opened target"
    return str(given) if isinstance(given, Path) else given


def regenerate(
    target: AnyTarget,
    prompts: Place,
    out: Place,
    *,
    temperature: Sequence[float] = (0.0,),
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    server: str | Sequence[str] | None = None,
    server_model: str | None = None,
    seed: int = 0,
) -> RegenerationReport:
    """The target's own answers to the prompts, appended to the response file ``out``: the text that a draft must learn.

    One answer a prompt and ``temperature``. With ``server``, the address of an OpenAI-compatible one, or several, those
    answer, ``batch_size`` requests under way at each. A stopped run goes on where it was.

        redraft.regenerate(target, "prompts.jsonl", "responses.jsonl", temperature=[0.0, 0.7], top_p=0.95)
    """
    s, spec = checked(RegenerateSettings, locals()), TargetSpec.of(target)
    check_output(s.out, ".jsonl")
    conversations = read_conversations(s.prompts)
    facts: Facts
    engine: Any
    if s.server:
        facts = spec.facts()
        engine = ServerEngine(s.server, s.server_model, s.batch_size, vocab_size=facts.vocab_size, say=tell)
    else:
        parts = spec.parts()
        facts, engine = parts.facts, InProcessEngine(lambda: parts.model, s.batch_size)
    with progress_bar("regenerate", expected_rows(conversations, s.samplers), "rows") as progress:
        told = progress.update
        return answer(engine, conversations, facts, s.samplers, s.out, s.max_new_tokens, s.seed, told)


def select(
    out: Place,
    *,
    responses: Place | None = None,
    prompts: Place | None = None,
    scorer: str = "rejection",
    budget: str = "75%",
    order: str = "highest",
    keep: Place | None = None,
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
    s = checked(SelectSettings, locals())
    by = parse_scorer(s.scorer)
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
    opened = spec.open() if spec and {"target", "alpha_of"} & by.needs else None
    rows: Sequence[Any] = supervised_rows(s.responses) if s.responses else []
    if spec and asked:
        rows = prompt_rows(asked, opened or spec.known())
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
    chosen = set(manifest.selected_keys)
    if asked:
        atomic_write_text(keep, "".join(json.dumps(row_of(c)) + "\n" for c in asked if c.id in chosen))
    else:
        write_rows(keep, manifest.apply(rows))


def import_draft(
    source: Place,
    out: Place,
    *,
    target: AnyTarget | None = None,
    taps: Sequence[int] = (),
    trainer: str | None = None,
) -> Imported:
    """Read a draft as the trainer that wrote it means it, and write it in redraft's own format.

    The result says of every value where it comes from; what redraft does not compute is refused by its name.
    ``target`` tells what the file leaves to it, and must fit; ``taps`` and ``trainer`` overrule what the file tells.

        print(redraft.import_draft("someones-draft", "draft", target="my-model"))
    """
    s, info = checked(ImportSettings, locals()), None if target is None else target_info(target)
    options: dict[str, Any] = {"taps": s.taps or None, "trainer": s.trainer}
    found = open_checkpoint(s.source, info, needs_target=False, **options)
    draft, reading = found.draft, found.reading or Reading("redraft")
    if info is not None:
        draft = draft.borrowing(info)
    # What the file itself names: --target is whom it is to be used with, not whom it was made for.
    named = {"name": found.meta.get("verifier"), "hash": None}
    entries = [{**entry.__dict__, "value": plain(entry.value)} for entry in reading.entries]
    origin = {"source": s.source, "trainer": reading.reader, "entries": entries, "notes": list(reading.notes)}
    save_draft(s.out, draft, {"method": found.meta.get("method"), "target": named, "imported": origin})
    size = sum(parameter.numel() for parameter in draft.parameters())
    stored = sum(tensor.numel() * tensor.element_size() for tensor in draft.stored().values())
    notes = tuple(found.meta.get("notes", []))
    return Imported(s.out, s.source, draft.family, reading.reader, size, stored, tuple(entries), notes)


def plain(value: Any) -> Any:
    """A value as JSON holds it."""
    return list(value) if isinstance(value, tuple) else value


def merge(
    private: AnyDraft, base_draft: AnyDraft, out: Place, *, target: AnyTarget | None = None, scale: float = 1.0
) -> Merged:
    """Fold ``scale`` times what a private part changes into the draft that it was trained on: one dense draft.

    ``target`` is needed where ``base_draft`` is a public checkpoint.

        redraft.merge("run/private", "old-draft", "merged", scale=0.7)
    """
    s, info = checked(MergeSettings, locals()), None if target is None else target_info(target)
    found = _read(private, info, base_draft)
    draft, meta = found.draft, found.meta
    kept = {key: meta[key] for key in ("method", "target", "tokenizer_hash", "provenance") if key in meta}
    origin = {"merged_from": {"base": s.base_draft, "private": s.private, "scale": s.scale}}
    if s.scale != 1:
        draft = scale_change(draft, _read(base_draft, info).draft, s.scale)
    save_draft(s.out, draft, kept | origin, merge=True)
    # Experts become a part of the matrices beside them, low-rank updates are added to theirs.
    parameters = sum(p.numel() for name, p in draft.named_parameters() if ".low_rank." not in name)
    return Merged(s.out, parameters, kept.get("method"))


def _read(draft: AnyDraft, info: Facts | None, base_draft: AnyDraft | None = None) -> OpenDraft:
    """A draft in the types of its file; an opened one, which is in float32, in those that drafts are stored in."""
    found = open_checkpoint(draft, info, base_draft)
    opened = isinstance(draft, OpenDraft) or isinstance(base_draft, OpenDraft)
    return replace(found, draft=half(found.draft)) if opened else found


def export(
    draft: AnyDraft, target: AnyTarget, format: str, out: Place, *, base_draft: AnyDraft | None = None, gamma: int = 5
) -> ExportReport:
    """Write a draft in the ``format`` of an engine, complete or not at all; refused where it would compute otherwise.

    A model card with what is known of the draft lies beside it. The report says the command that serves it, with
    ``gamma`` drafted tokens a round.

        print(redraft.export("run/merged", "my-model", "vllm", "draft-for-vllm").serve)
    """
    s, spec = checked(ExportSettings, locals()), TargetSpec.of(target)
    exporter, info = EXPORTERS.get(s.format), target_info(spec)
    found = _read(draft, info, base_draft)
    if info.tokenizer is None and needs_tokenizer(s.format, found.draft.family):
        info = copy.copy(info)
        info.tokenizer = load_tokenizer(spec.name, spec.adapter)
    written = exporter(found.draft, s.out, info, speculative_tokens=s.gamma)
    note, line = adapter_note(spec.name, spec.adapter), served(written.serve, spec.name, spec.adapter)
    write_card(written.folder, export_card(found, written, info, [*merging(spec.name, spec.adapter), line]))
    return replace(written, serve=line, warnings=(*written.warnings, *filter(None, [note])))
