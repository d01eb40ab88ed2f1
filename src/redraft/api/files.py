"""Drafts as files: merged, and in the formats of engines."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from redraft.adaptation.models import AnyTarget, target_info
from redraft.adaptation.runs import half
from redraft.api.opening import checked
from redraft.drafts.base import Draft
from redraft.drafts.files import save_draft
from redraft.drafts.formats.base import ExportReport
from redraft.drafts.opening import AnyDraft, OpenDraft, open_checkpoint
from redraft.drafts.scaling import scale_change
from redraft.loading import load_tokenizer, quiet
from redraft.registries import EXPORTERS, FAMILIES
from redraft.reports.results import Merged
from redraft.settings.steps import ExportSettings, MergeSettings
from redraft.target import Facts


def merge(
    private: AnyDraft,
    base_draft: AnyDraft,
    out: str | Path,
    *,
    target: AnyTarget | None = None,
    scale: float = 1.0,
) -> Merged:
    """Fold ``scale`` times what a private part changes into the draft that it was trained on: one dense draft.

    ``target`` is needed where ``base_draft`` is a public checkpoint.

        redraft.merge("run/private", "old-draft", "merged", scale=0.7)
    """
    s, info = checked(MergeSettings, locals()), None if target is None else target_info(target)
    draft, meta = _read(private, info, base_draft)
    kept = {key: meta[key] for key in ("method", "target", "tokenizer_hash", "provenance") if key in meta}
    origin = {"merged_from": {"base": s.base_draft, "private": s.private, "scale": s.scale}}
    if s.scale != 1:
        draft = scale_change(draft, _read(base_draft, info)[0], s.scale)
    merged = draft.merged()
    save_draft(s.out, merged, kept | origin)
    return Merged(s.out, sum(parameter.numel() for parameter in merged.parameters()), kept.get("method"))


def _read(draft: AnyDraft, info: Facts | None, base_draft: AnyDraft | None = None) -> tuple[Draft, dict[str, Any]]:
    """A draft in the types of its file; an opened one, which is in float32, in those that drafts are stored in."""
    found = open_checkpoint(draft, info, base_draft)
    opened = isinstance(draft, OpenDraft) or isinstance(base_draft, OpenDraft)
    return (half(found.draft) if opened else found.draft), found.meta


def export(
    draft: AnyDraft,
    target: AnyTarget,
    format: str,
    out: str | Path,
    *,
    base_draft: AnyDraft | None = None,
    gamma: int = 5,
) -> ExportReport:
    """Write a draft in the ``format`` of an engine, complete or not at all; refused where it would compute otherwise.

    The report says the command that serves it, with ``gamma`` drafted tokens a round.

        print(redraft.export("run/merged", "my-model", "vllm", "draft-for-vllm").serve)
    """
    s = checked(ExportSettings, locals())
    exporter, info = EXPORTERS.get(s.format), target_info(target)
    found, _ = _read(draft, info, base_draft)
    if not FAMILIES.get(found.family).reads_states and info.tokenizer is None:
        # A model by itself must speak as the target does, down to its special tokens.
        with quiet():
            info = copy.copy(info)
            info.tokenizer = load_tokenizer(info.name)
    return exporter(found, s.out, info, speculative_tokens=s.gamma)
