"""One cell: a draft from its start, trained on its data or what a selection keeps of it, measured as every draft is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from redraft import provenance
from redraft.acceptance.simulate import expected_rounds_sampled, simulate_greedy_chain
from redraft.adaptation.core import Adaptation, Plan
from redraft.adaptation.runs import half, row_tokens
from redraft.adaptation.study.records import MEND, Scored
from redraft.adaptation.study.targets import Asked, TargetWork, features_stage, slug
from redraft.artifact import read_sealed, tensors_bytes, write_sealed
from redraft.data.store import Row, read_rows
from redraft.decode.tree import simulate_tree
from redraft.drafts.files import private_state
from redraft.drafts.groups import trained_parameters
from redraft.drafts.opening import OpenDraft
from redraft.drafts.scaling import Coarse
from redraft.errors import UserError
from redraft.inputs import typed
from redraft.provenance import Entry, Ledger
from redraft.rows import anchors, mix
from redraft.seals import digest
from redraft.selection import PromptRow, score_rows
from redraft.selection.manifest import select as select_rows
from redraft.selection.states import scoring_context
from redraft.settings.sampler import Sampler
from redraft.settings.studies import ANY, NONE, Cell, SelectionEntry
from redraft.settings.texts import parse_scorer
from redraft.settings.training import ReplayConfig, TrainConfig, method
from redraft.starts.apply import StartContext
from redraft.training.trainer import check_replayable

SCORES = "redraft.study-scores/1"
CELL_FORMULAS = {
    "generation": f"{provenance.FORWARD_FORMULA}, of every row that had to be generated",
    "selection": f"{provenance.FORWARD_FORMULA}, of every model pass over every row that was scored",
    "features": f"{provenance.FORWARD_FORMULA}, of the rows trained on; none where generation or selection made them",
    "heldout": f"{provenance.FORWARD_FORMULA}, of the held-out prompts' answers, and of their features where not kept",
    "start": provenance.FORWARD_FORMULA,
    "train": f"({provenance.TRAIN_FORMULA}) * unroll",
    "evaluations": f"{provenance.FORWARD_FORMULA} of the draft: gamma steps a held-out position, every evaluation",
}


def run_cell(work: TargetWork, cell: Cell, keep: bool) -> dict[str, Any]:
    """Train and measure; the record of the cell for the results. A killed cell goes on where it stopped.

    ``keep`` saves the trained draft beside the record. Raises ``UserError``.
    """
    opened = work.opened(cell.start)
    selected = select(work, cell.data, cell.selection) if cell.data != ANY else None
    job = adaptation_of(work, cell, opened, selected)
    costs = started(work, cell, job, selected)
    job.prepare()
    size = job.plan.size
    record: dict[str, Any] = {
        "key": cell.key,
        **asdict(cell),
        "settings": asdict(method(job.plan.method).size(size)) if job.trained else {},
    }
    if job.trained:
        assert selected is not None
        train(work, cell, job, selected)
        spend_all(costs, selected.costs)
        training_costs(costs, work, job, selected)
        record |= training_record(job, selected)
    began = time.monotonic()
    draft, parts = job.stored
    rounds = measure(work, draft)
    names = set(job.trained)
    record |= {
        "trained_parameters": sum(p.numel() for n, p in draft.named_parameters() if n in names),
        "full_parameters": trained_parameters(opened.draft, "full"),
        "private_width": getattr(draft.config, "private_width", 0),
        "low_rank": getattr(draft.config, "low_rank", 0),
        "private_bytes": private_bytes(draft, half(opened.draft), job.trained, parts),
        "start_details": job.started.details,
        "flops": {entry.stage: entry.flops for entry in costs.stages},
        "seconds": {entry.stage: entry.seconds for entry in costs.stages},
        "measure_seconds": time.monotonic() - began,
        "rounds": rounds,
    }
    if keep:
        job.save_whole(cell_folder(work.root, cell) / "draft")
    return record


def cell_folder(root: Path, cell: Cell) -> Path:
    """Where a cell's training, its record and its draft are."""
    return root / "cells" / slug(cell.key)


def adaptation_of(work: TargetWork, cell: Cell, opened: OpenDraft, selected: Selected | None) -> Adaptation:
    """The cell's training, its features where all of the target's are. Raises ``UserError``."""
    config, folder = work.config, cell_folder(work.root, cell)
    replay = config.entry_of(cell.method).replay_config or ReplayConfig()
    if replay.passes:
        check_replayable(opened.draft)
    plan = Plan(
        config.method_of(cell.method),
        config.entry_of(cell.method).size,
        cell_config(work, cell, selected) if selected and config.trains(cell.method) else TrainConfig(seed=cell.seed),
        config.start_of(cell.start).start,
        replay,
    )
    store = work.store(tuple(opened.draft.config.taps))
    return Adaptation(work.target, opened, plan, folder, work.log, store, folder / "train" / "replay")


