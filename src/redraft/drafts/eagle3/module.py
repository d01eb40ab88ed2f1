"""The Eagle3 draft: one decoder layer over fused target features (EAGLE-3, arXiv 2503.01840).

The pair (state h_t, token x_{t+1}) stands at position t and predicts x_{t+2}. At the first draft step h is the
target's fused taps; afterwards it is the draft's own pre-norm output.

Shape legend: N packed tokens (any leading shape), H hidden size of the draft, F hidden size of the target,
K taps, V target vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from redraft.artifact import FAMILIES
from redraft.drafts.config import EagleConfig, heads_of, inner_width, rope_of
from redraft.drafts.experts import SharedPrivateMLP, merge_private
from redraft.drafts.glue import EagleGlue
from redraft.drafts.layers import Attend, Attention, DraftLayer, Linear, RMSNorm, Rotary, norm_weight
from redraft.drafts.routing import balance_loss
from redraft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(EagleConfig):
    """The shape of an Eagle3 draft and the options that public checkpoints carry."""

    LISTS: ClassVar[tuple[str, ...]] = ("taps", *EagleConfig.LISTS)

    target_hidden_size: int
    draft_vocab_size: int
    taps: tuple[int, ...]
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False


class Eagle3Layer(DraftLayer):
    """A decoder layer whose attention reads [norm(embedding); norm(state)] and whose residual stream is the state."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.norm_before_residual = config.norm_before_residual
        self.self_attn = Attention(
            2 * hidden,
            hidden,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.attention_bias,
        )
        self.mlp = SharedPrivateMLP.of(config)
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.hidden_norm = RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)

    def inputs(self, embeds: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads [N, 2H] and the residual stream [N, H]."""
        normed = self.hidden_norm(states)
        residual = normed if self.norm_before_residual else states
        return torch.cat([self.input_layernorm(embeds), normed], -1), residual


class Eagle3Draft(EagleGlue, nn.Module):
    """Weights and forward of an Eagle3 draft. Embeddings are the target's unless the checkpoint ships its own."""

    d2t: Tensor
    t2d: Tensor
    family = "eagle3"
    weighable = True

    def objective(self, target, settings, reduce=lambda sums: sums):
        from redraft.drafts.eagle3.objective import UnrollObjective

        return UnrollObjective(self, target, settings, reduce=reduce)

    def __init__(self, config: Eagle3Config, vocabulary: Tensor | None = None) -> None:
        """``vocabulary`` [D]: sorted target ids of the draft vocabulary; by default the first D ids."""
        super().__init__()
        self.config = config
        hidden, fused = config.hidden_size, len(config.taps) * config.target_hidden_size
        self.fc = Linear(fused, hidden, bias=False)
        self.input_norm = RMSNorm(fused, eps=config.rms_norm_eps) if config.norm_before_fc else None
        self.fc_norm = (
            nn.ModuleList(RMSNorm(config.target_hidden_size, eps=config.rms_norm_eps) for _ in config.taps)
            if config.fc_norm
            else None
        )
        self.midlayer = Eagle3Layer(config)
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.lm_head = Linear(hidden, config.draft_vocab_size, bias=False)
        self.embed_tokens = nn.Embedding(config.target_vocab_size, hidden) if config.own_embedding else None
        if config.draft_vocab_size < config.target_vocab_size:
            self.set_vocabulary(torch.arange(config.draft_vocab_size) if vocabulary is None else vocabulary)
        config.attach_low_rank(self)
        self.rotary = Rotary(config.rope_parameters, config.head_dim, config.max_position_embeddings)

    # -- vocabulary --------------------------------------------------------------------------------------------
    @property
    def reduced(self) -> bool:
        """Whether the draft speaks a part of the target's vocabulary."""
        return self.config.draft_vocab_size < self.config.target_vocab_size

    def set_vocabulary(self, ids_D: Tensor) -> None:
        """Set the map buffers: ``d2t`` holds offsets (target id = i + d2t[i]), ``t2d`` the membership."""
        ids_D = ids_D.long()
        if len(ids_D) != self.config.draft_vocab_size or not bool((ids_D[1:] > ids_D[:-1]).all()):
            raise ValueError(f"the vocabulary must hold {self.config.draft_vocab_size} ascending target ids")
        member = torch.zeros(self.config.target_vocab_size, dtype=torch.bool, device=ids_D.device)
        member[ids_D] = True
        self.register_buffer("d2t", ids_D - torch.arange(len(ids_D), device=ids_D.device))
        self.register_buffer("t2d", member)

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

    def embed(self, ids: Tensor, target_embedding: nn.Module) -> Tensor:
        return self.embed_tokens(ids) if self.embed_tokens is not None else target_embedding(ids)

    def forward(self, embeds: Tensor, states: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Pre-norm states [N, H] for tokens whose embeddings [N, H] stand beside the previous states [N, H]."""
        return self.midlayer(embeds, states, self.rotary(positions), attend)

    def carry(self, states: Tensor) -> Tensor:
        """What the next draft step takes in place of the target's features."""
        return self.norm(states) if self.config.norm_output else states

    def logits(self, states: Tensor) -> Tensor:
        """Logits [N, D] over the draft vocabulary of pre-norm states [N, H]."""
        return self.lm_head(self.norm(states))

    # -- training ----------------------------------------------------------------------------------------------
    def extra_loss(self) -> Tensor:
        """The weighted load-balancing term of routed experts over all passes since the last call; zero without any."""
        return balance_loss(self, self.config.balance)

    def restarted(self, target: Any, seed: int = 0) -> Eagle3Draft:
        """A new draft of this one's shape (private parts merged) and vocabulary, that starts from ``target`` alone.

        Nothing of this draft's weights is in it but a table of embeddings, where the width rules out the target's.
        Raises ``UserError`` for routed experts and for a target of other sizes.
        """
        config = merge_private(self).config
        check_fit(config, target)
        new = Eagle3Draft(config, self.vocabulary().cpu())
        start_from_target(new, target, seed)
        if self.embed_tokens is not None and new.embed_tokens is not None:
            new.embed_tokens.load_state_dict(self.embed_tokens.state_dict())
        return new.to(self.lm_head.weight)

    @property
    def parameters_per_token(self) -> int:
        """Parameters that one drafted token multiplies (``fc`` runs once a verified token, and is counted).

        Experts that a router leaves out are among them: they are computed and weighed with zero.
        """
        return sum(p.numel() for n, p in self.named_parameters() if not n.startswith("embed_tokens"))


@FAMILIES.register("eagle3")
def build(config: dict[str, Any]) -> Eagle3Draft:
    """An untrained draft of this configuration, for a loader to fill."""
    return Eagle3Draft(Eagle3Config.from_dict(config))


def check_fit(config: Eagle3Config, target: Any) -> None:
    """Raise ``UserError`` when a draft of this shape cannot sit on ``target`` (sizes, taps, vocabulary)."""
    problems: list[str] = []
    if config.target_hidden_size != target.hidden_size:
        problems.append(f"draft expects features of width {config.target_hidden_size}, target has {target.hidden_size}")
    if config.target_vocab_size != target.vocab_size:
        problems.append(f"draft maps a vocabulary of {config.target_vocab_size}, target has {target.vocab_size}")
    deepest = max(config.taps)
    if deepest > target.layers:
        problems.append(f"draft taps layer {deepest}, target has {target.layers} layers")
    if not config.own_embedding and config.hidden_size != target.hidden_size:
        problems.append(f"draft width {config.hidden_size} cannot use the target's embeddings of {target.hidden_size}")
    if problems:
        raise UserError(f"this draft does not fit the target: {'; '.join(problems)}; give the draft made for it")


def fresh_draft(target: Any, vocabulary: Sequence[int], seed: int = 0, intermediate: int | None = None) -> Eagle3Draft:
    """A new draft for ``target`` that starts from what the target knows.

    ``norm`` and the head rows are the target's own, ``fc`` passes the last tap through, and both projections into
    the residual stream start small, so that training begins from the target's late features.
    """
    source = target.config
    config = Eagle3Config(
        hidden_size=target.hidden_size,
        intermediate_size=intermediate or inner_width(source),
        **heads_of(source),
        target_hidden_size=target.hidden_size,
        target_vocab_size=target.vocab_size,
        draft_vocab_size=len(vocabulary),
        taps=target.taps,
        rms_norm_eps=float(getattr(source, "rms_norm_eps", 1e-5)),
        rope_parameters=rope_of(source),
        max_position_embeddings=target.context,
    )
    draft = Eagle3Draft(config, torch.tensor(sorted(vocabulary)))
    start_from_target(draft, target, seed)
    return draft


def _norm_start(target: Any) -> Tensor:
    """What the target's final norm multiplies by [H]: its weight as it lies in the file, unless it counts from 1."""
    acting = norm_weight(target.norm, target.hidden_size).float()
    stored = getattr(target.norm, "weight", acting).float()
    return stored if torch.allclose(stored, acting, rtol=0.02, atol=1e-3) else acting


def start_from_target(draft: Eagle3Draft, target: Any, seed: int) -> None:
    """Fill a draft on the CPU for training from nothing: random, but for what ``target`` can lend it."""
    config, generator = draft.config, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.02, generator=generator)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.mul_(0.1)
            elif name.endswith(".bias"):
                parameter.zero_()
        if config.hidden_size != target.hidden_size:
            return
        draft.fc.weight[:, -config.target_hidden_size :] += torch.eye(config.hidden_size)
        draft.norm.weight.copy_(_norm_start(target))
        rows = target.head.weight[draft.vocabulary().to(target.device)]
        draft.lm_head.weight.copy_(rows.float())
