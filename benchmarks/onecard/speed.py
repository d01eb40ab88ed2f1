"""Training steps at the shapes of the drafts of large targets: positions a second, memory, the optimiser's share, and
the share of the rate that plain products of the same sizes reach here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from onecard.common import GIB, Operations, RandomFeatures, Section, Shape, make_draft, make_head, make_rows
from redraft.drafts.groups import prepare
from redraft.rows import anchors
from redraft.settings.training import PrivateSize, TrainConfig
from redraft.target import Head
from redraft.training.optimizer import make_optimizers
from redraft.training.trainer import Trainer

SHAPES = {
    "8B": Shape(4096, 32, 8, 14336, 128256, 32000, layers=32),
    "70B": Shape(8192, 64, 8, 28672, 128256, 32000, layers=80),
}
TINY = {"8B": Shape(32, 4, 2, 64, 128, 64), "70B": Shape(64, 4, 2, 128, 128, 64)}
# Rows of a step: how many, of how many tokens.
ROWS = ((4, 1024), (1, 4096), (1, 16384))
TINY_ROWS = ((4, 16), (1, 64))
METHODS = ("lora", "full")
RANK, STEPS = 32, 3


def run(section: Section) -> None:
    shapes, lengths = (TINY, TINY_ROWS) if section.tiny else (SHAPES, ROWS)
    # The long rows come last: what they cost, memory or time, costs the others nothing.
    for count, length in lengths:
        for name, shape in shapes.items():
            head = make_head(shape, section.device, torch.bfloat16)
            features = RandomFeatures(shape, section.device, torch.bfloat16)
            for method in METHODS:
                work = Steps(section, shape, head, features, method, count, length)
                section.attempt(f"{name}, {method}, {count} x {length}", work.measure, least=0 if section.tiny else 8)
            del head, features, work


class Steps:
    """Steps of one method at one shape."""

    def __init__(
        self, section: Section, shape: Shape, head: Head, features: RandomFeatures, method: str, count: int, length: int
    ) -> None:
        self.section, self.shape, self.head, self.features = section, shape, head, features
        self.method, self.rows = method, make_rows([length] * count, shape.draft_vocabulary)

    def measure(self) -> dict[str, Any]:
        """The middle one of a few steps behind one that warms up."""
        section, positions = self.section, sum(map(anchors, self.rows))
        draft, _ = prepare(make_draft(self.shape, section.device), self.method, PrivateSize(rank=RANK))
        config = TrainConfig(batch_anchors=positions)
        folder = Path(section.work) / f"{self.method}-{len(list(Path(section.work).iterdir()))}"
        trainer = Trainer(draft, self.head, self.features, self.rows, self.rows[:1], config, folder)
        del draft
        optimizers = make_optimizers(trainer.trained, config.optimizer, config.weight_decay)
        spent = self.timed(optimizers)
        began = time.perf_counter()
        batch = trainer.objective.collate(self.rows, self.features)
        collated = time.perf_counter() - began
        moving = section.seconds_of(lambda: batch.to(section.device), repeats=2)
        ready = batch.to(section.device)
        part = lambda: trainer.part(ready)  # noqa: E731
        with Operations() as counted:
            trainer.loop.loss(part, 0).backward()
        found = list[tuple[float, float]]()
        for number in range(1 + (1 if section.tiny else STEPS)):
            section.wait()
            began = time.perf_counter()
            trainer.loop.step([part], optimizers, number)
            section.wait()
            found.append((time.perf_counter() - began, spent[-1]))
        seconds, optimiser = sorted(found[1:])[len(found[1:]) // 2]
        rate = self.rate(min(positions, 4096))
        trained, every = (sum(p.numel() for p in found) for found in self.parameters(trainer))
        return {
            "positions": positions,
            "step_seconds": round(seconds, 5),
            "positions_per_second": round(positions / seconds, 1),
            "optimiser_share": round(optimiser / seconds, 4),
            "optimiser": config.optimizer,
            "collate_seconds": round(collated, 4),
            "to_the_device_seconds": round(moving, 4),
            "operations": counted.total,
            "operations_per_second": round(counted.total / (seconds - optimiser)),
            "products_operations_per_second": round(rate),
            "share_of_the_rate_of_products": round(counted.total / (seconds - optimiser) / rate, 4),
            "trained_parameters": trained,
            "parameters": every,
            "weights_gib": round(sum(p.nbytes for p in self.parameters(trainer)[1]) / GIB, 3),
        }

    def timed(self, optimizers: Any) -> list[float]:
        """The seconds of every step of the optimisers from now on, the device's work included."""
        spent, plain = [], optimizers.step

        def step(learning_rate: float) -> None:
            self.section.wait()
            began = time.perf_counter()
            plain(learning_rate)
            self.section.wait()
            spent.append(time.perf_counter() - began)

        optimizers.step = step
        return spent

    def rate(self, rows: int) -> float:
        """Operations a second of the draft's largest product at this number of rows, in bfloat16."""
        shape, device = self.shape, self.section.device
        states = torch.randn(rows, shape.hidden, device=device, dtype=torch.bfloat16)
        weight = torch.randn(shape.inner, shape.hidden, device=device, dtype=torch.bfloat16)
        seconds = self.section.seconds_of(lambda: states @ weight.T, repeats=10, warm_ups=3)
        return 2 * rows * shape.hidden * shape.inner / seconds

    @staticmethod
    def parameters(trainer: Trainer) -> tuple[list[Any], list[Any]]:
        """What is trained, and all."""
        return [p for _, p in trainer.trained], list(trainer.draft.parameters())
