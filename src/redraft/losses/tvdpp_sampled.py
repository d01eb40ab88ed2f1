"""TVD++ as published: one token drawn from the draft at every position (Goel et al., arXiv 2403.00858).

    gradient = -(r(x) - mean) / std * grad log draft(x),    x ~ draft,    r(x) = 1[target(x) > draft(x)]

Mean and standard deviation are those of ``tvdpp``, expectations over the batch and not over the draws, so the
estimate's own expectation is the gradient of ``tvdpp``, exactly; so is its value. It is there for comparison: the
exact form costs the same where all logits are at hand, and has no noise.

The draws come from torch's global generator, which the trainer seeds from its seed and step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redraft.losses.rows import Acceptance
from redraft.losses.tvdpp import NormalisedReward
from redraft.registries import LOSSES
from redraft.sampling import draw


def sampled_policy_gradient(draft_ND: Tensor, token_N: Tensor, advantage_N: Tensor) -> Tensor:
    """-advantage * grad log draft(token) with respect to the logits, row by row, [N, D]."""
    gradient_ND = draft_ND * advantage_N[:, None]
    return gradient_ND.scatter_add_(-1, token_N[:, None], -advantage_N[:, None])


class SampledReward(NormalisedReward):
    """TVD++ on drawn tokens."""

    sampled = True

    def gradient(self, found: Acceptance, mean: Tensor) -> Tensor:
        """[N, D], before the division by std: an estimate from one draw a row."""
        draft_ND = found.draft_ND
        # Drawn in float64 on the CPU: the same tokens on every device and in every data type.
        uniforms_N = torch.rand(len(draft_ND), dtype=torch.float64).to(draft_ND.device)
        token_N = draw(draft_ND, uniforms_N)
        reward_N = (found.target_ND > draft_ND).gather(-1, token_N[:, None]).squeeze(-1).to(draft_ND.dtype)
        return sampled_policy_gradient(draft_ND, token_N, reward_N - mean)


LOSSES.register("tvdpp_sampled")(SampledReward())
