"""``shift``: how far fine-tuning moved the target's representation of a sample.

EDA (arXiv 2603.09527) keeps the samples whose representation moved most from the base target to the fine-tuned
one. Its exact distance is not public, so the choice is ours and named: with d = h_finetuned - h_base, the
final-norm states at the positions of the response (of the whole prompt when there is no response),

- ``mahalanobis``: distance of d from the mean of all d under their Ledoit-Wolf covariance, so that a direction in
  which everything moved alike counts for little (default);
- ``l2``: the length of d;
- ``cosine``: 1 - cos(h_finetuned, h_base);

each averaged over the row's positions. Each model sees each row once. The two other metrics keep nothing;
``mahalanobis`` keeps d in bfloat16 (2 * H bytes a token: 52 MB for 45,000 tokens of width 576), in memory up to
``memory_bytes`` and beyond that in a temporary file, and reads it three times more for mean, covariance and
distances.

Shape legend: B rows of a batch, T tokens, N tokens of all rows, H hidden size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.artifact import require_free_space
from redraft.errors import UserError
from redraft.select import SCORERS, ScorableRow, ScoringContext, scored_ids, scored_tokens
from redraft.select.covariance import ledoit_wolf
from redraft.target import Target

METRICS = ("mahalanobis", "l2", "cosine")
CHUNK_TOKENS = 8192


@SCORERS.register("shift")
class Shift:
    """Mean distance between the fine-tuned and the base target's states; raises ``UserError`` for another metric."""

    name = "shift"
    needs = frozenset({"target", "base_target"})
    passes = 2

    def __init__(self, metric: str = "mahalanobis", memory_bytes: int = 512 * 2**20) -> None:
        if metric not in METRICS:
            raise UserError(f"unknown shift metric {metric!r}; choose one of: {', '.join(METRICS)}")
        self.metric = metric
        self.memory_bytes = memory_bytes

    @property
    def settings(self) -> dict[str, Any]:
        return {"metric": self.metric}

    def score(self, rows: Sequence[ScorableRow], context: ScoringContext) -> list[float]:
        """One number a row. Raises ``UserError`` when the two targets or a row and a target do not fit."""
        target, base = context.target, context.base_target
        assert target is not None and base is not None  # in ``needs``
        check_pair(target, base, rows)
        if self.metric == "mahalanobis":
            return self._mahalanobis(rows, target, base, context)
        measure: Callable[[Tensor, Tensor], Tensor] = _l2 if self.metric == "l2" else _cosine
        scores = [0.0] * len(rows)
        for row, finetuned_TH, base_TH in paired_states(rows, target, base, context):
            scores[row] = float(measure(finetuned_TH, base_TH).double().mean())
        return scores

    def _mahalanobis(
        self, rows: Sequence[ScorableRow], target: Target, base: Target, context: ScoringContext
    ) -> list[float]:
        sizes = [scored_tokens(row) for row in rows]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        with _buffer(ends[-1], target.hidden_size, self.memory_bytes, context.scratch) as moved_NH:
            for row, finetuned_TH, base_TH in paired_states(rows, target, base, context):
                moved_NH[ends[row] - sizes[row] : ends[row]] = (finetuned_TH - base_TH).to("cpu", torch.bfloat16)

            def chunks() -> Iterator[Tensor]:
                yield from moved_NH.split(CHUNK_TOKENS)

            shrunk = ledoit_wolf(chunks, context.device)
            distance_N = torch.cat(list(shrunk.distances(chunks()))).cpu()
        return [float(part.mean()) for part in distance_N.split(sizes)]


def _l2(finetuned_TH: Tensor, base_TH: Tensor) -> Tensor:
    return (finetuned_TH - base_TH).norm(dim=-1)


def _cosine(finetuned_TH: Tensor, base_TH: Tensor) -> Tensor:
    return 1 - torch.cosine_similarity(finetuned_TH.double(), base_TH.double(), dim=-1)


def check_pair(target: Target, base: Target, rows: Sequence[ScorableRow]) -> None:
    """Raise ``UserError`` unless both models can read every row and their states can be subtracted."""
    if target.hidden_size != base.hidden_size:
        raise UserError(
            f"the target has hidden size {target.hidden_size} and the base target {base.hidden_size}; "
            "shift compares a fine-tuned model with the model it was fine-tuned from"
        )
    context, vocabulary = min(target.context, base.context), min(target.vocab_size, base.vocab_size)
    for row in rows:
        ids, _ = scored_ids(row)
        if len(ids) > context:
            raise UserError(f"row {row.key} has {len(ids)} tokens, more than the models' context of {context}")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise UserError(f"row {row.key} has token ids outside the models' vocabulary of {vocabulary}")


def paired_states(
    rows: Sequence[ScorableRow], target: Target, base: Target, context: ScoringContext
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(row index, fine-tuned states [T, H], base states [T, H]) in float32, at the positions that count.

    Rows are batched by length and padded on the right: under the causal mask no token sees the padding after it,
    so no other mask is needed.
    """
    done = 0
    for batch in batches([len(row.prompt_ids) + len(row.response_ids) for row in rows], context.batch_tokens):
        sequences = [scored_ids(rows[index]) for index in batch]
        ids_BT = torch.zeros(len(batch), max(len(ids) for ids, _ in sequences), dtype=torch.long)
        for place, (ids, _) in enumerate(sequences):
            ids_BT[place, : len(ids)] = torch.tensor(ids)
        finetuned_BTH = target.forward(ids_BT.to(target.device), taps=False).hidden_BTH
        base_BTH = base.forward(ids_BT.to(base.device), taps=False).hidden_BTH.to(finetuned_BTH.device)
        for place, (ids, start) in enumerate(sequences):
            counted = slice(start, len(ids))
            yield batch[place], finetuned_BTH[place, counted].float(), base_BTH[place, counted].float()
        done += len(batch)
        if context.progress is not None:
            context.progress(done, len(rows))


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, each of at most ``batch_tokens`` tokens with padding, or of one row."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if found and (len(found[-1]) + 1) * lengths[index] <= batch_tokens:
            found[-1].append(index)
        else:
            found.append([index])
    return found


@contextmanager
def _buffer(tokens: int, width: int, memory_bytes: int, scratch: Path | None) -> Iterator[Tensor]:
    """A bfloat16 matrix [tokens, width], in memory or, beyond ``memory_bytes``, in a file that goes afterwards."""
    needed = 2 * tokens * width
    if needed <= memory_bytes:
        yield torch.empty(tokens, width, dtype=torch.bfloat16)
        return
    folder = scratch if scratch is not None else Path(tempfile.gettempdir())
    require_free_space(folder, needed)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="redraft-shift-", dir=folder) as place:
        flat = torch.from_file(f"{place}/moved", shared=True, size=tokens * width, dtype=torch.bfloat16)
        yield flat.view(tokens, width)
