"""Distillation of a causal LM from a target's responses, under any loss of the registry, with plain text mixed in.

One teacher-forced pass gives the draft's distribution at every response token (prompts are read and not supervised);
the teacher's comes from ``training/teachers.py``. As everywhere here, the first response token comes from prefill and
is nobody's to draft. Text, with next-token cross-entropy, is mixed in by a share of all supervised tokens (0.1 is the
9:1 of Goel et al., arXiv 2403.00858) to keep the draft from forgetting what its pretraining gave it.

Memory does not grow with vocabulary times sequence: head and loss run over portions of positions. A loss with batch
statistics gets those of the whole optimiser step, over all micro-batches and workers. A loss over chains sees, at
every position, the ``gamma`` next ones as the steps of a chain, for that is what a round drafts.

Shape legend: M supervised positions of a micro-batch, N those of a portion, J steps of a chain, H width, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.data.packed import PackedText, Position, ahead
from redraft.data.store import Row
from redraft.drafts.standalone.objective import CausalModel, Distillation, Teacher, size
from redraft.errors import UserError
from redraft.progress import Progress
from redraft.rows import anchors
from redraft.settings.training import DistilConfig
from redraft.training.checkpoint import rows_digest
from redraft.training.loop import LoopResult, Step, TrainingLoop
from redraft.training.workers import SINGLE, Shares, Workers


def groups(rows: Sequence[Row], limit: int, weigh: Callable[[Row], int]) -> list[list[Row]]:
    """Rows in their order, in groups that weigh at most ``limit``; a row that weighs more stands alone."""
    found: list[list[Row]] = []
    held = 0
    for row in rows:
        if not found or held + weigh(row) > limit:
            found.append([])
            held = 0
        found[-1].append(row)
        held += weigh(row)
    return found


def step_order(rows: Sequence[Row], config: DistilConfig, epoch: int) -> list[list[Row]]:
    """The rows of every step of an epoch: a function of seed and epoch."""
    order = sorted((row for row in rows if anchors(row)), key=lambda row: row.key)
    random.Random(f"{config.seed}/{epoch}").shuffle(order)
    return groups(order, config.batch_anchors, anchors)


# -- steps -----------------------------------------------------------------------------------------------------------
class MixedSteps:
    """Optimiser steps of responses with blocks of text among them."""

    def __init__(
        self,
        distillation: Distillation,
        rows: Sequence[Row],
        config: DistilConfig,
        text: PackedText | None,
        shares: Shares | None = None,
    ) -> None:
        """``shares`` divides every step among the workers; ``distillation`` sums by it."""
        self.distillation, self.rows, self.config, self.text = distillation, rows, config, text
        self.causal, self.shares = distillation.causal, shares or Shares(SINGLE)

    def steps(self, begin: int, position: dict[str, Any]) -> Iterator[Step]:
        """Steps from number ``begin`` on, without end. ``position`` has the place in the text and the text's tokens
        that are owed to the mix."""
        at, owed = Position.of(position.get("text")), float(position.get("owed", 0.0))
        text, share = self.text, self.config.text_share
        blocks: Any = ahead(lambda: text.blocks(at), 8) if text else iter(())
        with closing(blocks) if text else nullcontext():
            for rows in self.order(begin):
                taken = []
                supervised = sum(map(anchors, rows))
                if text:
                    owed += share / (1 - share) * supervised
                    while owed >= text.length:
                        block, at = next(blocks)
                        taken.append(block)
                        owed -= text.length
                yield self.step(rows, taken, {"text": vars(at), "owed": owed})

    def order(self, begin: int) -> Iterator[list[Row]]:
        """The rows of step ``begin`` and all later ones."""
        epoch, offset = 0, 0
        while True:
            steps = step_order(self.rows, self.config, epoch)
            yield from steps[max(0, begin - offset) :]
            epoch, offset = epoch + 1, offset + len(steps)

    def step(self, rows: Sequence[Row], blocks: Sequence[Tensor], position: dict[str, Any]) -> Step:
        """Responses and text weigh by their supervised tokens."""
        every = groups(sorted(rows, key=size), self.config.micro_tokens, size)
        shares = self.shares
        micro = shares.of(every)
        supervised, written = sum(map(anchors, rows)), sum(len(block) - 1 for block in blocks)
        weight = supervised / (supervised + written)
        count = sum(map(self.distillation.pairs, every))
        shared: list[Tensor | None] = []

        def responses(part: Sequence[Row]) -> Tensor:
            if not shared:  # the weights are those of the step from the first part to the last
                shared.append(self.distillation.statistics(micro))
            return shares.loss(weight * self.distillation(part, count, shared[0]))

        def texts(block_BT: Tensor) -> Tensor:
            return self.causal.block_loss(block_BT) * ((1 - weight) / written)

        parts: list[Callable[[], Tensor]] = [partial(responses, part) for part in micro]
        if blocks:
            at_once = max(1, self.config.micro_tokens // self.config.text_length)
            split = torch.stack(list(blocks)).split(at_once)
            parts += [partial(texts, part) for part in split[shares.workers.rank :: shares.workers.size]]
        return Step(parts, supervised + written, position)


def distil(
    model: Any,
    teacher: Teacher,
    rows: Sequence[Row],
    config: DistilConfig,
    folder: Path,
    evaluate: Callable[[], float],
    text: PackedText | None = None,
    progress: Progress | None = None,
    workers: Workers = SINGLE,
) -> LoopResult:
    """Train ``model`` in place on ``rows``; on return it has the weights with the highest ``evaluate()``.

    ``evaluate`` gives the held-out block efficiency of the model as it stands; training stops when it has not risen
    for ``patience`` evaluations. ``text`` must come in blocks of ``text_length`` and is needed for a share above 0.
    A killed run goes on to the same bits. Raises ``UserError``.
    """
    kept = [row for row in rows if anchors(row)]
    if not kept:
        raise UserError("no response has two or more tokens to train on; give longer responses")
    if (text is None) != (config.text_share == 0) or (text and text.length != config.text_length):
        raise UserError("text and its share go together: give both for a mix, or a share of 0 without text")
    causal = CausalModel(model)
    shares = Shares(workers)
    distillation = Distillation(causal, teacher, config.loss, config.gamma, shares.sum)
    total = max(1, round(config.epochs * len(step_order(kept, config, 0))))
    identity = {
        "rows": rows_digest([row.key for row in kept]),
        "teacher": type(teacher).__name__,
        "text": list(text.source.files) if text else [],
    }
    steps = MixedSteps(distillation, kept, config, text, shares)
    model, trained = causal.model.float(), causal.trained
    loop = TrainingLoop(
        model, trained, steps, total, evaluate, config, folder, identity, precision=config.precision, workers=workers
    )
    return loop.run(progress)
