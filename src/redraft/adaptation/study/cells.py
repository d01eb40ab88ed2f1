"""One cell: a draft from its start, trained on its data, measured on what every draft is measured on."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from redraft import provenance
from redraft.acceptance.simulate import expected_rounds_sampled, simulate_greedy_chain
from redraft.adaptation.models import OpenDraft
from redraft.adaptation.stages import half
from redraft.adaptation.study.entries import ANY, NONE, Cell
from redraft.adaptation.study.shared import Asked, Costs, Selected, TargetWork, features_stage, row_tokens, slug
from redraft.artifact import tensors_bytes
from redraft.coarse import Coarse
from redraft.data.template import template_record
from redraft.decode.tree_walk import simulate_tree
from redraft.drafts.experts import merge_private
from redraft.drafts.files import coarse_state, private_state, save_draft
from redraft.drafts.groups import prepare, trained_parameters
from redraft.drafts.methods import mergeable, method
from redraft.drafts.scaling import coarse_change
from redraft.errors import UserError
from redraft.features.store import anchors
from redraft.loading import tokenizer_hash
from redraft.progress import Progress
from redraft.sampling import Sampler
from redraft.starts.apply import StartContext, StartResult, apply_start
from redraft.train.replay import check_replayable
from redraft.train.trainer import TrainConfig, Trainer, TrainResult

CELL_FORMULAS = {
    "generation": f"{provenance.FORWARD_FORMULA}, of every row that had to be generated",
    "selection": f"{provenance.FORWARD_FORMULA}, of every model pass over every row that was scored",
    "features": f"{provenance.FORWARD_FORMULA}, of the rows trained on; none where generation or selection made them",
    "heldout": f"{provenance.FORWARD_FORMULA}, of the held-out prompts' answers, and of their features where not kept",
    "start": provenance.FORWARD_FORMULA,
    "train": f"({provenance.TRAIN_FORMULA}) * unroll",
    "evaluations": f"{provenance.FORWARD_FORMULA} of the draft: gamma steps a held-out position, every evaluation",
}


def run_cell(work: TargetWork, cell: Cell, keep: bool, progress: Progress | None = None) -> dict[str, Any]:
    """Train and measure; the record of the cell for the results. A killed cell goes on where it stopped.

    ``keep`` saves the trained draft beside the record. Raises ``UserError``.
    """
    config = work.config
    opened = work.opened(cell.start)
    old: Any = opened.draft
    selected = work.select(cell.data, cell.selection) if cell.data != ANY else None
    if config.replay_of(cell.method) is not None:
        check_replayable(old)
    started, costs = start_of(work, cell, opened, selected)
    name, size = config.method_of(cell.method), config.size_of(cell.method)
    draft, names = prepare(copy.deepcopy(started.draft), name, size, cell.seed, target=work.target)
    record: dict[str, Any] = {
        "key": cell.key,
        **asdict(cell),
        "settings": asdict(method(name).size(size)) if names else {},
    }
    folder = work.root / "cells" / slug(cell.key)
    if names:
        assert selected is not None
        settings = cell_config(work, cell, selected)
        trainer, results = train(work, draft, cell, selected, settings, folder / "train", progress)
        draft = trainer.draft
        costs.join(selected.costs)
        training_costs(costs, work, trainer, results, selected)
        record |= training_record(trainer, results, selected, settings)
    began = time.monotonic()
    before, parts = half(old), dict[str, Coarse]()
    if names and size.bits is not None:
        draft, parts = coarse_change(draft, before, names, size.bits)
    rounds = measure(work, draft)
    stored = half(draft)
    record |= {
        "trained_parameters": sum(p.numel() for n, p in draft.named_parameters() if n in set(names)),
        "full_parameters": trained_parameters(old, "full"),
        "private_width": getattr(draft.config, "private_width", 0),
        "low_rank": getattr(draft.config, "low_rank", 0),
        "private_bytes": private_bytes(stored, before, names, parts),
        "start_details": started.details,
        "flops": costs.flops,
        "seconds": costs.seconds,
        "measure_seconds": time.monotonic() - began,
        "rounds": rounds,
    }
    if keep:
        save(work, stored, mergeable(name, size), opened, name, folder / "draft")
    return record


def save(work: TargetWork, draft: Any, merge: bool, opened: OpenDraft, method_name: str, folder: Path) -> None:
    """Save the trained draft, merged where it can be, to be measured for speed or kept."""
    meta = {
        "family": draft.family,
        "method": method_name,
        "target": {"name": work.target.name, "hash": work.target.content_hash()},
        "tokenizer_hash": tokenizer_hash(work.target.tokenizer),
        "provenance": provenance.collect(work.config.seed, work.config.device, template_record(work.target.tokenizer)),
    }
    save_draft(folder, merge_private(draft) if merge else draft, meta)


# -- what a cell begins with -------------------------------------------------------------------------------------------
def start_of(work: TargetWork, cell: Cell, opened: OpenDraft, selected: Selected | None) -> tuple[StartResult, Costs]:
    """The draft that training starts from, and what it cost to make (with its data, where nothing is trained)."""
    costs, entry = Costs(), work.config.start_of(cell.start)
    if entry.start == NONE:
        return StartResult(opened.draft), costs
    rows = selected.rows if selected else []
    general = work.config.general
    context = StartContext(
        target=work.target,
        base_target=work.base.target if "base_target" in entry.needs else None,
        rows=rows,
        general_rows=work.general_rows if general and general.mix else (),
        gamma=work.config.gamma,
        seed=work.config.seed,
    )
    began = time.monotonic()
    with work.ledger.stage(f"{work.name}: start {cell.start}") as spent:
        found = apply_start(entry.start, opened.draft, context)
        spent.add(found.tokens, int(found.flops), provenance.FORWARD_FORMULA)
    work.target.tap(opened.draft.config.taps)
    costs.add("start", int(found.flops), time.monotonic() - began)
    if not work.config.trains(cell.method) and selected is not None and "rows" in entry.needs:
        costs.join(selected.costs)
    return found, costs


def cell_config(work: TargetWork, cell: Cell, selected: Selected) -> TrainConfig:
    """The common settings; with a budget of tokens the passes are such that every cell sees the same number.

    That number is ``epochs`` passes over the first data entry of the study, unselected. Passes of replay come out
    of the same budget. Raises ``UserError`` when they leave nothing of it.
    """
    config = work.config.train_config(cell.loss, cell.seed, cell.method)
    epochs, replay = config.epochs, work.config.replay_of(cell.method)
    if work.config.budget == "tokens":
        common = sum(map(anchors, work.rows(next(iter(work.config.data)))))
        epochs *= common / sum(map(anchors, selected.rows))
    if replay:
        epochs -= replay.passes * replay.epochs
        if epochs <= 0:
            raise UserError(f"method {cell.method}: its replay leaves no epoch of the first training; give more")
    return replace(config, epochs=epochs)


def train(
    work: TargetWork,
    draft: Any,
    cell: Cell,
    selected: Selected,
    settings: TrainConfig,
    folder: Path,
    progress: Progress | None,
) -> tuple[Trainer, list[TrainResult]]:
    """Train to the end of the budget, from a checkpoint where there is one; results of replay stand behind the first.

    Raises ``UserError``.
    """
    taps = draft.config.taps
    # Features are built for all rows of the data at once, whatever a cell keeps of them: every cell then trains on
    # the same bits, in whatever order the cells run.
    work.features("heldout", work.heldout, taps)
    store = work.features(cell.data, work.rows(cell.data), taps)
    if work.config.selection_of(cell.selection).general:
        store = work.features("general-mix", work.general_rows, taps)
    trainer = Trainer(draft, work.target, store, selected.rows, work.heldout, settings, folder)
    with work.ledger.stage(f"{work.name}: train") as entry:
        first = trainer.run(progress)
        if not trainer.descent.done_before:
            entry.add(first.anchors, train_flops(trainer, [first]), CELL_FORMULAS["train"])
    again = work.config.replay_of(cell.method)
    if again is None:
        return trainer, [first]
    from redraft.adaptation.replay import replay

    place, quiet = folder / "replay", provenance.Ledger()
    trained, later = replay(
        trainer.draft, work.target, store, trainer.rows, trainer.heldout, settings, again, place, quiet, lambda _: None
    )
    trainer.draft = trained
    for stage in quiet.stages:
        work.ledger.append(replace(stage, stage=f"{work.name}: {stage.stage}"))
    return trainer, [first, *later]


def train_flops(trainer: Trainer, results: Sequence[TrainResult]) -> int:
    """FLOPs of the steps of a training run and of the passes of replay behind it, unrolled as far as a round goes."""
    trained = sum(parameter.numel() for _, parameter in trainer.trained)
    rest = max(0, trainer.draft.parameters_per_token - trained)
    first, *later = results
    positions = first.anchors * trainer.config.unroll + sum(r.anchors for r in later) * trainer.config.gamma
    return provenance.train_flops(trained, positions, rest)


def training_costs(
    costs: Costs, work: TargetWork, trainer: Trainer, results: Sequence[TrainResult], selected: Selected
) -> None:
    """What training itself took, its features and its held-out answers included; generation is counted before."""
    forward = provenance.forward_flops
    taps = trainer.draft.config.taps
    for name in sorted({row.id.partition(":")[0] for row in trainer.rows}):
        stage = features_stage(name, taps)
        tokens = row_tokens([row for row in trainer.rows if row.id.startswith(f"{name}:")])
        if stage not in selected.paid and (flops := work.spent_on(stage, tokens)):
            costs.add("features", flops, work.seconds_of(stage, tokens))
    heldout = row_tokens(trainer.heldout)
    for stage in ("generate heldout", features_stage("heldout", taps)):
        costs.add("heldout", work.spent_on(stage, heldout), work.seconds_of(stage, heldout))
    costs.add("train", train_flops(trainer, results), sum(result.seconds for result in results))
    walked = sum(map(anchors, trainer.heldout)) * sum(len(result.history) for result in results)
    walked += sum(map(anchors, trainer.rows)) * (len(results) - 1)
    costs.add("evaluations", forward(trainer.draft.parameters_per_token, walked * trainer.config.gamma), 0.0)


def training_record(
    trainer: Trainer, results: Sequence[TrainResult], selected: Selected, settings: TrainConfig
) -> dict[str, Any]:
    """What a reader must know of a training run."""
    history: list[tuple[int, float]] = []
    for result in results:
        before = history[-1][0] if history else 0
        history += [(before + step, tau) for step, tau in result.history if step or not before]
    return {
        "rows": len(trainer.rows),
        "tokens": sum(map(anchors, trainer.rows)),
        "kept_rows": len(trainer.rows) / selected.of_rows,
        "kept_tokens": sum(map(anchors, trainer.rows)) / selected.of_tokens,
        "learning_rate": settings.learning_rate,
        "epochs": settings.epochs,
        "steps": sum(result.steps for result in results),
        "trained_tokens": sum(result.anchors for result in results),
        "stopped_early": results[0].stopped_early,
        "heldout": history,
    }


# -- measuring -----------------------------------------------------------------------------------------------------
def measure(work: TargetWork, draft: Any) -> dict[str, list[float]]:
    """Rounds of every prompt of every evaluation set, in the order of the set; expected ones where text is sampled.

    The draft is measured as it is stored, in bfloat16 weights.
    """
    served = half(draft).float().to(work.target.device).eval()
    return {name: rounds_of(work, served, name, asked) for name, asked in work.sets.items()}


def rounds_of(work: TargetWork, draft: Any, name: str, asked: Asked) -> list[float]:
    model, gamma = asked.model, work.config.gamma
    draft.bind(model.target)
    store = model.features(name, asked.rows, draft.config.taps)
    work.tell(f"{work.name}: measure {name}", 0, 1)
    if asked.tree is not None:

        def tell(done: int) -> None:
            work.tell(f"{work.name}: measure {name}", done, len(asked.rows))

        walked = simulate_tree(draft, model.target, asked.rows, store, asked.tree, work.config.evaluation_tokens, tell)
        return [len(walked[row.key]) for row in asked.rows]
    if asked.sampler.greedy:
        accepted = simulate_greedy_chain(draft, model.target, asked.rows, store, gamma)
        return [len(accepted[row.key]) for row in asked.rows]
    sampler = Sampler(asked.sampler.temperature)
    expected = expected_rounds_sampled(draft, model.target, asked.rows, store, gamma, sampler)
    return [expected[row.key] for row in asked.rows]


def private_bytes(draft: Any, old: Any, trained: Sequence[str], coarse: Mapping[str, Coarse]) -> int:
    """Bytes that a target needs beside the shared draft: what is trained, and whatever else is not the old draft's.

    Of a matrix whose rows mostly stand in the old draft, as of a refreshed vocabulary, only the others count; of those
    in ``coarse`` what tells them.
    """
    before = old.state_dict()

    def same(name: str, tensor: torch.Tensor) -> bool:
        return name in before and before[name].shape == tensor.shape and torch.equal(before[name].to(tensor), tensor)

    found = {n: tensor for n, tensor in draft.state_dict().items() if n in trained or not same(n, tensor)}
    whole = {n: tensor for n, tensor in found.items() if n not in coarse}
    return tensors_bytes(private_state(whole, before)[0]) + tensors_bytes(coarse_state(coarse))