def cell_config(work: TargetWork, cell: Cell, selected: Selected) -> TrainConfig:
    """The common settings; with a budget of tokens the passes are such that every cell sees the same number.

    That number is ``epochs`` passes over the first data entry of the study, unselected. Passes of replay come out
    of the same budget. Raises ``UserError`` when they leave nothing of it.
    """
    config = work.config.train_config(cell.loss, cell.seed, cell.method)
    epochs, replay = config.epochs, work.config.entry_of(cell.method).replay_config
    if work.config.budget == "tokens":
        common = sum(map(anchors, work.rows(next(iter(work.config.data)))))
        epochs *= common / sum(map(anchors, selected.rows))
    if replay:
        epochs -= replay.passes * replay.epochs
        if epochs <= 0:
            raise UserError(f"method {cell.method}: its replay leaves no epoch of the first training; give more")
    return replace(config, epochs=epochs)


def started(work: TargetWork, cell: Cell, job: Adaptation, selected: Selected | None) -> Ledger:
    """Make what training starts from; what that cost (with its data, where nothing is trained)."""
    costs, entry = Ledger(), work.config.start_of(cell.start)
    if entry.start == NONE:
        return costs
    general = work.config.general

    def context() -> StartContext:
        return StartContext(
            target=work.target,
            base_target=work.base.target if "base_target" in entry.needs else None,
            rows=selected.rows if selected else [],
            general_rows=work.general_rows if general and general.mix else (),
            gamma=work.config.gamma,
            seed=work.config.seed,
        )

    began = time.monotonic()
    job.start(context, cell.start)
    spend(costs, "start", job.started.flops, time.monotonic() - began)
    if not work.config.trains(cell.method) and selected is not None and "rows" in entry.needs:
        spend_all(costs, selected.costs)
    return costs


def train(work: TargetWork, cell: Cell, job: Adaptation, selected: Selected) -> None:
    """Train to the end of the budget, from a checkpoint where there is one. Raises ``UserError``.

    Features are built for all rows of the data at once, whatever a cell keeps of them: every cell then trains on
    the same bits, in whatever order the cells run.
    """
    taps = tuple(job.draft.config.taps)
    work.features("heldout", work.heldout, taps)
    work.features(cell.data, work.rows(cell.data), taps)
    if work.config.selection_of(cell.selection).general:
        work.features("general-mix", work.general_rows, taps)
    job.train(selected.rows, work.heldout)


def training_costs(costs: Ledger, work: TargetWork, job: Adaptation, selected: Selected) -> None:
    """What training itself took, its features and its held-out answers included; generation is counted before."""
    taps, rows, heldout, results = job.draft.config.taps, selected.rows, work.heldout, job.results
    for name in sorted({row.id.partition(":")[0] for row in rows}):
        stage = features_stage(name, taps)
        tokens = row_tokens([row for row in rows if row.id.startswith(f"{name}:")])
        if stage not in selected.paid and (flops := work.spent_on(stage, tokens)):
            spend(costs, "features", flops, work.seconds_of(stage, tokens))
    for stage in ("generate heldout", features_stage("heldout", taps)):
        tokens = row_tokens(heldout)
        spend(costs, "heldout", work.spent_on(stage, tokens), work.seconds_of(stage, tokens))
    spend(costs, "train", job.flops, sum(result.seconds for result in results))
    walked = sum(map(anchors, heldout)) * sum(len(result.history) for result in results)
    walked += sum(map(anchors, rows)) * (len(results) - 1)
    flops = provenance.forward_flops(job.draft.parameters_per_token, walked * job.plan.train.gamma)
    spend(costs, "evaluations", flops, 0.0)


def training_record(job: Adaptation, selected: Selected) -> dict[str, Any]:
    """What a reader must know of a training, replay included."""
    history: list[tuple[int, float]] = []
    for result in job.results:
        before = history[-1][0] if history else 0
        history += [(before + step, tau) for step, tau in result.history if step or not before]
    tokens = sum(map(anchors, selected.rows))
    return {
        "rows": len(selected.rows),
        "tokens": tokens,
        "kept_rows": len(selected.rows) / selected.of_rows,
        "kept_tokens": tokens / selected.of_tokens,
        "learning_rate": job.plan.train.learning_rate,
        "epochs": job.plan.train.epochs,
        "steps": sum(result.steps for result in job.results),
        "trained_tokens": sum(result.anchors for result in job.results),
        "stopped_early": job.results[0].stopped_early,
        "heldout": history,
    }


# -- what a cell trains on, and what it cost to get there -------------------------------------------------------------
@dataclass
class Selected:
    """The rows of a cell, of how many, and what they cost; ``paid``: the stages of features that are in that cost."""

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
        spend(costs, entry.stage, entry.flops, entry.seconds)


