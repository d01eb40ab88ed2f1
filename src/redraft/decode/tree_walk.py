"""Acceptance of a tree of fixed proposals without a pass of the target: the draft's own rounds over stored responses.

A tree of a greedy target, and a dynamic tree under any sampler, holds tokens that are a function of the context
alone, and verification follows the target's own token (:func:`redraft.decode.accept.follow_tree`). The target's tokens
stand in the response and what it computed at them in the feature store, so the draft can be led through the very rounds
that decoding would have: exact for greedy responses, and for sampled ones the rounds of the decoding that drew them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from redraft.acceptance.simulate import check_own
from redraft.data.store import Row
from redraft.decode.accept import follow_tree
from redraft.decode.requests import Request, Uniforms
from redraft.decode.tree_engine import TreeDecoder
from redraft.drafts.base import Draft
from redraft.features import FeatureSource
from redraft.rows import anchors
from redraft.settings.shapes import DynamicTree, StaticTree
from redraft.target import Target


@torch.inference_mode()
def simulate_tree(
    draft: Draft,
    target: Target,
    rows: Sequence[Row],
    store: FeatureSource,
    shape: StaticTree | DynamicTree,
    max_new_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[int]]:
    """Accepted draft tokens of every round, by row key; up to the end of the response, as for a chain.

    ``rows`` must hold responses of this target, at most ``max_new_tokens`` long: no round reaches beyond them. Rows
    without an anchor have no round and are left out. ``progress`` is told of finished rows. The draft works in the
    target's type, as it does in decoding. Raises ``UserError`` for reference answers.
    """
    decoder = TreeDecoder(target, draft, shape, greedy_drafts=True)
    found: dict[str, list[int]] = {}
    for row in rows:
        check_own(row)
        if anchors(row):
            found[row.key] = _rounds(decoder, row, store, max_new_tokens)
        if progress:
            progress(len(found))
    return found


def _rounds(decoder: TreeDecoder, row: Row, store: FeatureSource, max_new_tokens: int) -> list[int]:
    """Accepted tokens of each round of one response; the first token comes from prefill."""
    device, begin = decoder.target.device, len(row.prompt_ids)
    known = [*row.prompt_ids, *row.response_ids]
    ids_T, taps_TKF = torch.tensor(known, device=device), store.get(row)[0].to(device)
    proposer, at = decoder.new_proposer(begin + max_new_tokens + 1), begin + 1
    # Fixed proposals take no uniforms, and no target is run, so that it needs no cache.
    new = ids_T[:at], taps_TKF[: at - 1]
    request = Request(row.prompt_ids, max_new_tokens, Uniforms(0, device), None, proposer, known[begin:at], *new)
    accepted: list[int] = []
    while at < len(known):
        proposal = decoder.propose(request)
        future, depths = known[at:], proposal.tree.depths

        def choose(node: int, future: list[int] = future, depths: list[int] = depths) -> int:
            return future[depths[node]] if depths[node] < len(future) else -1

        path, _ = follow_tree(choose, proposal.tree.by_token(proposal.tokens))
        accepted.append(len(path))
        fed, at = at, at + len(path) + 1
        request.ids, request.new_ids_T, request.new_taps_T = known[begin:at], ids_T[fed:at], taps_TKF[fed - 1 : at - 1]
    return accepted
