"""Acceptance of a standalone draft's chain without decoding: one teacher-forced pass over stored responses.

A standalone draft is fed text alone, so what it proposes at a position does not depend on where the round began, as
long as every earlier proposal of the round was accepted. One row of logits a position therefore holds all rounds, and
the walks of :mod:`redraft.acceptance.simulate` over them are exact: greedy chains as decoded, sampled chains in
expectation given the text (w there is the same for every start).

Shape legend: A anchors of one response, J draft steps, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from redraft.acceptance.simulate import CHUNK, ROWS, check_sampler, visits, walk
from redraft.data.store import Row
from redraft.drafts.standalone import StandaloneDraft
from redraft.rows import anchors, length_batches
from redraft.sampling import token_probability
from redraft.settings.sampler import Sampler
from redraft.target import Target

BATCH_TOKENS = 2048


@torch.inference_mode()
def simulate_greedy_standalone(
    draft: StandaloneDraft, target: Target, rows: Sequence[Row], gamma: int, batch_tokens: int = BATCH_TOKENS
) -> dict[str, list[int]]:
    """Accepted draft tokens of every round, by row key; as :func:`redraft.acceptance.simulate.simulate_greedy_chain`.

    ``rows`` must hold greedy responses of this target; on sampled ones this is the chain of greedy drafts.
    """
    return {key: walk(runs) for key, runs in matches_standalone(draft, target, rows, gamma, batch_tokens)}


@torch.inference_mode()
def matches_standalone(
    draft: StandaloneDraft, target: Target, rows: Sequence[Row], gamma: int, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[str, list[int]]]:
    """Row by row its key and, from each anchor on, how many proposals in a row are right, at most ``gamma``."""
    for row, states_AH in response_states(draft.bind(target), rows, batch_tokens):
        best = torch.cat([draft.logits(part).argmax(-1) for part in states_AH.split(ROWS)]).tolist()
        yield row.key, run_lengths([a == b for a, b in zip(best, row.response_ids[1:], strict=True)], gamma)


def run_lengths(right: Sequence[bool], gamma: int) -> list[int]:
    """How many proposals in a row are right from each anchor on, at most ``gamma``."""
    lengths, run = [], 0
    for hit in reversed(right):
        run = run + 1 if hit else 0
        lengths.append(min(run, gamma))
    return lengths[::-1]


@torch.inference_mode()
def expected_rounds_standalone(
    draft: StandaloneDraft,
    target: Target,
    rows: Sequence[Row],
    gamma: int,
    sampler: Sampler,
    greedy_drafts: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    known: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Expected rounds of a chain of ``gamma`` given each response, by row key; exact.

    ``rows`` must hold responses of this target drawn with ``sampler``. ``known`` are the target's probabilities of
    them (:func:`target_probabilities`), for who asks again and again. Rows without an anchor are left out. Raises
    ``UserError`` for rows of another sampler.
    """
    check_sampler(rows, sampler)
    if greedy_drafts or sampler.greedy:
        found = simulate_greedy_standalone(draft, target, rows, gamma, batch_tokens)
        return {key: float(len(rounds)) for key, rounds in found.items()}
    known = known if known is not None else target_probabilities(target, rows, sampler, batch_tokens)
    expected = {}
    for row, states_AH in response_states(draft.bind(target), rows, batch_tokens):
        mine_A, other_A = probabilities(draft.logits, states_AH, row, sampler), known[row.key].double()
        # A drawn token to which the target gives 0 by rounding: the limit, 1 if the draft gives it any.
        chances_A = torch.where(other_A > 0, (mine_A / other_A).clamp(max=1.0), (mine_A > 0).double())
        padded = np.concatenate([chances_A.numpy(), np.zeros(gamma)])
        expected[row.key] = float(visits(np.lib.stride_tricks.sliding_window_view(padded, gamma)[:-1]).sum())
    return expected


@torch.inference_mode()
def target_probabilities(
    target: Target, rows: Sequence[Row], sampler: Sampler, batch_tokens: int = BATCH_TOKENS
) -> dict[str, Tensor]:
    """The warped probability [A] that the target gives each token of a response after the first, by row key."""
    return {
        row.key: probabilities(target.logits, states_AH, row, sampler)
        for row, states_AH in _states(
            lambda ids: target.forward(ids, taps=False).hidden_BTH, target, rows, batch_tokens
        )
    }


def probabilities(logits_of: Callable[[Tensor], Tensor], states_AH: Tensor, row: Row, sampler: Sampler) -> Tensor:
    """The warped probability [A] of each response token after the first, on the CPU, in portions."""
    ids_A = torch.tensor(row.response_ids[1:], device=states_AH.device)
    parts = zip(states_AH.split(CHUNK), ids_A.split(CHUNK), strict=True)
    found = []
    for states, ids in parts:
        logits_NV = logits_of(states)
        # An id behind the draft's last has no probability there.
        inside = ids < logits_NV.shape[-1]
        found.append(token_probability(logits_NV, torch.where(inside, ids, 0), sampler).where(inside, 0.0))
    return torch.cat(found).double().cpu()


def response_states(
    draft: StandaloneDraft, rows: Sequence[Row], batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[Row, Tensor]]:
    """Row by row its final-norm states [A, H] in front of every response token after the first.

    Rows without an anchor are left out. The draft is in evaluation mode meanwhile.
    """
    training = draft.model.training
    draft.model.eval()
    try:
        yield from _states(draft.states, draft, rows, batch_tokens)
    finally:
        draft.model.train(training)


def _states(
    run: Callable[[Tensor], Tensor], model: StandaloneDraft | Target, rows: Sequence[Row], batch_tokens: int
) -> Iterator[tuple[Row, Tensor]]:
    for group in length_batches([row for row in rows if anchors(row)], batch_tokens):
        texts = [[*row.prompt_ids, *row.response_ids[:-1]] for row in group]
        ids_BT = torch.zeros(len(group), max(map(len, texts)), dtype=torch.long)
        for i, text in enumerate(texts):
            ids_BT[i, : len(text)] = torch.tensor(text)
        # Padding stands on the right, where no token looks.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            states_BTH = run(ids_BT.to(model.device))
        for row, text, states_TH in zip(group, texts, states_BTH, strict=True):
            yield row, states_TH[len(row.prompt_ids) : len(text)]
