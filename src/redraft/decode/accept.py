"""The verification rule of speculative decoding, pure: probabilities and uniforms in, decisions out.

Sources: Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318) for chains; SpecInfer (arXiv
2305.09781) and Sequoia (arXiv 2402.12374) for trees. Probabilities arrive warped (see ``redraft.sampling.warp``);
the rule neither knows nor changes temperature, top-k or top-p.

There are two rules, by how the proposals were made:

- *Fixed proposals* (the target is greedy, or the draft proposes its likeliest tokens whatever the target's sampler):
  the target chooses its own token, by argmax or by a draw, and the proposal that equals it is followed
  (:func:`accept_greedy`, :func:`follow_tree`). For sampling this is the rejection rule with a point mass for a
  proposal: siblings x, y, ... are kept with probability target(x), then target(y) / (1 - target(x)), ..., and what
  is left to draw from is the target without them.
- *Sampled proposals* (:func:`accept_chains`, :func:`accept_trees`): rejection against the draft's probabilities.

Shape legend: B independent chains or trees, G drafted tokens a chain, N nodes of a tree (the root, which is the
last verified token, is node 0 and counts in N), R most children of a node, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from redraft.sampling import draw

Rows = Callable[[Tensor], Tensor]
"""Nodes [B] -> probabilities [B, V] at these nodes; only visited nodes are ever asked for."""


def accept_greedy(target_ids: Tensor | Sequence[int], draft_ids: Tensor | Sequence[int]) -> tuple[int, int]:
    """(accepted, next_id) of fixed proposals: accept while the draft's token is the target's own.

    ``target_ids`` [G + 1] are the target's choices (argmaxes or draws) before each draft token and after the last;
    ``draft_ids`` [G].
    """
    targets = target_ids.tolist() if isinstance(target_ids, Tensor) else list(target_ids)
    drafts = draft_ids.tolist() if isinstance(draft_ids, Tensor) else list(draft_ids)
    wrong = (i for i, (draft, target) in enumerate(zip(drafts, targets, strict=False)) if draft != target)
    accepted = next(wrong, len(drafts))
    return accepted, int(targets[accepted])


def follow_tree(choose: Callable[[int], int], children: Sequence[Mapping[int, int]]) -> tuple[list[int], int]:
    """(accepted nodes from the top, next_id) of a tree of fixed proposals.

    ``choose(node)`` is the target's own token after the path to ``node``; it is asked once for each visited node, so
    sampling costs one draw a kept token, as in plain decoding. ``children[node]`` maps a proposed token to its node.
    """
    path, node = list[int](), 0
    while True:
        token = choose(node)
        if token not in children[node]:
            return path, token
        node = children[node][token]
        path.append(node)


def accept_chains(
    target_probs_BGV: Tensor, draft_probs_BGV: Tensor, draft_ids_BG: Tensor, uniforms_BG: Tensor
) -> tuple[Tensor, Tensor]:
    """Accepted counts [B] and next ids [B]; accepted tokens and the next one together follow the target exactly.

    ``target_probs`` [B, G + 1, V], ``draft_probs`` [B, G, V], ``draft_ids`` [B, G], ``uniforms`` [B, G + 1] in
    [0, 1), of which the last draws the next id. Token x is accepted with probability min(1, target(x) / draft(x));
    the first rejection draws from the normalised positive part of target - draft; after a full chain the bonus
    token comes from the target's last row.

    A token to which ``draft_probs`` gives 0 cannot have been drawn from them. It is rejected and the next id is
    drawn from the target's own row, which keeps the output exact even then: nothing was learned from the proposal.
    """
    chains, drafted = draft_ids_BG.shape
    if drafted == 0:
        return draft_ids_BG.new_zeros(chains), draw(target_probs_BGV[:, 0], uniforms_BG[:, 0])
    ids_BG1 = draft_ids_BG.unsqueeze(-1)
    target_BG = target_probs_BGV[:, :drafted].gather(-1, ids_BG1).squeeze(-1).double()
    draft_BG = draft_probs_BGV.gather(-1, ids_BG1).squeeze(-1).double()
    keep_BG = (uniforms_BG[:, :drafted] * draft_BG < target_BG) & (draft_BG > 0)
    accepted_B = keep_BG.long().cumprod(1).sum(1)

    # The row of the first rejection. Without one (full chain) or after an impossible token nothing is subtracted.
    rows = torch.arange(chains, device=accepted_B.device)
    last_B = accepted_B.clamp(max=drafted - 1)
    subtract_B = (accepted_B < drafted) & (draft_BG[rows, last_B] > 0)
    target_BV = target_probs_BGV[rows, accepted_B]
    residual_BV = _residual(target_BV, draft_probs_BGV[rows, last_B])
    return accepted_B, draw(torch.where(subtract_B.unsqueeze(-1), residual_BV, target_BV), uniforms_BG[:, drafted])


# -- trees of sampled proposals --------------------------------------------------------------------------------------
def draw_siblings(draft_probs_BV: Tensor, uniforms_BR: Tensor) -> Tensor:
    """Ids [B, R] drawn from each row one after another without replacement; -1 once a row has nothing left.

    The first comes from the row, each further one from the row without the earlier ones, renormalised: what
    :func:`accept_siblings` takes for granted.
    """
    probs_BV, ids = draft_probs_BV, []
    for uniform_B in uniforms_BR.unbind(1):
        left_B = probs_BV.sum(-1) > 0
        ids.append(torch.where(left_B, draw(probs_BV, uniform_B), -1))
        probs_BV = _without(probs_BV, ids[-1])
    return torch.stack(ids, 1)


def accept_siblings(target_BV: Tensor, draft_BV: Tensor, ids_BR: Tensor, uniforms_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Rank [B] of the accepted sibling (-1: none) and the probabilities [B, V] to draw from where there is none.

    ``ids`` [B, R] were drawn without replacement (:func:`draw_siblings`), -1 where there are fewer. The siblings are
    tried in the order in which they were drawn: x is accepted with probability min(1, target(x) / draft(x)); when it
    is rejected, the target becomes the normalised positive part of target - draft, the draft loses x and is
    renormalised, and the next sibling, which was drawn from exactly that draft, is tried against that target.
    """
    accepted_B = torch.full_like(ids_BR[:, 0], -1)
    for rank, id_B in enumerate(ids_BR.unbind(1)):
        open_B = (accepted_B < 0) & (id_B >= 0)
        if not bool(open_B.any()):
            break
        id_B1 = id_B.clamp(min=0).unsqueeze(-1)
        target_B = target_BV.gather(-1, id_B1).squeeze(-1).double()
        draft_B = draft_BV.gather(-1, id_B1).squeeze(-1).double()
        # An impossible token (draft 0) is rejected and nothing is learned from it, as in a chain.
        open_B &= draft_B > 0
        keep_B = open_B & (uniforms_BR[:, rank] * draft_B < target_B)
        accepted_B = torch.where(keep_B, rank, accepted_B)
        rejected_B1 = (open_B & ~keep_B).unsqueeze(-1)
        target_BV = torch.where(rejected_B1, _residual(target_BV, draft_BV), target_BV)
        draft_BV = torch.where(rejected_B1, _without(draft_BV, id_B), draft_BV)
    return accepted_B, target_BV


