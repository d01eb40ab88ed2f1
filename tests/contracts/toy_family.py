"""A draft family in one file: what follows a token is told from that token alone, through a table and a linear head.

It is here to show how little a family needs, and that everybody outside asks the protocol: nothing in the package knows
it. Tests load it as a plugin.

Shape legend: N tokens (any leading shape), H width of the table, V vocabulary, M supervised positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from redraft.drafts.base import Draft, DraftConfig, Family
from redraft.drafts.groups import attach_parts
from redraft.drafts.layers import Linear
from redraft.drafts.proposing import Pick, Reduce, alone
from redraft.drafts.walks import TextWalk
from redraft.errors import UserError
from redraft.registries import FAMILIES, LOSSES
from redraft.settings.training import TrainConfig
from redraft.target import Target


@dataclass(frozen=True, kw_only=True)
class ToyConfig(DraftConfig):
    """Sizes of the table."""

    draft_vocab_size: int
    hidden_size: int = 16
    taps: ClassVar[tuple[int, ...]] = ()

    def check_fit(self, target: Any) -> None:
        if self.draft_vocab_size != target.vocab_size:
            raise UserError(f"a toy of {self.draft_vocab_size} words does not fit a target of {target.vocab_size}")


class ToyDraft(Draft):
    """Logits of the next token from the last one."""

    family = "toy"
    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"embed": ("table.*",), "head": ("head.*",)}
    grows_trees = True

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.draft_vocab_size, config.hidden_size)
        self.head = Linear(config.hidden_size, config.draft_vocab_size)

    def vocabulary(self) -> Tensor:
        return torch.arange(self.config.draft_vocab_size, device=self.head.weight.device)

    @property
    def parameters_per_token(self) -> int:
        return sum(p.numel() for p in self.head.parameters())

    def states(self, ids_N: Tensor) -> Tensor:
        """States [N, H] behind these tokens."""
        return self.table(ids_N)

    def logits(self, states: Tensor) -> Tensor:
        return self.head(states)

    def restarted(self, target: Any, seed: int = 0) -> ToyDraft:
        return fresh_toy(target, (), seed)

    def proposer(self, target: Target, capacity: int) -> ToyProposer:
        return ToyProposer(self, capacity)

    def walk(self, target: Target) -> TextWalk:
        return TextWalk(self, target, self.states)

    def objective(self, target: Target, settings: TrainConfig, reduce: Reduce = alone) -> ToyObjective:
        return ToyObjective(self, target, settings, reduce)


class ToyProposer:
    """Chains and trees; all that it remembers of a text is how long it is."""

    def __init__(self, draft: ToyDraft, capacity: int) -> None:
        self.draft, self.capacity, self.verified = draft, capacity, 0

    def propose(self, ids_T: Tensor, taps_T: Tensor, gamma: int, pick: Pick) -> Tensor:
        states, tokens = self.feed(ids_T, taps_T), list[Tensor]()
        for _ in range(gamma):
            tokens.append(pick(self.draft.logits(states)))
            states = self.draft.states(tokens[-1])
        return torch.cat(tokens)

    def feed(self, ids_T: Tensor, taps_T: Tensor) -> Tensor:
        self.verified += len(ids_T)
        return self.draft.states(ids_T[-1:])

    def expand(self, tokens_F: Tensor, states_FH: Tensor, depth: int, mask_FC: Tensor) -> Tensor:
        return self.draft.states(tokens_F)

    def rollback(self, verified: int) -> None:
        self.verified = verified


@dataclass
class ToyBatch:
    """The tokens [M] in front of the supervised ones, and the target's final states [M, F] there."""

    ids_M: Tensor
    hidden_MF: Tensor

    def to(self, device: torch.device) -> ToyBatch:
        return ToyBatch(self.ids_M.to(device), self.hidden_MF.to(device))


class ToyObjective:
    """The mean of a loss over supervised positions."""

    def __init__(self, draft: ToyDraft, target: Target, settings: TrainConfig, reduce: Reduce) -> None:
        self.draft, self.target, self.loss, self.reduce = draft, target, LOSSES.get(settings.loss), reduce

    def collate(self, rows: Sequence[Any], features: Any, weights: Mapping[str, Tensor] | None = None) -> ToyBatch:
        ids = [torch.tensor(row.response_ids[:-1]) for row in rows]
        return ToyBatch(torch.cat(ids), torch.cat([features.get(row)[1] for row in rows]))

    def __call__(self, batch: ToyBatch) -> Tensor:
        with torch.no_grad():
            teacher_MV = self.target.scale_logits(self.target.head(batch.hidden_MF))
        total, count = self.loss(self.draft.logits(self.draft.states(batch.ids_M)), teacher_MV)
        return total / self.reduce(count)


def build(values: dict[str, Any]) -> ToyDraft:
    """An untrained draft, private parts included."""
    config = ToyConfig.from_dict(values)
    return attach_parts(ToyDraft(config.dense()), config)


def fresh_toy(target: Any, vocabulary: Sequence[int], seed: int = 0) -> ToyDraft:
    """A random draft for ``target``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ToyDraft(ToyConfig(draft_vocab_size=target.vocab_size)).to(target.device)


def nothing(*_: Any, **__: Any) -> Any:
    raise UserError("nobody else writes toys")


FAMILIES.register("toy")(
    Family(
        name="toy", build=build, fresh=fresh_toy, reads_states=False, recognises=lambda checkpoint: False, read=nothing
    )
)
