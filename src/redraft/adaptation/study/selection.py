"""What a cell trains on: all rows of its data or those that a selection keeps, and what it cost to get there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from redraft import provenance
from redraft.adaptation.runs import row_tokens
from redraft.adaptation.study.answers import features_stage, slug
from redraft.adaptation.study.targets import TargetWork
from redraft.artifact import atomic_write_json, read_json
from redraft.data.store import Row, read_rows
from redraft.progress import Progress
from redraft.provenance import Entry, Ledger
from redraft.rows import anchors, mix
from redraft.selection import PromptRow, score_rows
from redraft.selection.manifest import select as select_rows
from redraft.selection.states import scoring_context
from redraft.settings.studies import NONE, SelectionEntry
from redraft.settings.texts import parse_scorer


@dataclass
class Selected:
    """What a cell trains on, and what it cost to get there; ``paid``: the stages of features that are in that cost."""

    rows: list[Row]
    of_rows: int
    of_tokens: int
    costs: Ledger
    paid: frozenset[str]


def spend(costs: Ledger, stage: str, flops: int, seconds: float) -> None:
    """Put FLOPs and seconds into the account of a cell."""
    costs.append(Entry(stage, flops=int(flops), seconds=seconds))


def spend_all(costs: Ledger, others: Ledger) -> None:
    """Put all of another account into that of a cell."""
    for entry in others.stages:
        costs.append(replace(entry))


def select(work: TargetWork, data: str, selection: str) -> Selected:
    """The rows that a cell trains on, with the costs of making and choosing them. Raises ``UserError``."""
    if (data, selection) not in work.selected:
        work.selected[data, selection] = _select(work, data, work.config.selection_of(selection))
    found: Selected = work.selected[data, selection]
    return found


def _select(work: TargetWork, data: str, entry: SelectionEntry) -> Selected:
    rows, costs, paid = work.rows(data), Ledger(), frozenset[str]()
    kept = generated = rows
    if entry.scorer is not None:
        scored, scores, flops, seconds = _scores(work, data, entry)
        chosen = set(select_rows(scored, scores, entry.budget, entry.order).selected_keys)
        if entry.on == "prompts":
            kept = generated = [row for row in rows if row.id in chosen]
        else:
            kept = [row for row in rows if row.key in chosen]
        spend(costs, "selection", flops, seconds)
        if entry.reads_features:
            stage, tokens = features_stage(data, work.taps), row_tokens(rows)
            spend(costs, "selection", work.spent_on(stage, tokens), work.seconds_of(stage, tokens))
            paid = frozenset([stage])
    kind = work.config.data[data].kind
    if kind in ("regenerated", "self"):
        _spend_generation(work, data, generated, costs)
    if kind == "self":
        # The answers of a selection may be spared, the questions that it chooses from may not.
        _spend_generation(work, f"{data} questions", read_rows(work.questions_path(data)), costs)
    if entry.general:
        before = {row.key for row in kept}
        kept = mix(kept, work.general_rows, entry.general, work.config.seed)
        _spend_generation(work, "general-mix", [row for row in kept if row.key not in before], costs)
    return Selected(kept, len(rows), sum(map(anchors, rows)), costs, paid)


def _spend_generation(work: TargetWork, name: str, rows: Sequence[Row], costs: Ledger) -> None:
    tokens = row_tokens(rows)
    flops = provenance.forward_flops(work.target.parameters_per_token, tokens)
    spend(costs, "generation", flops, work.seconds_of(f"generate {name}", tokens))


def _scores(work: TargetWork, data: str, entry: SelectionEntry) -> tuple[list[Any], list[float], int, float]:
    """(what is scored, scores, FLOPs, seconds); scores are kept in a file, for every budget is cut from them."""
    rows: list[Any] = list(work.rows(data))
    if entry.on == "prompts":
        rows = list({row.id: PromptRow(row.id, row.prompt_ids) for row in reversed(rows) if row.turn == 0}.values())
    path = work.folder / "scores" / f"{slug(f'{data} {entry.on} {entry.scorer}')}.json"
    if not path.exists():
        if entry.reads_features:
            work.features(data, rows, work.taps)
        stage = f"score {data} by {entry.scorer} on {entry.on}"
        with work.log.counted(stage, len(rows), "rows") as (spent, progress):
            scores, flops = _score(work, rows, entry, progress)
            spent.add(row_tokens(rows), flops, provenance.FORWARD_FORMULA)
        found = {row.key: score for row, score in zip(rows, scores, strict=True)}
        atomic_write_json(path, {"flops": flops, "seconds": work.log.entry(stage).seconds, "scores": found})
    stored = read_json(path)
    return rows, [stored["scores"][row.key] for row in rows], stored["flops"], stored["seconds"]


def _score(work: TargetWork, rows: Sequence[Any], entry: SelectionEntry, progress: Progress) -> tuple[list[float], int]:
    """(scores, FLOPs) of these rows."""
    assert entry.scorer is not None
    scorer, target, old = parse_scorer(entry.scorer), work.target, work.opened(NONE).draft
    store = work.store(work.taps) if entry.reads_features else None
    base, seed = (lambda: work.base.target), work.config.seed
    context = scoring_context(scorer, target, old, base, seed, work.folder, progress, store)
    scores, passes, tokens, flops = score_rows(scorer, rows, context), scorer.passes, row_tokens(rows), 0
    if "alpha_of" in scorer.needs:
        flops = provenance.forward_flops(old.parameters_per_token, tokens)
        # Its pass of the target is for features: of responses they are kept, or have a stage of their own.
        passes -= entry.reads_features
    return scores, flops + passes * provenance.forward_flops(target.parameters_per_token, tokens)
