"""The Eagle1 draft: ``fc`` over [embedding; top feature], then one decoder layer (EAGLE, arXiv 2401.15077).

The pair (state h_t, token x_{t+1}) stands at position t. h is the target's state after its final norm, which is what
its head reads; the draft predicts the next such state, so the target's own head and embedding serve it, and its
output takes the place of h at the next draft step. The layer has no norm before its attention and none behind its
MLP, as in EAGLE's public code and in the engines that load such checkpoints.

Shape legend: N packed tokens (any leading shape), H hidden size of target and draft, V target vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from redraft.artifact import FAMILIES
from redraft.drafts.config import EagleConfig, heads_of, inner_width, rope_of
from redraft.drafts.experts import SharedPrivateMLP, merge_private
from redraft.drafts.glue import EagleGlue
from redraft.drafts.layers import Attend, Attention, DraftLayer, Linear, RMSNorm, Rotary
from redraft.drafts.routing import balance_loss
from redraft.errors import UserError

# The tap of the target's final-norm state (``redraft.target.FINAL``, a room of the same row).
FINAL_TAP = -1


@dataclass(frozen=True, kw_only=True)
class Eagle1Config(EagleConfig):
    """The shape of an Eagle1 draft. What the family fixes for all (taps, vocabulary) are properties."""

    fc_bias: bool = False

    @property
    def taps(self) -> tuple[int, ...]:
        """What the draft reads of the target: the state after the final norm."""
        return (FINAL_TAP,)

    @property
    def target_hidden_size(self) -> int:
        return self.hidden_size

    @property
    def draft_vocab_size(self) -> int:
        """The target's own vocabulary, since its head is the draft's."""
        return self.target_vocab_size


class Eagle1Layer(DraftLayer):
    """A decoder layer over ``fc([embedding; state])``, which is its residual stream too."""

    def __init__(self, config: Eagle1Config, fc: Linear) -> None:
        super().__init__()
        hidden = config.hidden_size
        # ``fc`` belongs to the draft, under the name that checkpoints give it; in a tuple it is borrowed, not owned.
        self.borrowed = (fc,)
        self.self_attn = Attention(
            hidden,
            hidden,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.attention_bias,
        )
        self.mlp = SharedPrivateMLP.of(config)
        self.post_attention_layernorm = RMSNorm(hidden, eps=config.rms_norm_eps)

    def inputs(self, embeds: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads and the residual stream: both [N, H], and the same."""
        mixed = self.borrowed[0](torch.cat([embeds, states], -1))
        return mixed, mixed


class _Head:
    """The target's head, borrowed: no part of the draft's state, and shared by its copies."""

    def __init__(self, project: nn.Module, scale: Callable[[Tensor], Tensor]) -> None:
        self.project, self.scale = project, scale

    def __deepcopy__(self, memo: dict[int, Any]) -> _Head:
        return self

    def __call__(self, states: Tensor) -> Tensor:
        return self.scale(self.project(states))


