"""Several experts in one SwiGLU, and the router that weighs them (the general form of EDA, arXiv 2603.09527).

Experts are equal blocks of the inner width: block e of the rows of gate and up and of the columns of down is expert
e. ``sum_e weight_e(x) * expert_e(x)`` is then one SwiGLU whose inner activations are scaled block by block. All
blocks are computed and those of experts that were not chosen are scaled by zero: every shape is fixed, whatever the
router says, and at the width of a draft reading the weights costs more than the products that a gather would save.

The router scores experts by a matrix without bias, keeps the best k, and takes the softmax among those, in float32
also under autocast. With one expert there is no router.

Shape legend: N tokens (any leading shape), H hidden size, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redraft.drafts.layers import GatedMLP


class Router(nn.Module):
    """Weights of E experts for each token, all zero but ``active`` of them; they add up to ``total``."""

    def __init__(self, hidden: int, experts: int, active: int, total: float) -> None:
        super().__init__()
        self.experts, self.active, self.total = experts, active, total
        self.weight = nn.Parameter(torch.zeros(experts, hidden))
        # (times chosen [E], summed probabilities [E], tokens) of every pass since the balance was last asked for.
        self.seen: list[tuple[Tensor, Tensor, int]] = []

    def spread(self, generator: torch.Generator) -> None:
        """Start from small random scores, so that tokens do not all choose the same experts."""
        with torch.no_grad():
            drawn = torch.randn(self.weight.shape, generator=generator) * (0.5 / math.sqrt(self.weight.shape[1]))
            self.weight.copy_(drawn)

    def forward(self, x: Tensor) -> Tensor:
        """Weights [N, E] of experts for tokens [N, H]."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores_NE = F.linear(x.to(dtype), self.weight.to(dtype))
            best = scores_NE.topk(self.active, -1).indices
            chosen_NE = torch.zeros_like(scores_NE, dtype=torch.bool).scatter_(-1, best, True)
            if self.training and torch.is_grad_enabled() and self.active < self.experts:
                self._note(scores_NE, chosen_NE)
            raised_NE = (scores_NE - scores_NE.detach().amax(-1, keepdim=True)).exp()
            raised_NE = raised_NE.masked_fill(~chosen_NE, 0.0)
            # In this order equal scores give exactly total / active, also where 1 / active is no float.
            return raised_NE * self.total / raised_NE.sum(-1, keepdim=True)

    def _note(self, scores_NE: Tensor, chosen_NE: Tensor) -> None:
        probs_NE = scores_NE.softmax(-1).flatten(0, -2)
        counts_E = chosen_NE.flatten(0, -2).sum(0)
        self.seen.append((counts_E, probs_NE.sum(0), len(probs_NE)))

    def balance(self) -> Tensor | None:
        """Load-balancing term over the passes since the last call, which it forgets; ``None`` if there was none.

        E * sum_e share_e * probability_e (Switch Transformers, arXiv 2101.03961, equation 4), with the share of all
        choices that fell on expert e and its mean probability before the choice: one when both are even.
        """
        if not self.seen:
            return None
        counts, probs, tokens = zip(*self.seen, strict=True)
        self.seen = []
        share_E = torch.stack(counts).sum(0) / (sum(tokens) * self.active)
        return self.experts * (share_E * torch.stack(probs).sum(0) / sum(tokens)).sum()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a router starts with nothing seen: what it saw hangs on the graph of another pass."""
        return {**self.__dict__, "seen": []}


class RoutedMLP(GatedMLP):
    """A SwiGLU of ``experts`` equal blocks, of which a router gives each token ``active``; a plain one for one."""

    def __init__(self, hidden: int, inner: int, experts: int = 1, active: int = 1, total: float = 1.0) -> None:
        """Raises ``ValueError`` for counts that cannot be, or a width that they do not divide."""
        if experts < 1 or not 1 <= active <= experts or inner % experts:
            raise ValueError(f"{active} active of {experts} experts of an inner width of {inner}")
        super().__init__(hidden, inner)
        self.router = Router(hidden, experts, active, total) if experts > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        if self.router is not None:
            weights = self.router(x).to(inner.dtype)
            inner = inner * weights.repeat_interleave(inner.shape[-1] // self.router.experts, -1)
        return self.down_proj(inner)


def balance_loss(draft: nn.Module, weight: float) -> Tensor:
    """``weight`` times the load-balancing terms of all routers of a draft since the last call; zero without any."""
    terms = [term for m in draft.modules() if isinstance(m, Router) and (term := m.balance()) is not None]
    if not terms:
        return torch.zeros((), device=next(draft.parameters()).device)
    return weight * torch.stack(terms).sum()
