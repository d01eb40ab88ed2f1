"""What scorers may ask of models: the states of rows, in the one batched pass that all share, and a draft's acceptance.

Shape legend: B rows of a batch, T tokens of a row, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.acceptance.simulate import row_alphas
from redraft.errors import UserError
from redraft.features import FeatureStore
from redraft.files import scratch_folder
from redraft.progress import Progress
from redraft.rows import TokenRow, groups, whole_length
from redraft.selection import Scorer, ScoringContext, scored_ids
from redraft.target import Target

FINAL = "final"
# Tokens whose features lie on the disk at once: 220 MB for three taps of width 576 in bfloat16.
PORTION_TOKENS = 2**16
SHAPES = {"hidden_size": "width", "layers": "layers", "vocab_size": "vocabulary"}


def check_layer(layer: str | int) -> str | int:
    """``layer`` as it is. Raises ``UserError`` unless it is ``final`` or a whole number from 0."""
    if layer != FINAL and (not isinstance(layer, int) or isinstance(layer, bool) or layer < 0):
        raise UserError(f"unknown layer {layer!r}; write final, or how many decoder layers the states have passed")
    return layer


def check_same_shape(target: Target, base_target: Target, what: Sequence[str] = tuple(SHAPES)) -> None:
    """Raise ``UserError`` unless one target can be the other, fine-tuned."""
    sizes = {SHAPES[name]: (getattr(target, name), getattr(base_target, name)) for name in what}
    if faults := [f"{name} {ours} and {theirs}" for name, (ours, theirs) in sizes.items() if ours != theirs]:
        raise UserError(
            f"the fine-tuned and the base target differ in shape: {'; '.join(faults)}; "
            "give the model that the target was fine-tuned from as --base-target"
        )


def check_rows(rows: Sequence[TokenRow], targets: Sequence[Target]) -> None:
    """Raise ``UserError`` unless every target can read every row."""
    context, vocabulary = min(t.context for t in targets), min(t.vocab_size for t in targets)
    for row in rows:
        ids, _ = scored_ids(row)
        if len(ids) > context:
            raise UserError(f"row {row.key} has {len(ids)} tokens, more than the models' context of {context}")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise UserError(f"row {row.key} has token ids outside the models' vocabulary of {vocabulary}")


def batched_states(
    rows: Sequence[TokenRow], targets: Sequence[Target], context: ScoringContext, layer: str | int = FINAL
) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(row index, index of the first token that counts, one [T, H] a target) for every row, each model once a row.

    The states are those of all tokens of the row, in the model's own data type, on the first target's device.
    ``layer`` ``final`` is behind the final norm; a number k is the residual stream after k decoder layers. Rows come
    in batches of similar length, padded on the right: under the causal mask no token sees the padding after it, so
    no other mask is needed. Raises ``UserError`` for a row that a target cannot read and a layer that it does not have.
    """
    check_rows(rows, targets)
    device, done = targets[0].device, 0
    with ExitStack() as stack:
        for target in targets:
            stack.enter_context(_tapped(target, layer))
        for batch in batches([whole_length(row) for row in rows], context.batch_tokens):
            sequences = [scored_ids(rows[index]) for index in batch]
            ids_BT = torch.zeros(len(batch), max(len(ids) for ids, _ in sequences), dtype=torch.long)
            for place, (ids, _) in enumerate(sequences):
                ids_BT[place, : len(ids)] = torch.tensor(ids)
            states = [_states(target, ids_BT, layer).to(device) for target in targets]
            for place, (ids, start) in enumerate(sequences):
                yield batch[place], start, [states_BTH[place, : len(ids)] for states_BTH in states]
            done += len(batch)
            if context.progress is not None:
                context.progress(done, len(rows))


def _states(target: Target, ids_BT: Tensor, layer: str | int) -> Tensor:
    step = target.forward(ids_BT.to(target.device), taps=layer != FINAL)
    if layer == FINAL:
        return step.hidden_BTH
    assert step.taps_BTKH is not None
    return step.taps_BTKH


@contextmanager
def _tapped(target: Target, layer: str | int) -> Iterator[None]:
    """The target with this one tap, and with its own again afterwards: others rely on them."""
    if layer == FINAL:
        yield
        return
    depth, before = int(layer), target.taps
    if depth > target.layers:
        raise UserError(f"layer {depth} does not exist: the target has {target.layers} layers; final is the last norm")
    target.tap((depth,))
    try:
        yield
    finally:
        target.tap(before)


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, each of at most ``batch_tokens`` tokens with padding, or of one row."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if found and (len(found[-1]) + 1) * lengths[index] <= batch_tokens:
            found[-1].append(index)
        else:
            found.append([index])
    return found


# -- the acceptance of a draft -----------------------------------------------------------------------------------------
def scoring_context(
    scorer: Scorer,
    target: Target | None,
    draft: Any,
    base: Callable[[], Target | None],
    seed: int,
    scratch: Path,
    progress: Progress | None = None,
    store: FeatureStore | None = None,
) -> ScoringContext:
    """The context of ``scorer``; ``base`` opens the base target where that is asked for.

    ``store`` holds the features of the rows. Without one they are computed in portions, in a folder of ``scratch``.
    """

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress.update(done)

    def alpha_of(rows: Sequence[Any]) -> list[float]:
        assert target is not None
        own = copy.deepcopy(draft).to(target.device)
        return (
            measured_alphas(own, target, rows, scratch, tell) if store is None else row_alphas(own, target, rows, store)
        )

    return ScoringContext(
        target=target,
        base_target=base() if "base_target" in scorer.needs else None,
        draft=draft,
        alpha_of=alpha_of if "alpha_of" in scorer.needs else None,
        device="cpu" if target is None else target.device,
        seed=seed,
        progress=tell,
        scratch=scratch,
    )


def measured_alphas(
    draft: Any, target: Target, rows: Sequence[Any], scratch: Path, progress: Callable[[int, int], None]
) -> list[float]:
    """The mean acceptance of ``draft`` at the drafted positions of each row.

    Features are computed in portions in a temporary folder of ``scratch``, so the disk holds ``PORTION_TOKENS`` of
    them however many rows there are. ``progress(done, total)`` counts rows.
    """
    found: dict[str, float] = {}
    target.tap(draft.config.taps)
    by_length = sorted(rows, key=lambda row: (whole_length(row), row.key))
    for portion in groups(by_length, PORTION_TOKENS, whole_length):
        with scratch_folder(scratch, "redraft-select") as folder:
            store = FeatureStore(folder, {})
            store.build(target, portion)
            found |= dict(zip((row.key for row in portion), row_alphas(draft, target, portion, store), strict=True))
        progress(len(found), len(rows))
    return [found[row.key] for row in rows]
