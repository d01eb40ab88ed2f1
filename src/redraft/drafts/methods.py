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

from redraft.errors import UserError

# Updates stand inside the layers that they update, so that no pattern of a family tells them apart.
LOW_RANK = "low_rank"
WHOLE = ("fc", "norms", "attention", "shared", "head")

# A change of a matrix is told in bytes at most (:mod:`redraft.coarse`).
MOST_BITS = 8


@dataclass(frozen=True)
class PrivateSize:
    """How large the private parts are. A method takes what concerns it.

    ``width`` is the inner width of the private expert, or of all private experts together. Low-rank updates have
    ``rank`` and, with ``alpha``, peft's scale alpha / rank (else one); ``on`` are patterns of the linear layers that
    have them (all by default); with ``aim`` they begin where the gradient is (``train/aim.py``). Without a width or
    a rank what is trained is made a fifth of the draft (``SHARE``), as in the studies. ``bits``: the change of the
    draft's own matrices is told in so many bits a weight (:mod:`redraft.coarse`). ``experts``, ``active`` and
    ``balance`` (weight of the load-balancing term) are for routed experts; ``shared_experts`` > 1 cuts the old MLP too,
    with ``shared_active`` (all by default) a token.
    """

    width: int | None = None
    rank: int | None = None
    bits: int | None = None
    on: tuple[str, ...] = ()
    alpha: float | None = None
    aim: bool = False
    experts: int = 4
    active: int = 2
    shared_experts: int = 1
    shared_active: int | None = None
    balance: float = 0.01

    def __post_init__(self) -> None:
        """Raises ``UserError`` for sizes that no draft can have."""
        if self.width is not None and self.width < 1:
            raise UserError(f"the width of the private expert is {self.width}; give a positive number")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"the rank of the low-rank updates is {self.rank}; give a positive number")
        if self.bits is not None and not 1 <= self.bits <= MOST_BITS:
            raise UserError(f"a change is told in 1 to {MOST_BITS} bits a weight, not {self.bits}; 2 are usual")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"alpha of the low-rank updates is {self.alpha}; give a positive number, or leave it out")
        if self.balance < 0:
            raise UserError(f"the weight of the load-balancing term is {self.balance}; give zero or more")
        shared_active = self.shared_experts if self.shared_active is None else self.shared_active
        check_experts("private", self.experts, self.active)
        check_experts("shared", self.shared_experts, shared_active)


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
        raise UserError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
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
