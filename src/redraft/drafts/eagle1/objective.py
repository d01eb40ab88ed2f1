"""EAGLE-1's objective: the draft regresses the target's next state, and its words through the target's head.

    loss = 1.0 * SmoothL1(state, target state) + 0.1 * H(target's distribution, draft's distribution)

(EAGLE, arXiv 2401.15077, section 4.2; weights ``v_w`` and ``p_w`` of its public training script.) SmoothL1 is the
mean over the width, with torch's default of 1 for where it turns linear; the cross-entropy H takes the target's whole
distribution over its whole vocabulary; both are means over supervised positions. There is one draft step, from the
target's own states: what the draft would meet at later steps is imitated by noise on the input states, uniform in
plus or minus 0.1 * 512 / L for a row of L tokens, as that script has it (``std`` 0.2 times a uniform number in
[-0.5, 0.5), times 512 over the length). The paper's text says U(-0.1, 0.1), which is the same at 512 tokens. Targets
of the regression carry no noise.

Shape legend: N packed pairs, M supervised anchors, C anchors of a portion, H width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft.drafts.eagle.blocks import Plan, unrolled
from redraft.drafts.eagle.unroll import Batch, collate
from redraft.drafts.proposing import Reduce, Weights, alone, shared
from redraft.features import FeatureSource
from redraft.losses.portions import portions, sum_over_portions
from redraft.rows import TokenRow
from redraft.settings.training import TrainConfig
from redraft.target import Head

# Positions whose logits over the whole vocabulary stand in memory at once.
CHUNK = 128


@dataclass(frozen=True)
class Recipe:
    """Weights of the two losses, and the noise: uniform in +-``noise`` on a row of ``noise_tokens`` tokens."""

    state_weight: float = 1.0
    word_weight: float = 0.1
    noise: float = 0.1
    noise_tokens: int = 512


class RegressionObjective:
    """A batch to a scalar loss. Rows, weights of the draft and ``config.seed`` decide it to the bit."""

    # A row may come in spans.
    spans = True

    def __init__(
        self, draft: Any, target: Head, config: TrainConfig, recipe: Recipe = Recipe(), reduce: Reduce = alone
    ) -> None:
        """``config`` gives the seed of the noise and the memory of activations; its loss and its draft steps play no
        part here. ``reduce`` sums
        over workers."""
        self.draft, self.target, self.seed, self.recipe = draft.bind(target), target, config.seed, recipe
        self.reduce, self.memory = reduce, config.activation_memory

    def collate(self, rows: Sequence[TokenRow], features: FeatureSource, weights: Weights = None) -> Batch:
        """See :class:`redraft.drafts.proposing.Objective`; there is one draft step, and no weights."""
        assert weights is None
        return collate(rows, features, 1)

    def __call__(self, batch: Batch) -> Tensor:
        """The mean loss over the anchors of ``batch``, plus the balance of routed experts; of several workers, this
        one's share of it."""
        noisy = self.noisy(batch)
        plan = Plan.of(self.draft, noisy, 1, self.memory * 2**30)
        (states_MH,) = unrolled(self.draft, self.target.embedding, noisy, 1, plan)
        recipe = self.recipe
        loss = recipe.state_weight * F.smooth_l1_loss(states_MH.float(), batch.hidden_M.float())
        loss = loss + recipe.word_weight * self.words(states_MH, batch.hidden_M)
        count = loss.new_tensor(float(len(states_MH)))
        return loss * (len(states_MH) / self.reduce(count)) + shared(self.draft.extra_loss(), self.reduce)

    def words(self, states_MH: Tensor, hidden_MH: Tensor) -> Tensor:
        """Mean cross-entropy of the draft's words against the target's distribution, portion by portion."""

        def value(part: slice, states: list[Tensor]) -> Tensor:
            with torch.no_grad():
                probs_CV = self.draft.logits(hidden_MH[part]).float().softmax(-1)
            return -(probs_CV * self.draft.logits(states[0]).float().log_softmax(-1)).sum() / len(hidden_MH)

        return sum_over_portions(value, portions(len(hidden_MH), CHUNK), [states_MH], [])

    # -- noise -------------------------------------------------------------------------------------------------
    def noisy(self, batch: Batch) -> Batch:
        """The batch with noise on the states that the draft reads."""
        if not self.recipe.noise:
            return batch
        generator = torch.Generator().manual_seed(self.noise_seed(batch))
        drawn_NH = torch.rand(batch.taps_N.shape, generator=generator).to(batch.taps_N.device)
        width_N1 = 2 * self.recipe.noise * self.recipe.noise_tokens / row_lengths(batch)[:, None]
        return replace(batch, taps_N=batch.taps_N.float() + (drawn_NH - 0.5) * width_N1)

    def noise_seed(self, batch: Batch) -> int:
        """A number that differs from step to step and is the same when a killed run comes back to the same step.

        The weights stand for the place in training: a checkpoint restores them bit for bit, and every step moves
        them, so that the same rows get other noise in another epoch.
        """
        digest = hashlib.sha256(f"{self.seed}|".encode())
        digest.update(batch.ids_N.cpu().numpy().tobytes())
        for parameter in self.draft.parameters():
            if parameter.requires_grad:
                digest.update(parameter.detach().flatten()[:8].float().cpu().numpy().tobytes())
        return int.from_bytes(digest.digest()[:7], "big")


def row_lengths(batch: Batch) -> Tensor:
    """For every packed pair [N] the tokens of its row, prompt and response: two more than the row has pairs."""
    row_N = (batch.positions_N == 0).long().cumsum(0) - 1
    return row_N.bincount()[row_N] + 2
