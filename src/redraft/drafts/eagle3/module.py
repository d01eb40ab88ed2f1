"""The Eagle3 draft: decoder layers, one as a rule, over fused target features (EAGLE-3, arXiv 2503.01840).

The pair (state h_t, token x_{t+1}) stands at position t and predicts x_{t+2}. At the first draft step h is the
target's fused taps; afterwards it is the draft's own pre-norm output.

Shape legend: N packed tokens (any leading shape), H hidden size of the draft, F hidden size of the target,
K taps, V target vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from redraft.drafts.eagle.module import EagleConfig, EagleDraft, EagleLayer, layer_of
from redraft.drafts.eagle3.objective import UnrollObjective
from redraft.drafts.layers import Linear, RMSNorm, norm_weight
from redraft.drafts.proposing import Reduce, alone
from redraft.settings.training import TrainConfig
from redraft.target import FINAL, Head


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(EagleConfig):
    """The shape of an Eagle3 draft and the options that public checkpoints carry.

    ``norm_output``: the next step takes the state behind ``norm``. ``head_norm``: logits are of the state behind it.
    """

    LISTS: ClassVar[tuple[str, ...]] = ("taps", *EagleConfig.LISTS)
    LATER: ClassVar[tuple[str, ...]] = (*EagleConfig.LATER, "fc_bias", "head_norm")
    SWITCHES: ClassVar[tuple[str, ...]] = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    ALWAYS: ClassVar[tuple[str, ...]] = (*EagleConfig.ALWAYS, *SWITCHES)

    target_hidden_size: int
    draft_vocab_size: int
    taps: tuple[int, ...]
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    fc_bias: bool = False
    head_norm: bool = True

    def wrong_fields(self) -> list[str]:
        whole = all(type(tap) is int and tap >= FINAL for tap in self.taps)
        return [*super().wrong_fields(), *["taps"] * (not self.taps or not whole)]


class Eagle3Layer(EagleLayer):
    """A decoder layer whose attention reads [norm(embedding); norm(state)] and whose residual stream is the state."""

    input_layernorm: RMSNorm
    hidden_norm: RMSNorm

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config, 2 * config.hidden_size, ("input_layernorm", "hidden_norm"))
        self.norm_before_residual = config.norm_before_residual

    def inputs(self, embeds: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads [N, 2H] and the residual stream [N, H]."""
        normed = self.hidden_norm(states)
        residual = normed if self.norm_before_residual else states
        return torch.cat([self.input_layernorm(embeds), normed], -1), residual


