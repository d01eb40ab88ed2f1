"""Pretraining a causal LM on plain text: next-token prediction on packed blocks, watched by held-out perplexity.

Blocks hold text end to end (see ``data/packed.py``), attention runs over a whole block, as is usual. Head and loss
run over portions of positions, so that memory does not grow with vocabulary times sequence.

Shape legend: B blocks, T tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.data.packed import PackedText, Position, ahead
from redraft.drafts.standalone.objective import CausalModel
from redraft.progress import Progress
from redraft.settings.training import PretrainConfig
from redraft.training.loop import LoopResult, Step, TrainingLoop
from redraft.training.workers import SINGLE, Workers


class TextSteps:
    """Optimiser steps of packed text, read ahead in a thread."""

    def __init__(
        self, causal: CausalModel, text: PackedText, config: PretrainConfig, workers: Workers = SINGLE
    ) -> None:
        self.causal, self.text, self.config, self.workers = causal, text, config, workers

    def steps(self, begin: int, position: dict[str, Any]) -> Iterator[Step]:
        """Steps from ``position`` in the text on, without end."""
        at = Position.of(position or None)
        count, micro = self.config.batch_blocks, self.config.micro_blocks
        tokens = count * self.text.length
        with closing(ahead(lambda: self.text.blocks(at), 2 * count)) as blocks:  # type: ignore[type-var]
            while True:
                taken = [next(blocks) for _ in range(count)]
                block_BT = torch.stack([block for block, _ in taken])
                mine = block_BT.split(micro)[self.workers.rank :: self.workers.size]
                parts = [partial(self.loss, part, tokens) for part in mine]
                yield Step(parts, tokens, vars(taken[-1][1]))

    def loss(self, block_BT: Tensor, tokens: int) -> Tensor:
        """These blocks' share of the mean cross-entropy over ``tokens`` tokens."""
        return self.causal.block_loss(block_BT) / tokens


def perplexity(causal: CausalModel, block_BT: Tensor, micro: int) -> float:
    """exp of the mean cross-entropy of blocks [B, T + 1], every token predicted from those before it in its block."""
    with torch.no_grad():
        total = sum(float(causal.block_loss(part)) for part in block_BT.split(micro))
    mean = total / block_BT[:, 1:].numel()
    return math.exp(mean) if mean < 700 else math.inf


def pretrain(
    model: Any,
    text: PackedText,
    config: PretrainConfig,
    folder: Path,
    progress: Progress | None = None,
    heldout_text: PackedText | None = None,
    workers: Workers = SINGLE,
) -> LoopResult:
    """Train ``model`` on ``text`` in place; figures are held-out perplexities, the lowest is the best.

    Held-out blocks are those that ``text`` keeps out, or the first ones of ``heldout_text``. A killed run goes on
    to the same bits. Raises ``UserError`` for bad text and for losses that are not finite.
    """
    causal = CausalModel(model)
    wanted = max(1, config.heldout_tokens // config.length)
    held_BT = _first_blocks(heldout_text, wanted) if heldout_text else text.heldout(wanted)
    digest = hashlib.sha256(held_BT.numpy().tobytes()).hexdigest()[:16]
    identity = {"text": list(text.source.files), "heldout": digest, "length": text.length, "order": text.seed}
    loop = TrainingLoop(
        causal.model.float(),
        causal.trained,
        TextSteps(causal, text, config, workers),
        config.steps,
        lambda: perplexity(causal, held_BT, config.micro_blocks),
        config,
        folder,
        identity,
        precision=config.precision,
        metric="heldout_perplexity",
        higher_is_better=False,
        workers=workers,
    )
    return loop.run(progress)


def _first_blocks(text: PackedText, wanted: int) -> Tensor:
    """The first blocks of one pass over a file of held-out text; fewer where it holds fewer."""
    found: list[Tensor] = []
    for block, at in text.blocks():
        if at.epoch or len(found) == wanted:
            break
        found.append(block)
    return torch.stack(found)