class Eagle1Draft(EagleGlue, nn.Module):
    """Weights and forward of an Eagle1 draft. Its head is the target's: :meth:`bind` it before asking for logits."""

    family: ClassVar[str] = "eagle1"

    def objective(self, target, settings, reduce=lambda sums: sums):
        from redraft.drafts.eagle1.objective import RegressionObjective

        return RegressionObjective(self, target, settings, reduce=reduce)

    def __init__(self, config: Eagle1Config) -> None:
        super().__init__()
        self.config = config
        self.fc = Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.midlayer = Eagle1Layer(config, self.fc)
        self.embed_tokens = nn.Embedding(config.target_vocab_size, config.hidden_size) if config.own_embedding else None
        config.attach_low_rank(self)
        self.rotary = Rotary(config.rope_parameters, config.head_dim, config.max_position_embeddings)
        self._head: _Head | None = None

    def bind(self, target: Any) -> Eagle1Draft:
        """Borrow the head of ``target``, in the target's type and place; copies of this draft share it."""
        self._head = _Head(target.head, target.scale_logits)
        return self

    # -- vocabulary --------------------------------------------------------------------------------------------
    @property
    def reduced(self) -> bool:
        """Whether the draft speaks a part of the target's vocabulary: never."""
        return False

    def vocabulary(self) -> Tensor:
        """Target ids [V] that the draft can say: all."""
        return torch.arange(self.config.target_vocab_size, device=self.fc.weight.device)

    # -- forward -----------------------------------------------------------------------------------------------
    def fuse(self, taps: Tensor) -> Tensor:
        """States [N, H]: the target's final-norm states as they are."""
        return taps

    def embed(self, ids: Tensor, target_embedding: nn.Module) -> Tensor:
        return self.embed_tokens(ids) if self.embed_tokens is not None else target_embedding(ids)

    def forward(self, embeds: Tensor, states: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Predicted final-norm states [N, H] for tokens whose embeddings [N, H] stand beside the last states [N, H]."""
        return self.midlayer(embeds, states, self.rotary(positions), attend)

    def carry(self, states: Tensor) -> Tensor:
        """What the next draft step takes in place of the target's states: the prediction itself."""
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Logits [N, V] of predicted states [N, H], by the target's head with its scaling.

        Raises ``ValueError`` when no target is bound (a defect of ours).
        """
        if self._head is None:
            raise ValueError("an Eagle1 draft has no head of its own; bind it to its target first")
        return self._head(states)

    # -- training ----------------------------------------------------------------------------------------------
    def extra_loss(self) -> Tensor:
        """The weighted load-balancing term of routed experts over all passes since the last call; zero without any."""
        return balance_loss(self, self.config.balance)

    def restarted(self, target: Any, seed: int = 0) -> Eagle1Draft:
        """A new draft of this one's shape (private parts merged) that starts from ``target`` alone.

        A table of embeddings of its own is kept. Raises ``UserError`` for routed experts and for a target of other
        sizes.
        """
        config = merge_private(self).config
        check_fit(config, target)
        new = Eagle1Draft(config)
        start_from_nothing(new, seed)
        if self.embed_tokens is not None and new.embed_tokens is not None:
            new.embed_tokens.load_state_dict(self.embed_tokens.state_dict())
        return new.to(self.fc.weight).bind(target)

    @property
    def parameters_per_token(self) -> int:
        """Parameters that one drafted token multiplies: the draft's own, and the target's head."""
        own = sum(p.numel() for n, p in self.named_parameters() if not n.startswith("embed_tokens"))
        return own + self.config.target_vocab_size * self.config.hidden_size


@FAMILIES.register("eagle1")
def build(config: dict[str, Any]) -> Eagle1Draft:
    """An untrained draft of this configuration, for a loader to fill."""
    return Eagle1Draft(Eagle1Config.from_dict(config))


def check_fit(config: Eagle1Config, target: Any) -> None:
    """Raise ``UserError`` when a draft of this shape cannot sit on ``target`` (sizes, vocabulary)."""
    problems = []
    if config.hidden_size != target.hidden_size:
        problems.append(f"draft expects features of width {config.hidden_size}, target has {target.hidden_size}")
    if config.target_vocab_size != target.vocab_size:
        problems.append(f"draft speaks a vocabulary of {config.target_vocab_size}, target has {target.vocab_size}")
    if problems:
        raise UserError(f"this draft does not fit the target: {'; '.join(problems)}; give the draft made for it")


def fresh_eagle1(target: Any, seed: int = 0, intermediate: int | None = None, fc_bias: bool = False) -> Eagle1Draft:
    """A new draft for ``target``, bound to it, whose first guess at the next state is the last state itself.

    ``fc_bias`` as in the configs that EAGLE published (``bias``); without it every engine can load the draft.
    """
    source = target.config
    config = Eagle1Config(
        hidden_size=target.hidden_size,
        intermediate_size=intermediate or inner_width(source),
        **heads_of(source),
        target_vocab_size=target.vocab_size,
        rms_norm_eps=float(getattr(source, "rms_norm_eps", 1e-5)),
        rope_parameters=rope_of(source),
        max_position_embeddings=target.context,
        fc_bias=fc_bias,
    )
    draft = Eagle1Draft(config)
    start_from_nothing(draft, seed)
    return draft.bind(target)


def start_from_nothing(draft: Eagle1Draft, seed: int) -> None:
    """Fill a draft on the CPU: random, with ``fc`` passing the state through and small steps away from it."""
    generator = torch.Generator().manual_seed(seed)
    hidden = draft.config.hidden_size
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.02, generator=generator)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.mul_(0.1)
            elif name.endswith(".bias"):
                parameter.zero_()
        draft.fc.weight[:, hidden:] += torch.eye(hidden)


def without_embedding(draft: Eagle1Draft) -> Eagle1Draft:
    """A copy that takes the target's embedding in place of a table of its own."""
    bare = copy.deepcopy(draft)
    bare.embed_tokens, bare.config = None, replace(draft.config, own_embedding=False)
    return bare