def select(work: TargetWork, data: str, selection: str) -> Selected:
    """The rows that a cell trains on, with the costs of making and choosing them. Raises ``UserError``."""
    found: Selected | None = work.selected.get((data, selection))
    if found is not None:
        return found
    entry, rows, costs, paid = work.config.selection_of(selection), work.rows(data), Ledger(), frozenset[str]()
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
    work.selected[data, selection] = found = Selected(kept, len(rows), sum(map(anchors, rows)), costs, paid)
    return found


def _spend_generation(work: TargetWork, name: str, rows: Sequence[Row], costs: Ledger) -> None:
    tokens = row_tokens(rows)
    flops = provenance.forward_flops(work.target.parameters_per_token, tokens)
    spend(costs, "generation", flops, work.seconds_of(f"generate {name}", tokens))


def _scores(work: TargetWork, data: str, entry: SelectionEntry) -> tuple[list[Any], list[float], int, float]:
    """(what is scored, scores, FLOPs, seconds); scores are kept in a file, for every budget is cut from them."""
    assert entry.scorer is not None
    rows: list[Any] = list(work.rows(data))
    if entry.on == "prompts":
        rows = list({row.id: PromptRow(row.id, row.prompt_ids) for row in reversed(rows) if row.turn == 0}.values())
    what = f"{data} {entry.on} {entry.scorer}"
    path, of = work.folder / "scores" / f"{slug(what)}.json", digest([what, sorted(row.key for row in rows)])
    if not path.exists():
        store = work.features(data, rows, work.taps) if entry.reads_features else None
        scorer, target, old = parse_scorer(entry.scorer), work.target, work.opened(NONE).draft
        stage, tokens = f"score {data} by {entry.scorer} on {entry.on}", row_tokens(rows)
        base, seed = (lambda: work.base.target), work.config.seed
        with work.log.counted(stage, len(rows), "rows") as (spent, progress):
            context = scoring_context(scorer, target, old, base, seed, work.folder, progress, store)
            scores, passes, flops = score_rows(scorer, rows, context), scorer.passes, 0
            if "alpha_of" in scorer.needs:
                flops = provenance.forward_flops(old.parameters_per_token, tokens)
                # Its pass of the target is for features: of responses they are kept, or have a stage of their own.
                passes -= entry.reads_features
            flops += passes * provenance.forward_flops(target.parameters_per_token, tokens)
            spent.add(tokens, flops, provenance.FORWARD_FORMULA)
        found = {row.key: score for row, score in zip(rows, scores, strict=True)}
        seconds = work.log.entry(stage).seconds
        write_sealed(path, {"flops": flops, "seconds": seconds, "scores": found}, SCORES, of)
    stored = read_sealed(path, SCORES, of, "delete it and give the same command again, which scores anew")
    typed(Scored, stored, str(path), MEND)
    if missing := next((row.key for row in rows if row.key not in stored["scores"]), None):
        raise UserError(f"{path}: no score of {missing}; {MEND}")
    return rows, [stored["scores"][row.key] for row in rows], stored["flops"], stored["seconds"]


# -- measuring -----------------------------------------------------------------------------------------------------
def measure(work: TargetWork, draft: Any) -> dict[str, list[float]]:
    """Rounds of every prompt of every evaluation set, in the order of the set; expected ones where text is sampled.

    The draft is measured as it is stored, in bfloat16 weights.
    """
    served = half(draft).float().to(work.target.device).eval()
    return {name: rounds_of(work, served, name, asked) for name, asked in work.sets.items()}


def rounds_of(work: TargetWork, draft: Any, name: str, asked: Asked) -> list[float]:
    model, rows, gamma = asked.model, asked.rows, work.config.gamma
    draft.bind(model.target)
    store = model.features(name, rows, draft.config.taps)
    with work.log.bar(f"{work.name}: measure {name}", len(rows), "answers") as progress:
        progress.update(0)
        if asked.tree is not None:
            most, tell = work.config.evaluation_tokens, progress.update
            walked = simulate_tree(draft, model.target, rows, store, asked.tree, most, tell)
            return [len(walked[row.key]) for row in rows]
    if asked.sampler.greedy:
        accepted = simulate_greedy_chain(draft, model.target, rows, store, gamma)
        return [len(accepted[row.key]) for row in rows]
    expected = expected_rounds_sampled(draft, model.target, rows, store, gamma, Sampler(asked.sampler.temperature))
    return [expected[row.key] for row in rows]


def private_bytes(draft: Any, old: Any, trained: Sequence[str], coarse: Mapping[str, Coarse]) -> int:
    """Bytes that a target needs beside the shared draft: what is trained, and whatever else is not the old draft's.

    Of a matrix whose rows mostly stand in the old draft, as of a refreshed vocabulary, only the others count; of those
    in ``coarse`` what tells them.
    """
    before = old.state_dict()

    def same(name: str, tensor: torch.Tensor) -> bool:
        return name in before and before[name].shape == tensor.shape and torch.equal(before[name].to(tensor), tensor)

    found = {n: tensor for n, tensor in draft.state_dict().items() if n in trained or not same(n, tensor)}
    return tensors_bytes(private_state(found, before, coarse)[0])
