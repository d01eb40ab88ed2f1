"""What the configs of all drafts that read the target's states have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self

from torch import nn

from redraft.drafts.layers import Linear
from redraft.errors import UserError


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary settings that a new draft takes over from a text model's config.

    Of several for several kinds of layers, those of full attention. Angles that are tabulated for one head width or
    turn a part of the head alone are the model's own affair: a new draft learns the plain ones as well. So are those
    that follow the length of the text: within the target's context they are the plain ones, and engines read them in
    other ways.
    """
    known = dict(getattr(config, "rope_parameters", None) or {})
    if known and all(isinstance(value, dict) for value in known.values()):
        known = dict(known.get("full_attention") or next(iter(known.values())))
    theta = known.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    if known.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        return {"rope_theta": theta, "rope_type": "default"}
    dropped = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
    return {"rope_theta": theta, "rope_type": "default"} | {k: v for k, v in known.items() if k not in dropped}


def heads_of(config: Any) -> dict[str, Any]:
    """Query heads, key heads and head width that a new draft takes over, the first layer's where layers differ."""

    def value(name: str) -> int:
        try:
            return int(getattr(config, name, None) or 0)
        except RuntimeError:  # transformers' answer to who asks for one value where there are several
            return int(getattr(config.per_layer_config[0], name))

    heads = value("num_attention_heads")
    width = value("head_dim") or config.hidden_size // heads
    key_heads = value("num_key_value_heads") or heads
    return {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": width}


def inner_width(config: Any) -> int:
    """The inner width of a text model's MLPs, the first where layers differ."""
    width = config.intermediate_size
    return int(width[0] if isinstance(width, list | tuple) else width)


@dataclass(frozen=True, kw_only=True)
class EagleConfig:
    """The one decoder layer of an EAGLE draft, and the private parts that it carries."""

    # Fields that are tuples here and lists in JSON.
    LISTS: ClassVar[tuple[str, ...]] = ("low_rank_on",)

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
    private_width: int = 0
    low_rank: int = 0
    low_rank_on: tuple[str, ...] = ()
    low_rank_alpha: float | None = None
    private_experts: int = 1
    private_active: int = 1
    shared_experts: int = 1
    shared_active: int = 1
    balance: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), **{name: list(getattr(self, name)) for name in self.LISTS}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ``UserError`` for unknown or missing keys."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise UserError(f"draft config has unknown keys: {', '.join(unknown)}; was it written by a newer redraft?")
        try:
            return cls(**{**values, **{name: tuple(values[name]) for name in cls.LISTS if name in values}})
        except TypeError as error:
            raise UserError(f"draft config is incomplete: {error}") from None

    def attach_low_rank(self, draft: nn.Module) -> None:
        """Give a new ``draft`` of this config the low-rank updates that it has."""
        for name in self.low_rank_on:
            layer = draft.get_submodule(name)
            assert isinstance(layer, Linear)
            layer.attach_low_rank(self.low_rank, self.low_rank_alpha)
