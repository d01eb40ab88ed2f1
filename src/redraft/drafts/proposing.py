"""How a family of drafts proposes, is walked over stored text, and is trained: what the rest asks of any draft.

Decoding asks a draft for a *proposer*, simulation and selection for a *walk*, training for an *objective*. A family
implements them in its own folder and hands them out by the methods of :class:`redraft.drafts.base.Draft`; what several
families share stands once beside them (``drafts/eagle``, ``drafts/walks.py``).

Texts and taps. A target pass over x_0 ... x_t gives the taps h_0 ... h_t, and h_t is what a draft may know of the text
up to x_t when it guesses x_{t+2}. New tokens therefore come with the taps of the positions *before* them: ``ids_T``
ends with the tokens x_{t+1} whose taps h_t are the rows of ``taps_T``. Only at the very first call is there one token
more than taps, the first of the text. A draft without taps gets rows of width 0.

Shape legend: T new tokens, G proposed tokens, N or F rows of a pass, H width of a draft's states, C cached and new
positions, D draft vocabulary, A anchors of one response, J draft steps, K taps of width F side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from redraft.features import FeatureSource
from redraft.rows import AnyRow, TokenRow
from redraft.settings.sampler import Sampler

Pick = Callable[[Tensor], Tensor]
"""Logits [N, D] over the draft vocabulary -> the index [N] to propose in each row. Rows are asked for in the order of
their positions, each once: a sampling caller keeps the probabilities that it drew from."""

Reduce = Callable[[Tensor], Tensor]
"""Adds sums over all workers of a distributed run."""


def alone(sums: Tensor) -> Tensor:
    """The sum over the workers of a run where there is one."""
    return sums


def shared(loss: Tensor, reduce: Reduce) -> Tensor:
    """This worker's part of the mean of a loss that each worker has of its own batch."""
    return loss / reduce(torch.ones_like(loss)) if loss.requires_grad else loss


Runs = Iterator[tuple[AnyRow, list[int]]]
Chances = Iterator[tuple[AnyRow, Tensor]]
Weights = Mapping[str, Tensor] | None
"""By row key, for each anchor and draft step [A, J]."""


# -- decoding --------------------------------------------------------------------------------------------------------
class Proposer(Protocol):
    """A draft's state of one request. What it made for guesses that were not kept, it forgets by itself."""

    @property
    def capacity(self) -> int:
        """Tokens that its buffers hold: the text and one round's guesses."""

    @property
    def verified(self) -> int:
        """How much verified text it has taken in, in units of its own."""

    def rollback(self, verified: int) -> None:
        """Go back to when :attr:`verified` was this; 0 makes it ready for another request."""


class ChainProposer(Proposer, Protocol):
    """Proposes chains."""

    def propose(self, ids_T: Tensor, taps_T: Tensor, gamma: int, pick: Pick) -> Tensor:
        """Take in what was verified since the last call, then propose ``gamma`` target ids [G].

        See the module's text for ``ids_T`` and ``taps_T``. The draft's own guesses of the last round that were kept
        are among ``ids_T``, in their order and followed by one token of the target's choice.
        """


class TreeProposer(Proposer, Protocol):
    """Gives what a tree is grown from: states of nodes, level by level; their logits are the draft's own."""

    def feed(self, ids_T: Tensor, taps_T: Tensor) -> Tensor:
        """Take in what was verified since the last call; the root's state [1, H]."""

    def expand(self, tokens_F: Tensor, states_FH: Tensor, depth: int, mask_FC: Tensor) -> Tensor:
        """States [F, H] of guessed nodes at this depth below the root, given the states of their parents.

        ``mask_FC`` is boolean, true where a node may look: over the verified text, the nodes expanded since
        :meth:`feed`, and these nodes themselves.
        """


# -- acceptance over stored rows -------------------------------------------------------------------------------------
class Walk(Protocol):
    """A draft over stored responses of its target, without decoding. Rows come out in an order of the walk's own;
    rows without an anchor are left out. ``features`` may be None for a draft without taps."""

    def runs(self, rows: Sequence[AnyRow], features: FeatureSource | None, gamma: int) -> Runs:
        """For each anchor of a row how many greedy proposals in a row are right when a round starts there, at most
        ``gamma``."""

    def chances(self, rows: Sequence[AnyRow], features: FeatureSource | None, gamma: int, sampler: Sampler) -> Chances:
        """The chance [A, J] that the j-th token behind each anchor came by acceptance, given that it came: w of
        :mod:`redraft.acceptance.simulate`. 0 behind the end of the response and behind a token that cannot be
        accepted; of a greedy sampler 1 up to the first wrong proposal."""

    def alphas(self, rows: Sequence[AnyRow], features: FeatureSource | None) -> Iterator[tuple[AnyRow, float]]:
        """The mean over a row's anchors of sum_x min(target, draft) at the first drafted position. The target's
        probabilities are over its whole vocabulary."""


# -- training --------------------------------------------------------------------------------------------------------
Batch = TypeVar("Batch")


class Objective(Protocol[Batch]):
    """From rows to one number to differentiate. One that has ``spans``, and true, takes a long row in spans
    (:class:`redraft.rows.Span`); to any other rows come whole."""

    def collate(self, rows: Sequence[TokenRow], features: FeatureSource, weights: Weights = None) -> Batch:
        """The rows as a batch, which has ``.to(device)``. ``weights`` say what each state (anchor and draft step)
        counts for, in place of the objective's own; asked of drafts that are ``weighable`` only."""

    def __call__(self, batch: Batch) -> Tensor:
        """The scalar loss of a batch, ready for ``backward``: a mean, whatever the batch's size."""
