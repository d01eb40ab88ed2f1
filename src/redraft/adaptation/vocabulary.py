"""``redraft vocabulary``: coverage of a draft's vocabulary on stored responses, and a refreshed draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.adaptation.core import half
from redraft.adaptation.models import open_draft
from redraft.adaptation.steps import TargetSpec, check_output
from redraft.artifact import atomic_write_json
from redraft.data.store import read_rows
from redraft.drafts.files import save_draft
from redraft.errors import UserError
from redraft.loading import tokenizer_hash
from redraft.rows import anchors
from redraft.starts.vocabulary import Coverage, RefreshReport, coverage, refresh_vocabulary

SCHEMA = "redraft.vocabulary/1"


def vocabulary_file(
    spec: TargetSpec,
    draft: str,
    responses: Path,
    *,
    base_draft: str | None = None,
    refresh: bool = False,
    out: Path | None = None,
    general: Path | None = None,
    report: Path | None = None,
    gamma: int = 5,
    seed: int = 0,
) -> tuple[Coverage, RefreshReport | None, dict[str, Any]]:
    """Coverage of ``draft`` on the target's ``responses``; with ``refresh`` also the draft to be written to ``out``.

    Nothing is written to ``out`` when there is nothing to gain. Returns the coverage, the refresh and the JSON
    report, which is written to ``report`` where one is named. Raises ``UserError``.
    """
    if refresh != (out is not None):
        raise UserError("give --refresh and --out together: the folder that the refreshed draft is written to")
    if report is not None:
        check_output(report, ".json")
    rows = [row for row in read_rows(responses) if anchors(row)]
    general_rows = [row for row in read_rows(general) if anchors(row)] if general else []
    target = spec.open()
    opened = open_draft(draft, target, base_draft)
    found = coverage(opened.draft, rows, gamma)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "target": target.name,
        "draft": draft,
        "responses": str(responses),
        "coverage": found.to_dict(target.tokenizer),
        "general": coverage(opened.draft, general_rows, gamma).to_dict(target.tokenizer) if general_rows else None,
        "provenance": provenance.collect(seed=seed, device=spec.device),
    }
    refreshed = None
    if refresh:
        assert out is not None
        renewed, refreshed = refresh_vocabulary(opened.draft, target, rows, general_rows, gamma, seed)
        result["refresh"] = _described(refreshed, renewed, target.tokenizer, general_rows, gamma)
        if refreshed.changed:
            meta = {key: opened.meta[key] for key in ("family", "method") if key in opened.meta} | {
                "target": {"name": target.name, "hash": target.content_hash()},
                "tokenizer_hash": tokenizer_hash(target.tokenizer),
                "vocabulary": {key: result["refresh"][key] for key in ("replaced", "map", "notes")},
                "provenance": result["provenance"],
            }
            save_draft(out, half(renewed), meta)
    if report is not None:
        atomic_write_json(report, result)
    return found, refreshed, result


def _described(
    refreshed: RefreshReport, renewed: Any, tokenizer: Any, general_rows: list[Any], gamma: int
) -> dict[str, Any]:
    """The refresh for JSON, with the text of the first 50 tokens that came and went."""

    def words(ids: tuple[int, ...]) -> list[dict[str, Any]]:
        return [{"id": id, "text": tokenizer.decode([id])} for id in ids[:50]]

    rows = refreshed.rows
    return {
        "replaced": len(refreshed.added),
        "coverage": refreshed.after.to_dict(tokenizer),
        "general": coverage(renewed, general_rows, gamma).to_dict(tokenizer) if general_rows else None,
        "added": words(refreshed.added),
        "evicted": words(refreshed.evicted),
        "map": rows and {"kind": rows.kind, "errors": rows.errors},
        "notes": list(refreshed.notes),
    }
