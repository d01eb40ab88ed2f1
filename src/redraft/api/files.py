"""Drafts as files: merged, and in the formats of engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from redraft.adaptation.steps import AnyTarget, read_draft, target_info
from redraft.api.opening import AnyDraft, name_of
from redraft.artifact import save_draft
from redraft.drafts.experts import merge_private
from redraft.drafts.scaling import scale_change
from redraft.drafts.standalone import StandaloneDraft, merge_experts
from redraft.drafts.standalone.files import save_standalone
from redraft.export import ExportReport
from redraft.loading import load_tokenizer, quiet
from redraft.registries import EXPORTERS
from redraft.report.results import Merged


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
    out, info = Path(out), None if target is None else target_info(target)
    draft, meta = read_draft(private, info, base_draft)
    kept = {key: meta[key] for key in ("method", "target", "tokenizer_hash", "provenance") if key in meta}
    origin = {"merged_from": {"base": name_of(base_draft), "private": name_of(private), "scale": scale}}
    if scale != 1:
        draft = scale_change(draft, read_draft(base_draft, info)[0], scale)
    merged: Any
    if isinstance(draft, StandaloneDraft):
        merged = merge_experts(draft)
        save_standalone(out, merged, kept | origin)
    else:
        merged = merge_private(draft)
        save_draft(out, merged, kept | origin)
    return Merged(out, sum(parameter.numel() for parameter in merged.parameters()), kept.get("method"))


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
    exporter = EXPORTERS.get(format)
    info = target_info(target)
    found, _ = read_draft(draft, info, base_draft)
    if isinstance(found, StandaloneDraft) and info.tokenizer is None:
        # Such a draft must speak as the target does, down to its special tokens.
        with quiet():
            info = replace(info, tokenizer=load_tokenizer(info.name))
    return exporter(found, Path(out), info, speculative_tokens=gamma)
