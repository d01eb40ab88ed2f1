"""Training a causal LM: pretraining on plain text, and distillation from a target's responses.

Pretraining is next-token prediction on packed blocks, watched by held-out perplexity. Blocks hold text end to end (see
``data/packed.py``), attention runs over a whole block, as is usual.

Distillation holds the draft's distribution at every response token, from one teacher-forced pass, against a teacher's
(``drafts/standalone/objective.py``), under any loss of the registry. As everywhere here, the first response token comes
from prefill and is nobody's to draft. The target's own states give a whole distribution; a server's answers give less:

- ``tops``: the likeliest tokens with their log-probabilities: the distribution restricted to them and renormalised.
- ``tokens``: the response's token alone, with all the probability (sequence-level distillation, Kim and Rush, arXiv
  1606.07947, where KL is the token's cross-entropy).

Text, with next-token cross-entropy, is mixed in by a share of all supervised tokens (0.1 is the 9:1 of Goel et al.,
arXiv 2403.00858) to keep the draft from forgetting what its pretraining gave it. A loss with batch statistics gets
those of the whole optimiser step, over all micro-batches and workers.

In both, memory does not grow with vocabulary times sequence: head and loss run over portions of positions.

Shape legend: B blocks, T tokens, M supervised positions of a batch, N those of a portion, K likeliest tokens,
V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.data.packed import PackedText, Position, ahead
from redraft.data.server import Top
from redraft.data.store import Row
from redraft.drafts.standalone.objective import CausalModel, Distillation, Teacher, TeacherLogits, size
from redraft.errors import UserError
from redraft.progress import Progress
from redraft.rows import anchors, groups
from redraft.settings.training import DistilConfig, PretrainConfig
from redraft.training.loop import LoopResult, Step, TrainingLoop, onward, rows_digest
from redraft.training.workers import SINGLE, Shares, Workers


# -- pretraining -----------------------------------------------------------------------------------------------------
def text_steps(
    causal: CausalModel, text: PackedText, config: PretrainConfig, workers: Workers, begin: int, place: dict[str, Any]
) -> Iterator[Step]:
    """Optimiser steps of packed text from ``place`` in it on, without end, read ahead in a thread."""
    at = Position.of(place or None)
    count, micro = config.batch_blocks, config.micro_blocks
    tokens = count * text.length

    def loss(block_BT: Tensor) -> Tensor:
        return causal.block_loss(block_BT) / tokens

    with closing(ahead(lambda: text.blocks(at), 2 * count)) as blocks:  # type: ignore[type-var]
        while True:
            taken = [next(blocks) for _ in range(count)]
            mine = torch.stack([block for block, _ in taken]).split(micro)[workers.rank :: workers.size]
            yield Step([partial(loss, part) for part in mine], tokens, vars(taken[-1][1]))


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

    Held-out blocks are those that ``text`` keeps out, or the first ones of ``heldout_text``. A killed run goes on,
    on a CPU to the same bits. Raises ``UserError`` for bad text and for losses that are not finite.
    """
    causal = CausalModel(model)
    wanted = max(1, config.heldout_tokens // config.length)
    held_BT = _first_blocks(heldout_text, wanted) if heldout_text else text.heldout(wanted)
    digest = hashlib.sha256(held_BT.numpy().tobytes()).hexdigest()[:16]
    identity = {"text": list(text.source.files), "heldout": digest, "length": text.length, "order": text.seed}
    loop = TrainingLoop(
        causal.model.float(),
        causal.trained,
        partial(text_steps, causal, text, config, workers),
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
    blocks = itertools.takewhile(lambda found: not found[1].epoch, text.blocks())
    return torch.stack([block for block, _ in itertools.islice(blocks, wanted)])


# -- teachers of distillation ----------------------------------------------------------------------------------------
class TopTeacher:
    """The likeliest tokens alone, by row key."""

    def __init__(self, tops: Mapping[str, Top], vocab_size: int) -> None:
        self.tops, self.vocab_size = tops, vocab_size

    def of(self, rows: Sequence[Row], device: torch.device) -> TeacherLogits:
        """See :class:`Teacher`. Raises ``UserError`` for a row without log-probabilities or with too few."""
        ids: list[list[int]] = []
        values: list[list[float]] = []
        for row in rows:
            if row.key not in self.tops:
                raise UserError(f"response {row.key} has no log-probabilities; ask the server for them first")
            row_ids, row_values = self.tops[row.key]
            if not len(row_ids) == len(row_values) == anchors(row):
                raise UserError(f"response {row.key} has log-probabilities for {len(row_ids)} of {anchors(row)} tokens")
            ids += row_ids
            values += row_values
        return _spread(ids, values, self.vocab_size, device)


class TokenTeacher:
    """The response's own token, with certainty."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def of(self, rows: Sequence[Row], device: torch.device) -> TeacherLogits:
        """See :class:`Teacher`."""
        ids = [[i] for row in rows for i in row.response_ids[1:]]
        return _spread(ids, [[0.0]] * len(ids), self.vocab_size, device)


def _spread(ids: list[list[int]], values: list[list[float]], vocab_size: int, device: torch.device) -> TeacherLogits:
    """Logits of positions at which these tokens have these log-probabilities, and no other any."""
    width = max(map(len, ids), default=0)
    # A token named twice stays what it is: the filler repeats the first one.
    ids_MK = torch.tensor([[*row, *row[:1] * (width - len(row))] for row in ids], device=device)
    filled = [[*row, *row[:1] * (width - len(row))] for row in values]
    values_MK = torch.tensor(filled, dtype=torch.float32, device=device)

    def logits(index_N: Tensor) -> Tensor:
        empty_NV = values_MK.new_full((len(index_N), vocab_size), -math.inf)
        return empty_NV.scatter_(1, ids_MK[index_N], values_MK[index_N])

    return logits


# -- distillation ----------------------------------------------------------------------------------------------------
def step_order(rows: Sequence[Row], config: DistilConfig, epoch: int) -> list[list[Row]]:
    """The rows of every step of an epoch: a function of seed and epoch."""
    order = sorted(filter(anchors, rows), key=lambda row: row.key)
    random.Random(f"{config.seed}/{epoch}").shuffle(order)
    return groups(order, config.batch_anchors, anchors)


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
            for rows in onward(partial(step_order, self.rows, self.config), begin):
                taken = []
                supervised = sum(map(anchors, rows))
                if text:
                    owed += share / (1 - share) * supervised
                    while owed >= text.length:
                        block, at = next(blocks)
                        taken.append(block)
                        owed -= text.length
                yield self.step(rows, taken, {"text": vars(at), "owed": owed})

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
    A killed run goes on, on a CPU to the same bits. Raises ``UserError``.
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
    steps = MixedSteps(distillation, kept, config, text, shares).steps
    model, trained = causal.model.float(), causal.trained
    loop = TrainingLoop(
        model, trained, steps, total, evaluate, config, folder, identity, precision=config.precision, workers=workers
    )
    return loop.run(progress)
