"""What the EAGLE families share: decoder layers over the target's states and the embedding of the next token.

Shape legend: N packed tokens (any leading shape), H hidden size, K taps, F hidden size of the target, V target
vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from redraft.drafts.base import Draft, DraftConfig, heads_of, rope_of
from redraft.drafts.eagle.proposer import EagleProposer, StaticProposer
from redraft.drafts.eagle.walk import EagleWalk
from redraft.drafts.formats.embeddings import is_targets
from redraft.drafts.layers import Attend, Attention, Linear, RMSNorm, Rotary, SharedPrivateMLP, told_angles
from redraft.errors import UserError
from redraft.target import Head, Target
from redraft.values import LARGEST, LONGEST

# Whole numbers of a config that may be zero; others must be one at least.
MAY_BE_ZERO = frozenset({"private_width", "low_rank"})
# Numbers of a config that may be larger, or must be smaller, than widths are: what is beyond would be built first.
MOST = {"max_position_embeddings": LONGEST, "num_layers": 1024}


@dataclass(frozen=True, kw_only=True)
class EagleConfig(DraftConfig):
    """The shape of the decoder layers, which are alike but for the first one's input and for what each can see.

    ``windows`` has a number for each of the ``num_layers`` layers, how many positions back it sees, its own included; 0
    is all, and no number at all means that all layers see all. ``output_bias`` is that of the attention's output
    projection, as ``attention_bias`` where it is none. One shape has one config: zeros alone are no windows, and an
    ``output_bias`` that is as ``attention_bias`` is none.

    Raises ``UserError`` for values that are of another kind or describe no layer.
    """

    LISTS: ClassVar[tuple[str, ...]] = ("windows", *DraftConfig.LISTS)
    LATER: ClassVar[tuple[str, ...]] = ("num_layers", "windows", "qk_norm", "output_bias")
    ALWAYS: ClassVar[tuple[str, ...]] = ("rms_norm_eps", "rope_parameters", "max_position_embeddings")

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    target_vocab_size: int
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_theta": 10000.0, "rope_type": "default"})
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    own_embedding: bool = False
    num_layers: int = 1
    windows: tuple[int, ...] = ()
    qk_norm: bool = False
    output_bias: bool | None = None

    def __post_init__(self) -> None:
        wrong = [f"{name} {getattr(self, name)!r}" for name in self.wrong_fields()]
        if wrong:
            raise UserError(f"a draft cannot have {', '.join(wrong)}; correct its config, or fetch the file again")
        if not any(self.windows):
            object.__setattr__(self, "windows", ())
        if self.output_bias == self.attention_bias:
            object.__setattr__(self, "output_bias", None)

    def wrong_fields(self) -> list[str]:
        """Names of the fields whose values no draft can have."""
        least = {f.name: f.name not in MAY_BE_ZERO for f in fields(self) if f.type == "int"}
        found = {name: getattr(self, name) for name in least}
        most = {name: MOST.get(name, LARGEST) for name in least}
        wrong = [n for n, value in found.items() if type(value) is not int or not least[n] <= value <= most[n]]
        wrong += [f.name for f in fields(self) if f.type == "bool" and type(getattr(self, f.name)) is not bool]
        wrong += ["output_bias"] * (type(self.output_bias) not in (type(None), bool))
        alpha = self.low_rank_alpha
        for name, value in (("balance", self.balance), ("low_rank_alpha", 0 if alpha is None else alpha)):
            wrong += [name] * (type(value) not in (int, float) or not 0 <= value <= 1e12)
        eps, heads = self.rms_norm_eps, self.num_attention_heads
        wrong += ["rms_norm_eps"] * (type(eps) not in (int, float) or not 0 <= eps < 1)
        if not wrong and heads % self.num_key_value_heads:
            wrong.append("num_key_value_heads")
        wrong += ["rope_parameters"] * (
            "head_dim" not in wrong and not told_angles(self.rope_parameters, self.head_dim)
        )
        told = all(type(window) is int and window >= 0 for window in self.windows)
        wrong += ["windows"] * (not told or len(self.windows) not in (0, self.num_layers))
        return wrong

    def check_fit(self: Any, target: Any) -> None:
        """Raise ``UserError`` when a draft of this shape cannot sit on ``target`` (sizes, taps, vocabulary)."""
        width, deepest, problems = target.hidden_size, max(self.taps), list[str]()
        if self.target_hidden_size != width:
            problems.append(f"draft expects features of width {self.target_hidden_size}, target has {width}")
        if self.target_vocab_size != target.vocab_size:
            problems.append(f"draft maps a vocabulary of {self.target_vocab_size}, target has {target.vocab_size}")
        if deepest > target.layers:
            problems.append(f"draft taps layer {deepest}, target has {target.layers} layers")
        if not self.own_embedding and self.hidden_size != width:
            problems.append(f"draft width {self.hidden_size} cannot use the target's embeddings of {width}")
        if problems:
            raise UserError(f"this draft does not fit the target: {'; '.join(problems)}; give the draft made for it")

    @property
    def reach(self) -> tuple[int, ...]:
        """The window of every layer, 0 where it sees all."""
        return self.windows or (0,) * self.num_layers

    def dense(self) -> Self:
        return replace(super().dense(), intermediate_size=self.intermediate_size + self.private_width)


def layer_of(target: Any, intermediate: int | None = None) -> dict[str, Any]:
    """The fields of :class:`EagleConfig` that a new draft takes over from its target."""
    source = target.config
    inner = source.intermediate_size  # several where layers differ: the first is taken
    return {
        "hidden_size": target.hidden_size,
        "intermediate_size": intermediate or int(inner[0] if isinstance(inner, list | tuple) else inner),
        **heads_of(source),
        "target_vocab_size": target.vocab_size,
        "rms_norm_eps": float(getattr(source, "rms_norm_eps", 1e-5)),
        "rope_parameters": rope_of(source),
        "max_position_embeddings": target.context,
    }


class EagleLayer(nn.Module):
    """A decoder layer. Of the first one a family says what attention reads and what the residual stream is."""

    post_attention_layernorm: RMSNorm

    def __init__(self, config: EagleConfig, read: int, norms: Sequence[str] = ()) -> None:
        """``read`` is the width of what attention reads; ``norms`` names norms of its own, of the draft's width."""
        super().__init__()
        hidden = config.hidden_size
        self.self_attn = Attention(read, config)
        self.mlp = SharedPrivateMLP(hidden, config.intermediate_size, config)
        for name in (*norms, "post_attention_layernorm"):
            setattr(self, name, RMSNorm(hidden, eps=config.rms_norm_eps))

    def inputs(self, embeds: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads and the residual stream [N, H], from embeddings and states [N, H]."""
        raise NotImplementedError

    def finish(self, residual: Tensor, mixed_NAD: Tensor) -> Tensor:
        """Output projection, MLP and both residual additions."""
        states = residual + self.self_attn.o_proj(mixed_NAD.flatten(-2))
        return states + self.mlp(self.post_attention_layernorm(states))

    def forward(self, x: Tensor, residual: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """States [N, H] behind the layer, from what :meth:`inputs` gives."""
        keys, values = self.self_attn.keys_values(x, rope)
        return self.finish(residual, attend(self.self_attn.queries(x, rope), keys, values))


class LaterLayer(EagleLayer):
    """A layer behind the first: that of any decoder, which sees of the embeddings what the first made of them."""

    input_layernorm: RMSNorm

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config, config.hidden_size, ("input_layernorm",))

    def inputs(self, embeds: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.input_layernorm(states), states


def of_layers(*patterns: str) -> tuple[str, ...]:
    """Patterns of parameter names within any decoder layer."""
    return tuple(f"{layer}.{pattern}" for pattern in patterns for layer in ("midlayer", "later.*"))


class EagleDraft(Draft):
    """Weights and forward of an EAGLE draft. Embeddings are the target's unless the checkpoint ships its own."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "private": of_layers("mlp.private.*"),
        "router": of_layers("mlp.router.*"),
        "fc": ("fc.*", "input_norm.*", "fc_norm.*"),
        "norms": (*of_layers("*norm.*"), "norm.*"),
        "attention": of_layers("self_attn.*"),
        "shared": of_layers("mlp.gate_proj.*", "mlp.up_proj.*", "mlp.down_proj.*"),
        "head": ("lm_head.*",),
        "embed": ("embed_tokens.*",),
    }

    grows_trees: ClassVar[bool] = True

    fc: Linear
    midlayer: EagleLayer
    later: nn.ModuleList
    embed_tokens: nn.Embedding | None
    BORROWED: ClassVar[tuple[str, ...]] = ("embed_tokens.weight",)

    def __init__(self, config: EagleConfig) -> None:
        """A family's own ``__init__`` makes its layers after this and ends with :meth:`complete`."""
        super().__init__()
        self.config = config

    @classmethod
    def untrained(cls, config: Any) -> Self:
        """A draft of this shape without numbers, for a loader to fill: no room is taken for what is thrown away."""
        with torch.device("meta"):
            return cls(config)

    def complete(self) -> None:
        """Add what every draft has behind its first layer, as the config says: further layers, an embedding, low-rank
        updates and rotary angles."""
        config = self.config
        self.later = nn.ModuleList(LaterLayer(config) for _ in range(config.num_layers - 1))
        self.embed_tokens = nn.Embedding(config.target_vocab_size, config.hidden_size) if config.own_embedding else None
        for name in config.low_rank_on:
            layer = self.get_submodule(name)
            assert isinstance(layer, Linear)
            layer.attach_low_rank(config.low_rank, config.low_rank_alpha)
        self.rotary = Rotary(config.rope_parameters, config.head_dim, config.max_position_embeddings)

    def rebuilt(self, config: Any, state: Mapping[str, Tensor]) -> Self:
        """As of every draft; no room is taken for numbers that are thrown away."""
        new = type(self).untrained(config)
        new.load_state_dict(dict(state), strict=True, assign=True)
        return new.inherit(self).train(self.training)

    # -- proposals ---------------------------------------------------------------------------------------------
    def proposer(self, target: Target, capacity: int) -> EagleProposer:
        return EagleProposer(self, target, capacity)

    def static_proposer(self, target: Target, capacity: int, gamma: int) -> StaticProposer:
        return StaticProposer(self, target, capacity, gamma)

    def walk(self, target: Head) -> EagleWalk:
        return EagleWalk(self, target)

    def mlps(self) -> tuple[str, ...]:
        return ("midlayer.mlp", *(f"later.{number}.mlp" for number in range(len(self.later))))

    # -- forward -----------------------------------------------------------------------------------------------
    @abstractmethod
    def fuse(self, taps: Tensor) -> Tensor:
        """States [N, H] from the target's taps side by side [N, K*F]."""

    @abstractmethod
    def carry(self, states: Tensor) -> Tensor:
        """What the next draft step takes in place of the target's states."""

    def embed(self, ids: Tensor, target_embedding: nn.Module) -> Tensor:
        return self.embed_tokens(ids) if self.embed_tokens is not None else target_embedding(ids)

    @property
    def layers(self) -> list[Any]:
        """The decoder layers in their order, each an :class:`EagleLayer`."""
        return [self.midlayer, *self.later]

    def forward(self, embeds: Tensor, states: Tensor, positions: Tensor, attends: Sequence[Attend]) -> Tensor:
        """States [N, H] of the next step for tokens whose embeddings [N, H] stand beside the last states [N, H].

        ``attends`` has one for each layer.
        """
        return self.through(embeds, states, self.rotary(positions), attends)

    def through(self, embeds: Tensor, states: Tensor, rope: tuple[Tensor, Tensor], attends: Sequence[Attend]) -> Tensor:
        """As :meth:`forward`, with the cosines and sines of the positions."""
        for layer, attend in zip(self.layers, attends, strict=True):
            states = layer(*layer.inputs(embeds, states), rope, attend)
        return states

    # -- its target --------------------------------------------------------------------------------------------
    def borrowing(self, target: Any) -> Self:
        """This draft on the target's embedding where that is its own to the last bit; with another it would compute
        other logits."""
        if self.embed_tokens is None or not is_targets(self.embed_tokens.weight, target):
            return self
        state = {name: t for name, t in self.state_dict().items() if name != "embed_tokens.weight"}
        return self.rebuilt(replace(self.config, own_embedding=False), state)

    def restarted(self, target: Any, seed: int = 0) -> Self:
        """As of every draft. Nothing of this one's weights is in it but a table of embeddings of its own."""
        config = self.merged().config
        config.check_fit(target)
        new = type(self)(config)
        new.share_vocabulary(self)
        new.start(target, seed)
        if self.embed_tokens is not None and new.embed_tokens is not None:
            new.embed_tokens.load_state_dict(self.embed_tokens.state_dict())
        return new.to(self.fc.weight).bind(target)

    def share_vocabulary(self, other: Self) -> None:
        """Speak the vocabulary of ``other``, where a draft has one of its own."""

    def start(self, target: Any, seed: int) -> None:
        """Fill a draft on the CPU for training from nothing: random, with small steps into the residual stream.

        A family adds what ``target`` can lend it.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.02, generator=generator)
                    if name.endswith(("o_proj.weight", "down_proj.weight")):
                        parameter.mul_(0.1)
                elif name.endswith(".bias"):
                    parameter.zero_()

    @property
    def parameters_per_token(self) -> int:
        """Parameters that one drafted token multiplies (``fc`` runs once a verified token, and is counted).

        Experts that a router leaves out are among them: they are computed and weighed with zero.
        """
        return sum(p.numel() for n, p in self.named_parameters() if not n.startswith("embed_tokens"))
