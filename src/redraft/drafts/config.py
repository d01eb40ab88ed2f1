"""What the configs of all drafts have in common, and what a new draft takes over from its target's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Self

from redraft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """The shape of a draft: what it reads of the target, and the private parts that it carries.

    A family adds its own fields, ``hidden_size``, ``draft_vocab_size`` and ``taps`` among them. Every field is written
    into ``redraft.json``; one that is new needs a default, so that older files load.
    """

    # Fields that are tuples here and lists in JSON.
    LISTS: ClassVar[tuple[str, ...]] = ("low_rank_on",)

    private_width: int = 0
    low_rank: int = 0
    low_rank_on: tuple[str, ...] = ()
    low_rank_alpha: float | None = None
    private_experts: int = 1
    private_active: int = 1
    shared_experts: int = 1
    shared_active: int = 1
    balance: float = 0.0

    def check_fit(self, target: Any) -> None:
        """Raise ``UserError`` when a draft of this shape cannot sit on ``target``, of which sizes alone are asked."""
        raise NotImplementedError

    def dense(self) -> Self:
        """The shape of the equal draft without private parts; a family widens its MLPs by ``private_width``."""
        return replace(self, private_width=0, low_rank=0, low_rank_on=(), low_rank_alpha=None)

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