def accept_trees(
    target_of: Rows, draft_of: Rows, children_NR: Tensor, ids_BN: Tensor, uniforms_BN: Tensor
) -> tuple[Tensor, Tensor]:
    """Last accepted nodes [B] (0: none) and next ids [B] of trees whose siblings were drawn without replacement.

    ``children`` [N, R] lists each node's children by rank, padded with -1, and is common to all B; ``ids`` [B, N]
    are the nodes' tokens (the root's is not looked at, -1 means that there was nothing to draw); ``uniforms`` [B, N]
    decide on nodes 1 to N - 1 in places 0 to N - 2, and the last draws the next id: a tree that is a chain uses
    them as :func:`accept_chains` does. ``draft_of`` is asked for leaves too, where any row will do.
    """
    trees = torch.arange(len(ids_BN), device=ids_BN.device)
    node_B, next_B = torch.zeros_like(trees), torch.full_like(trees, -1)
    while True:
        child_BR = children_NR[node_B]
        ids_BR = torch.where(child_BR >= 0, ids_BN[trees.unsqueeze(-1), child_BR.clamp(min=0)], -1)
        tests_BR = uniforms_BN[trees.unsqueeze(-1), (child_BR - 1).clamp(min=0)]
        rank_B, left_BV = accept_siblings(target_of(node_B), draft_of(node_B), ids_BR, tests_BR)
        stops_B = (rank_B < 0) & (next_B < 0)
        if bool(stops_B.any()):
            next_B = torch.where(stops_B, draw(left_BV, uniforms_BN[:, -1]), next_B)
        if bool((next_B >= 0).all()):
            return node_B, next_B
        child_B = child_BR[trees, rank_B.clamp(min=0)]
        node_B = torch.where(next_B < 0, child_B, node_B)


def _residual(target_BV: Tensor, draft_BV: Tensor) -> Tensor:
    """The normalised positive part of target - draft.

    Where the two agree up to rounding, a rejection leaves no positive part: then the target itself.
    """
    positive_BV = (target_BV - draft_BV).clamp_(min=0)
    total_B1 = positive_BV.sum(-1, keepdim=True)
    return torch.where(total_B1 > 0, positive_BV / total_B1, target_BV)


def _without(draft_BV: Tensor, id_B: Tensor) -> Tensor:
    """The draft's row without this token (-1: unchanged), renormalised; all zero when nothing is left."""
    id_B1 = id_B.unsqueeze(-1)
    lost_B1 = torch.where(id_B1 >= 0, 0.0, draft_BV.gather(-1, id_B1.clamp(min=0)))
    left_BV = draft_BV.scatter(-1, id_B1.clamp(min=0), lost_B1.to(draft_BV.dtype))
    total_B1 = left_BV.sum(-1, keepdim=True)
    return torch.where(total_B1 > 0, left_BV / total_B1, left_BV)
