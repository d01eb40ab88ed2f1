"""TVD++: total variation as a policy gradient whose reward is normalised over the batch (Goel et al., 2403.00858).

Let a token x drawn from the draft earn r(x) = 1[target(x) > draft(x)]. The gradient of total variation is then
REINFORCE's, exactly:

    grad TV = -E_{x ~ draft}[ r(x) * grad log draft(x) ]

TVD++ puts (r - mean) / std in place of r, with mean and standard deviation of the rewards over the whole batch. Here
the expectation is taken over the vocabulary instead of drawn. A constant added to a row's rewards then changes
nothing, so each row has its own mean for a baseline, and what remains is TV's gradient divided by std. As r is 0 or
1, std = sqrt(mean * (1 - mean)), and mean is the batch mean of sum_x draft(x) r(x). Where drafts are far off, rewards
are rare, std is small, and TV's vanishing gradient is lifted.

The value is TV / std with std held, the function that has this gradient.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from redraft.losses.rows import Acceptance, probabilities, weighted_sum, with_gradient
from redraft.registries import LOSSES

# A batch whose rewards all but agree would be divided by nothing.
LEAST_STD = 1e-4


def mean_and_std(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the rewards from :meth:`NormalisedReward.statistics`, scalars."""
    mean = statistics[0] / statistics[1].clamp(min=torch.finfo(statistics.dtype).tiny)
    return mean, (mean * (1 - mean)).clamp(min=0).sqrt().clamp(min=LEAST_STD)


class NormalisedReward:
    """TVD++ with the exact expectation; :meth:`gradient` is what the sampled form has of its own."""

    def __call__(
        self,
        draft_logits_ND: Tensor,
        teacher_logits_ND: Tensor,
        weight_N: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(sum, count) of TV / std over positions; see ``redraft.losses`` for the contract and ``statistics``."""
        with torch.no_grad():
            found = Acceptance(*probabilities(draft_logits_ND, teacher_logits_ND))
            statistics = reward_sums(found, weight_N) if statistics is None else statistics
            mean, std = mean_and_std(statistics.to(found.draft_ND.dtype))
        loss_N = found.distance_N / std
        known_N = with_gradient(draft_logits_ND, loss_N, lambda: self.gradient(found, mean).div_(std))
        return weighted_sum(known_N, weight_N)

    def gradient(self, found: Acceptance, mean: Tensor) -> Tensor:
        """[N, D], before the division by std. Each row's own mean is the baseline, so the batch's has no part."""
        return found.gradient().neg_()

    def statistics(self, draft_logits_ND: Tensor, teacher_logits_ND: Tensor, weight_N: Tensor | None = None) -> Tensor:
        """[2]: the weighted sum of expected rewards, and of weights. They add over the parts of a batch."""
        with torch.no_grad():
            return reward_sums(Acceptance(*probabilities(draft_logits_ND, teacher_logits_ND)), weight_N)

    def hold(self, draft_logits_ND: Tensor, teacher_logits_ND: Tensor, weight_N: Tensor | None = None) -> partial:
        """The loss with the normalisation as it is at these logits."""
        return partial(self, statistics=self.statistics(draft_logits_ND, teacher_logits_ND, weight_N))


def reward_sums(found: Acceptance, weight_N: Tensor | None) -> Tensor:
    """[2]: see :meth:`NormalisedReward.statistics`."""
    return torch.stack(weighted_sum(found.reward_N, weight_N))


LOSSES.register("tvdpp")(NormalisedReward())
