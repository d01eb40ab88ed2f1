"""The Eagle1 draft: ``fc`` over [embedding; top feature], then one decoder layer (EAGLE, arXiv 2401.15077).

The pair (state h_t, token x_{t+1}) stands at position t. h is the target's state after its final norm, which is what
its head reads; the draft predicts the next such state, so the target's own head and embedding serve it, and its
output takes the place of h at the next draft step. The layer has no norm before its attention and none behind its
MLP, as in EAGLE's public code and in the engines that load such checkpoints.

Shape legend: N packed tokens (any leading shape), H hidden size of target and draft, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from redraft.drafts.eagle.module import EagleConfig, EagleDraft, EagleLayer, layer_of
from redraft.drafts.eagle1.objective import RegressionObjective
from redraft.drafts.layers import Linear
from redraft.drafts.proposing import Reduce, alone
from redraft.settings.training import TrainConfig
from redraft.target import FINAL, Head


@dataclass(frozen=True, kw_only=True)
class Eagle1Config(EagleConfig):
    """The shape of an Eagle1 draft. What the family fixes for all (taps, vocabulary) are properties."""

    fc_bias: bool = False

    @property
    def taps(self) -> tuple[int, ...]:
        """What the draft reads of the target: the state after the final norm."""
        return (FINAL,)

    @property
    def target_hidden_size(self) -> int:
        return self.hidden_size

    @property
    def draft_vocab_size(self) -> int:
        """The target's own vocabulary, since its head is the draft's."""
        return self.target_vocab_size


class Eagle1Layer(EagleLayer):
    """A decoder layer over ``fc([embedding; state])``, which is its residual stream too."""

    def __init__(self, config: Eagle1Config, fc: Linear) -> None:
        super().__init__(config, config.hidden_size)
        # ``fc`` belongs to the draft, under the name that checkpoints give it; in a tuple it is borrowed, not owned.
        self.borrowed = (fc,)

    def inputs(self, embeds: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads and the residual stream: both [N, H], and the same."""
        mixed = self.borrowed[0](torch.cat([embeds, states], -1))
        return mixed, mixed


class Eagle1Draft(EagleDraft):
    """Weights and forward of an Eagle1 draft. Its head is the target's: :meth:`bind` it before asking for logits."""

    family: ClassVar[str] = "eagle1"
    config: Eagle1Config

    def __init__(self, config: Eagle1Config) -> None:
        super().__init__(config)
        self.fc = Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.midlayer = Eagle1Layer(config, self.fc)
        self._head: Callable[[Tensor], Tensor] | None = None
        self.complete()

    def bind(self, target: Any) -> Self:
        """Borrow the head of ``target``, in the target's type and place; copies of this draft share it."""
        project, scale = target.head, target.scale_logits
        # A function, which a copy of the draft shares; a module would be a part of the draft's state.
        self._head = lambda states: scale(project(states))
        return self

    def inherit(self, other: Any) -> Self:
        self._head = other._head
        return super().inherit(other)

    def vocabulary(self) -> Tensor:
        """Target ids [V] that the draft can say: all."""
        return torch.arange(self.config.target_vocab_size, device=self.fc.weight.device)

    def fuse(self, taps: Tensor) -> Tensor:
        """States [N, H]: the target's final-norm states as they are."""
        return taps

    def carry(self, states: Tensor) -> Tensor:
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Logits [N, V] of predicted states [N, H], by the target's head with its scaling.

        Raises ``ValueError`` when no target is bound (a defect of ours).
        """
        if self._head is None:
            raise ValueError("an Eagle1 draft has no head of its own; bind it to its target first")
        return self._head(states)

    def objective(self, target: Head, settings: TrainConfig, reduce: Reduce = alone) -> RegressionObjective:
        return RegressionObjective(self, target, settings, reduce=reduce)

    def start(self, target: Any, seed: int) -> None:
        """Random, with ``fc`` passing the state through: the first guess at the next state is the last one itself."""
        super().start(target, seed)
        hidden = self.config.hidden_size
        with torch.no_grad():
            self.fc.weight[:, hidden:] += torch.eye(hidden)

    @property
    def parameters_per_token(self) -> int:
        """Parameters that one drafted token multiplies: the draft's own, and the target's head."""
        return super().parameters_per_token + self.config.target_vocab_size * self.config.hidden_size


def fresh_eagle1(target: Any, seed: int = 0, intermediate: int | None = None, fc_bias: bool = False) -> Eagle1Draft:
    """A new draft for ``target``, bound to it, whose first guess at the next state is the last state itself.

    ``fc_bias`` as in the configs that EAGLE published (``bias``); without it every engine can load the draft.
    """
    draft = Eagle1Draft(Eagle1Config(**layer_of(target, intermediate), fc_bias=fc_bias))
    draft.start(target, seed)
    return draft.bind(target)
