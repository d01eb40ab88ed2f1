"""The methods: which parts of a draft are trained, and how large those are that are added to it.

A method says which groups of parameters are trained; everything else is frozen. All methods start from the same draft,
see the same data and meet the same budget, so that they can be compared. ``scratch`` alone starts from a new draft of
the same shape. What the groups are is the draft's own affair (``Draft.GROUPS``), and :mod:`redraft.drafts.groups`
applies a method to a draft.

Nothing here needs torch: names, sizes and help are to be had without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from redraft.errors import UserError
from redraft.registries import nearest
from redraft.settings.base import Recipe, recipe, setting

# Updates stand inside the layers that they update, so that no pattern of a family tells them apart.
LOW_RANK = "low_rank"
WHOLE = ("fc", "norms", "attention", "shared", "head")

# A change of a matrix is told in bytes at most (:mod:`redraft.drafts.scaling`).
MOST_BITS = 8


@recipe
class PrivateSize(Recipe):
    """How large the private parts are. A method takes what concerns it.

    Without a width or a rank what is trained is made a fifth of the draft (``SHARE``), as in the studies.
    Raises ``UserError`` for sizes that no draft can have.
    """

    width: int | None = setting(None, "inner width of the private expert, or of all of them together", ge=1)
    rank: int | None = setting(None, "rank of the low-rank updates", ge=1)
    bits: int | None = setting(
        None, "bits a weight that the change of the draft's own matrices is told in; 2 are usual", ge=1, le=MOST_BITS
    )
    on: tuple[str, ...] = setting((), "patterns of the linear layers with low-rank updates; all by default")
    alpha: float | None = setting(None, "scale of low-rank updates, alpha / rank as in peft; one by default", gt=0)
    aim: bool = setting(False, "begin low-rank updates where the gradient of the first steps is")
    experts: int = setting(4, "routed private experts")
    active: int = setting(2, "routed private experts that a token goes through")
    shared_experts: int = setting(1, "parts that the old MLP is cut into, as routed experts")
    shared_active: int | None = setting(None, "of these, how many a token goes through; all by default")
    balance: float = setting(0.01, "weight of the load-balancing term of routed experts", ge=0)

    @model_validator(mode="after")
    def _routed(self) -> PrivateSize:
        shared_active = self.shared_experts if self.shared_active is None else self.shared_active
        try:
            check_experts("private", self.experts, self.active)
            check_experts("shared", self.shared_experts, shared_active)
        except UserError as error:
            raise PydanticCustomError("said", "{text}", {"text": str(error)}) from None
        return self


def check_experts(side: str, experts: int, active: int) -> None:
    """Raise ``UserError`` when no router can give each token ``active`` of ``experts``."""
    if experts < 1 or not 1 <= active <= experts:
        raise UserError(f"{active} active of {experts} {side} experts cannot be; give 1 <= active <= experts")


@dataclass(frozen=True)
class Method:
    """A set of trained groups and what it is good for.

    ``settings`` are fields of :class:`PrivateSize` that belong to the method, whatever the caller asks for;
    ``fresh`` says that it starts from a new draft and not from the old one. ``learning_rate`` is what it is trained
    with where nobody says otherwise: all weights want a lower one than a small part.
    """

    groups: tuple[str, ...]
    about: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False
    learning_rate: float = 4e-3

    @property
    def private(self) -> bool:
        return "private" in self.groups

    @property
    def low_rank(self) -> bool:
        return LOW_RANK in self.groups

    def size(self, asked: PrivateSize) -> PrivateSize:
        """The sizes that this method uses where ``asked`` was asked for."""
        return replace(asked, **self.settings)


# Measured in docs/studies/learning-rates.md.
FULL_RATE, FC_RATE, NORMS_RATE = 2e-3, 2e-3, 2e-2

# What a method with a private part of no given size trains, as a share of what `full` does; rounded down to multiples.
SHARE = 0.2
WIDTH_STEP, RANK_STEP = 64, 4

# The reference's own setting: with one expert on each side no router is left.
ONE_EXPERT = {"experts": 1, "active": 1, "shared_experts": 1, "shared_active": 1}

METHODS: dict[str, Method] = {
    "none": Method((), "train nothing; measure the draft as it is"),
    "eda": Method(("private",), "a private expert beside the frozen shared draft (EDA)", ONE_EXPERT),
    "eda+fc": Method(("private", "fc"), "private expert and feature projection", ONE_EXPERT),
    "eda-moe": Method(("private", "router"), "several private experts with a top-k router; cannot be merged"),
    "fc": Method(("fc",), "the projection of the target's features", learning_rate=FC_RATE),
    "norms": Method(("norms",), "the norms of the layer and before the head", learning_rate=NORMS_RATE),
    "head": Method(("head",), "the head"),
    "lora": Method((LOW_RANK, "norms"), "low-rank updates of every matrix, and the norms; the default"),
    "lora-peer": Method(
        (LOW_RANK,),
        "low-rank updates as the nearest peer sets them: rank 8, alpha 32, every *_proj, nothing else",
        {"rank": 8, "alpha": 32.0, "on": ("*_proj",)},
    ),
    "full": Method(WHOLE, "every weight of the draft", learning_rate=FULL_RATE),
    "scratch": Method(WHOLE, "every weight of a new draft of the same shape and vocabulary", fresh=True),
}


def method(name: str) -> Method:
    """Raises ``UserError`` for a name that is not there, listing those that are."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)}; choose one of: {', '.join(METHODS)}")
    return METHODS[name]


def check_bits(method_name: str, size: PrivateSize) -> None:
    """Raise ``UserError`` for bits where a method does not change whole matrices of the draft, or not them alone."""
    chosen = method(method_name)
    whole = {"fc", "attention", "shared", "head"} & set(chosen.groups)
    if size.bits is not None and (chosen.private or chosen.low_rank or chosen.fresh or not whole):
        raise UserError(
            f"bits are for methods that change whole matrices of the draft and add nothing to it (full, fc, head), not "
            f"for {method_name}; choose one of these, or leave bits out"
        )


def mergeable(method_name: str, size: PrivateSize) -> bool:
    """Whether what the method trains at this size can be one dense draft, to be merged and exported."""
    chosen = method(method_name)
    asked = chosen.size(size)
    return not chosen.private or asked.experts == asked.shared_experts == 1
