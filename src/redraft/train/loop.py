"""The training loop: batches in a reproducible order, early stop on held-out tau, bit-identical resume."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.data.store import Row
from redraft.drafts.base import Draft
from redraft.errors import UserError
from redraft.progress import Progress
from redraft.target import Target
from redraft.teacher.features import FeatureStore, anchors
from redraft.teacher.simulate import anchor_batches, simulate_greedy_chain, tau_of
from redraft.teacher.unroll import Batch, collate
from redraft.train.aim import STEPS, aim_updates, settle, waiting
from redraft.train.checkpoint import Checkpoint, rows_digest
from redraft.train.objective import Objective, make_objective
from redraft.train.optimizer import Optimizers, learning_rate, make_optimizers


@dataclass(frozen=True)
class TrainConfig:
    """How to train. ``batch_anchors`` counts supervised positions a step; ``unroll`` is EAGLE-3's J."""

    loss: str = "kl"
    epochs: float = 3.0
    batch_anchors: int = 1536
    unroll: int = 3
    step_decay: float = 0.8
    learning_rate: float = 1e-3
    optimizer: str = "muon"
    weight_decay: float = 0.01
    clip: float = 1.0
    gamma: int = 5
    evaluate_every: int = 25
    patience: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ``UserError`` for a setting that would train nothing, or without end."""
        for name in ("epochs", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"training setting {name} must be above 0 and finite, not {getattr(self, name)!r}")
        for name in ("batch_anchors", "unroll", "gamma", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"training setting {name} must be 1 or more, not {getattr(self, name)!r}")


@dataclass
class TrainResult:
    """The outcome. ``anchors`` counts supervised positions, those that low-rank updates were aimed by included;
    ``history`` lists every evaluation as (step, held-out tau)."""

    best_tau: float
    start_tau: float
    steps: int
    anchors: int
    seconds: float
    stopped_early: bool
    history: list[tuple[int, float]]


def batch_order(rows: Sequence[Row], config: TrainConfig, epoch: int) -> list[list[Row]]:
    """The batches of an epoch, a function of seed and epoch: similar lengths together, batches shuffled."""
    order = random.Random(f"{config.seed}/{epoch}")
    shuffled = sorted((r for r in rows if anchors(r)), key=lambda r: r.key)
    order.shuffle(shuffled)
    pool = 16 * max(1, config.batch_anchors // max(1, sum(map(anchors, shuffled)) // max(1, len(shuffled))))
    pools = [shuffled[i : i + pool] for i in range(0, len(shuffled), pool)]
    batches = [batch for rows in pools for batch in anchor_batches(rows, config.batch_anchors)]
    order.shuffle(batches)
    return batches


class Trainer:
    """Trains the parameters that require a gradient; everything else of the draft stays as it is."""

    def __init__(
        self,
        draft: Draft,
        target: Target,
        store: FeatureStore,
        rows: Sequence[Row],
        heldout: Sequence[Row],
        config: TrainConfig,
        folder: Path,
    ) -> None:
        """Raises ``UserError`` when no row can be supervised or the folder belongs to another config."""
        self.draft, self.target, self.store, self.config = draft.to(target.device), target, store, config
        self.rows = [r for r in rows if anchors(r)]
        self.heldout = [r for r in heldout if anchors(r)]
        if not self.rows or not self.heldout:
            raise UserError("no row has two or more response tokens to train or to evaluate on; give longer responses")
        self.objective = self.new_objective()
        self.trained = [(n, p) for n, p in draft.named_parameters() if p.requires_grad]
        identity = {
            "config": asdict(config),
            "trained": [n for n, _ in self.trained],
            "rows": rows_digest([r.key for r in self.rows]),
        }
        self.checkpoint = Checkpoint(folder, identity)
        self.curve = folder / "curve.jsonl"
        per_epoch = len(batch_order(self.rows, config, 0))
        self.total_steps = max(1, round(config.epochs * per_epoch))

    def new_objective(self) -> Objective:
        """What a step minimises: by default what the draft's family trains with."""
        return make_objective(self.draft, self.target, self.config)

    def evaluate(self) -> float:
        """tau_pooled of a greedy chain on the held-out rows."""
        self.draft.eval()
        accepted = simulate_greedy_chain(self.draft, self.target, self.heldout, self.store, self.config.gamma)
        self.draft.train()
        return tau_of(accepted, self.heldout)

    # -- the loop ----------------------------------------------------------------------------------------------
    def run(self, reporter: Progress | None = None) -> TrainResult:
        """Train to the end of the budget or until held-out tau has not risen for ``patience`` evaluations.

        On return the draft holds the weights of the best evaluation. A killed run, started again with the same
        arguments, ends with the same bits.
        """
        optimizers = make_optimizers(self.trained, self.config.optimizer, self.config.weight_decay)
        state = self.checkpoint.load(self.trained, optimizers)
        if state is None:
            began = time.monotonic()
            state = {"step": 0, "anchors": 0, "aimed": self.aim(), "seconds": time.monotonic() - began}
            tau = self.evaluate()
            state |= {"best": tau, "start": tau, "best_step": 0}
            state["history"] = [[0, tau]]
            self.curve.write_text("")
            self.checkpoint.save_best(self.trained)
            self.checkpoint.save(self.trained, optimizers, state)
        settle(self.draft)
        began = time.monotonic() - state["seconds"]
        while state["step"] < self.total_steps and not self.exhausted(state):
            self.segment(optimizers, state, reporter, began)
        self.checkpoint.load_best(self.trained)
        return TrainResult(
            best_tau=state["best"],
            start_tau=state["start"],
            steps=state["step"],
            anchors=state["anchors"] + state.get("aimed", 0),
            seconds=state["seconds"],
            stopped_early=state["step"] < self.total_steps,
            history=[(int(step), float(tau)) for step, tau in state["history"]],
        )

    def aim(self) -> int:
        """Turn new low-rank updates to where the gradient of the first steps is; the supervised positions it took."""
        if not waiting(self.draft):
            return 0
        seen = []

        def backward() -> None:
            self.draft.train()
            for step, (batch, size) in enumerate(self.batches(0, min(STEPS, self.total_steps))):
                self.loss(batch, step).backward()
                seen.append(size)

        aim_updates(self.draft, backward)
        return sum(seen)

    def exhausted(self, state: dict[str, Any]) -> bool:
        return state["step"] - state["best_step"] >= self.config.patience * self.config.evaluate_every

    def segment(self, optimizers: Optimizers, state: dict[str, Any], reporter: Progress | None, began: float) -> None:
        """Steps up to the next evaluation, the evaluation, and a checkpoint."""
        config, losses = self.config, []
        end = min(self.total_steps, state["step"] + config.evaluate_every)
        for batch, size in self.batches(state["step"], end):
            losses.append(self.step(batch, optimizers, state["step"]))
            state["step"] += 1
            state["anchors"] += size
            if reporter:
                tau = state["history"][-1][1]
                reporter.update(state["anchors"], loss=losses[-1], heldout_tau=tau, step=state["step"])
        tau = self.evaluate()
        state["seconds"] = time.monotonic() - began
        state["history"].append([state["step"], tau])
        if tau > state["best"]:
            state["best"], state["best_step"] = tau, state["step"]
            self.checkpoint.save_best(self.trained)
        entry = {"step": state["step"], "tokens": state["anchors"], "seconds": round(state["seconds"], 1)}
        with self.curve.open("a") as file:
            file.write(json.dumps({**entry, "loss": sum(losses) / len(losses), "heldout_tau": tau}) + "\n")
        self.checkpoint.save(self.trained, optimizers, state)

    def batches(self, begin: int, end: int) -> Any:
        """Collated batches of steps ``begin`` to ``end`` with their anchor counts."""
        epoch, order, offset = 0, batch_order(self.rows, self.config, 0), 0
        for step in range(begin, end):
            while step - offset >= len(order):
                offset, epoch = offset + len(order), epoch + 1
                order = batch_order(self.rows, self.config, epoch)
            rows = order[step - offset]
            yield self.collated(rows).to(self.target.device), sum(map(anchors, rows))

    def collated(self, rows: Sequence[Row]) -> Batch:
        """The batch of these rows, as the objective reads it."""
        return collate(rows, self.store, self.config.unroll)

    def step(self, batch: Batch, optimizers: Optimizers, step: int) -> float:
        """One optimiser step. Raises ``UserError`` on a loss that is not finite, before anything is changed."""
        loss = self.loss(batch, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in self.trained], self.config.clip)
        optimizers.step(learning_rate(step, self.total_steps, self.config.learning_rate))
        return float(loss.detach())

    def loss(self, batch: Batch, step: int) -> Tensor:
        """The loss of a step. Raises ``UserError`` when it is not finite."""
        device = self.target.device
        # What an objective draws is a function of seed and step, so that a resumed run draws the same.
        cards = [device] if device.type == "cuda" else []
        with (
            torch.random.fork_rng(cards),
            torch.autocast(device.type, torch.bfloat16, enabled=self.target.dtype == torch.bfloat16),
        ):
            torch.manual_seed(random.Random(f"{self.config.seed}/{step}").getrandbits(63))
            loss = self.objective(batch)
        value = float(loss.detach())
        if value != value or value in (float("inf"), float("-inf")):
            raise UserError(f"loss became {value} at step {step}; lower the learning rate (the last checkpoint stays)")
        return loss
