"""The verification rule of speculative decoding, pure: probabilities and uniforms in, decisions out.

Source: Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318). Probabilities arrive warped (see
``redraft.sampling.warp``); the rule neither knows nor changes temperature, top-k or top-p.

Shape legend: B independent chains, G drafted tokens a chain, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redraft.sampling import draw


def accept_greedy(target_ids: Tensor | Sequence[int], draft_ids: Tensor | Sequence[int]) -> tuple[int, int]:
    """(accepted, next_id) when the target decodes greedily: accept while the draft equals the target's argmax.

    ``target_ids`` [G + 1] are the target's argmaxes before each draft token and after the last; ``draft_ids`` [G].
    """
    targets = target_ids.tolist() if isinstance(target_ids, Tensor) else list(target_ids)
    drafts = draft_ids.tolist() if isinstance(draft_ids, Tensor) else list(draft_ids)
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == targets[accepted]:
        accepted += 1
    return accepted, int(targets[accepted])


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
    residual_BV = (target_BV - draft_probs_BGV[rows, last_B] * subtract_B.unsqueeze(-1)).clamp_(min=0)
    # Where target and draft agree up to rounding, a rejection leaves no positive part to draw from.
    empty_B = residual_BV.sum(-1, keepdim=True) <= 0
    return accepted_B, draw(torch.where(empty_B, target_BV, residual_BV), uniforms_BG[:, drafted])


def accept_chain(
    target_probs_GV: Tensor, draft_probs_GV: Tensor, draft_ids_G: Tensor, uniforms_G: Tensor
) -> tuple[int, int]:
    """(accepted, next_id) of one chain: :func:`accept_chains` on [G + 1, V], [G, V], [G] and [G + 1]."""
    accepted_B, next_B = accept_chains(target_probs_GV[None], draft_probs_GV[None], draft_ids_G[None], uniforms_G[None])
    return int(accepted_B), int(next_B)