class Eagle3Draft(EagleDraft):
    """Weights and forward of an Eagle3 draft."""

    family: ClassVar[str] = "eagle3"
    TOKEN_ROWS: ClassVar[tuple[str, ...]] = ("lm_head.weight",)
    weighable: ClassVar[bool] = True
    config: Eagle3Config
    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: Eagle3Config, vocabulary: Tensor | None = None) -> None:
        """``vocabulary`` [D]: sorted target ids of the draft vocabulary; by default the first D ids."""
        super().__init__(config)
        hidden, fused = config.hidden_size, len(config.taps) * config.target_hidden_size
        self.fc = Linear(fused, hidden, bias=config.fc_bias)
        self.input_norm = RMSNorm(fused, eps=config.rms_norm_eps) if config.norm_before_fc else None
        self.fc_norm = (
            nn.ModuleList(RMSNorm(config.target_hidden_size, eps=config.rms_norm_eps) for _ in config.taps)
            if config.fc_norm
            else None
        )
        self.midlayer = Eagle3Layer(config)
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.lm_head = Linear(hidden, config.draft_vocab_size, bias=False)
        if self.reduced:
            self.set_vocabulary(
                torch.arange(config.draft_vocab_size, device="cpu") if vocabulary is None else vocabulary
            )
        self.complete()

    # -- vocabulary --------------------------------------------------------------------------------------------
    @property
    def reduced(self) -> bool:
        return self.config.draft_vocab_size < self.config.target_vocab_size

    def set_vocabulary(self, ids_D: Tensor) -> None:
        """Set the map buffers: ``d2t`` holds offsets (target id = i + d2t[i]), ``t2d`` the membership."""
        ids_D = ids_D.long()
        if len(ids_D) != self.config.draft_vocab_size or not bool((ids_D[1:] > ids_D[:-1]).all()):
            raise ValueError(f"the vocabulary must hold {self.config.draft_vocab_size} ascending target ids")
        self.register_buffer("d2t", ids_D - torch.arange(len(ids_D), device=ids_D.device))
        self.register_buffer("t2d", torch.isin(torch.arange(self.config.target_vocab_size, device=ids_D.device), ids_D))

    def share_vocabulary(self, other: Self) -> None:
        if self.reduced:
            self.set_vocabulary(other.vocabulary().cpu())

    def vocabulary(self) -> Tensor:
        """Target ids [D] of the draft vocabulary, ascending."""
        index = torch.arange(self.config.draft_vocab_size, device=self.lm_head.weight.device)
        return index + self.d2t if self.reduced else index

    # -- forward -----------------------------------------------------------------------------------------------
    def fuse(self, taps: Tensor) -> Tensor:
        """States [N, H] from the target's taps side by side [N, K*F]."""
        if self.input_norm is not None:
            taps = self.input_norm(taps)
        if self.fc_norm is not None:
            parts = taps.chunk(len(self.config.taps), -1)
            taps = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        return self.fc(taps)

    @property
    def before_head(self) -> nn.Module:
        """The norm whose output the head reads; one that changes nothing where it reads the states as they are."""
        return self.norm if self.config.head_norm else nn.Identity()

    def carry(self, states: Tensor) -> Tensor:
        return self.norm(states) if self.config.norm_output else states

    def objective(self, target: Head, settings: TrainConfig, reduce: Reduce = alone) -> UnrollObjective:
        return UnrollObjective(self, target, settings, reduce=reduce)

    def logits(self, states: Tensor) -> Tensor:
        """Logits [N, D] over the draft vocabulary of pre-norm states [N, H]."""
        return self.lm_head(self.before_head(states))

    # -- fresh start -------------------------------------------------------------------------------------------
    def start(self, target: Any, seed: int) -> None:
        """Random, but for what ``target`` can lend: its last tap passed through, its norm and the rows of its head."""
        super().start(target, seed)
        config = self.config
        if config.hidden_size != target.hidden_size:
            return
        with torch.no_grad():
            self.fc.weight[:, -config.target_hidden_size :] += torch.eye(config.hidden_size)
            self.norm.weight.copy_(_norm_start(target))
            rows = target.head.weight[self.vocabulary().to(target.device)]
            self.lm_head.weight.copy_(rows.float())


def fresh_draft(target: Any, vocabulary: Sequence[int], seed: int = 0, intermediate: int | None = None) -> Eagle3Draft:
    """A new draft for ``target`` that starts from what the target knows.

    ``norm`` and the head rows are the target's own, ``fc`` passes the last tap through, and both projections into
    the residual stream start small, so that training begins from the target's late features.
    """
    config = Eagle3Config(
        **layer_of(target, intermediate),
        target_hidden_size=target.hidden_size,
        draft_vocab_size=len(vocabulary),
        taps=target.taps,
    )
    draft = Eagle3Draft(config, torch.tensor(sorted(vocabulary)))
    draft.start(target, seed)
    return draft


def _norm_start(target: Any) -> Tensor:
    """What the target's final norm multiplies by [H]: its weight as it lies in the file, unless it counts from 1."""
    acting = norm_weight(target.norm, target.hidden_size).float()
    stored = getattr(target.norm, "weight", acting).float()
    return stored if torch.allclose(stored, acting, rtol=0.02, atol=1e-3) else acting
