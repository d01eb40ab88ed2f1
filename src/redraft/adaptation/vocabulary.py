"""``redraft vocabulary``: coverage of a draft's vocabulary on stored responses, and a refreshed draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redraft.adaptation.core import draft_meta
from redraft.adaptation.models import TargetSpec, check_output, open_draft
from redraft.adaptation.runs import half, supervised_rows
from redraft.artifact import atomic_write_json
from redraft.drafts.files import save_draft
from redraft.errors import UserError
from redraft.settings.steps import VocabularySettings
from redraft.starts.apply import StartContext
from redraft.starts.vocabulary import Coverage, Refresh, coverage, refresh_vocabulary

SCHEMA = "redraft.vocabulary/1"


def vocabulary_file(spec: TargetSpec, s: VocabularySettings) -> tuple[Coverage, Refresh | None, dict[str, Any]]:
    """Coverage of the draft on the target's responses; with ``refresh`` also the draft to be written to ``out``.

    Nothing is written to ``out`` when there is nothing to gain. Returns the coverage, the refresh and the JSON
    report, which is written to ``report`` where one is named. Raises ``UserError``.
    """
    if s.refresh != (s.out is not None):
        raise UserError("give --refresh and --out together: the folder that the refreshed draft is written to")
    if s.report is not None:
        check_output(s.report, ".json")
    rows, general_rows = supervised_rows(s.responses), supervised_rows(s.general) if s.general else []
    target = spec.head()
    opened = open_draft(s.draft, target, s.base_draft)
    found, meta = coverage(opened.draft, rows, s.gamma), draft_meta(target, opened.meta.get("method"), s.seed)

    def on_general(speaker: Any) -> dict[str, Any] | None:
        return coverage(speaker, general_rows, s.gamma).to_dict(target.tokenizer) if general_rows else None

    result: dict[str, Any] = {
        "schema": SCHEMA,
        "target": target.name,
        "draft": s.draft,
        "responses": str(s.responses),
        "coverage": found.to_dict(target.tokenizer),
        "general": on_general(opened.draft),
        "provenance": meta["provenance"],
    }
    refreshed = None
    if s.out is not None:
        refreshed = refresh_vocabulary(opened.draft, StartContext(target, None, rows, general_rows, s.gamma, s.seed))
        about = {"replaced": len(refreshed.added), "map": refreshed.map, "notes": list(refreshed.notes)}
        result["refresh"] = about | {
            "coverage": refreshed.after.to_dict(target.tokenizer),
            "general": on_general(refreshed.draft),
            "added": words(refreshed.added, target.tokenizer),
            "evicted": words(refreshed.evicted, target.tokenizer),
        }
        if refreshed.changed:
            save_draft(s.out, half(refreshed.draft), meta | {"vocabulary": about})
    if s.report is not None:
        atomic_write_json(s.report, result)
    return found, refreshed, result


def words(ids: Sequence[int], tokenizer: Any) -> list[dict[str, Any]]:
    """The first 50 of these tokens with their text, for JSON."""
    return [{"id": id, "text": tokenizer.decode([id])} for id in ids[:50]]
