"""Named parameter groups of a draft, and the methods that are sets of them.

A method says which groups are trained; everything else is frozen. All methods start from the same draft, see the
same data and meet the same budget, so that they can be compared. ``scratch`` alone starts from a new draft of the
same shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from redraft.coarse import MOST_BITS
from redraft.drafts.base import AnyDraft
from redraft.drafts.experts import attach_low_rank, attach_private, check_experts, match_linears
from redraft.errors import UserError

# Updates stand inside the layers that they update, so that no prefix tells them apart.
LOW_RANK = "low_rank"

GROUPS: dict[str, tuple[str, ...]] = {
    "private": ("midlayer.mlp.private.",),
    "router": ("midlayer.mlp.router.",),
    "fc": ("fc.", "input_norm.", "fc_norm."),
    "norms": (
        "midlayer.input_layernorm.",
        "midlayer.hidden_norm.",
        "midlayer.post_attention_layernorm.",
        "norm.",
    ),
    "attention": ("midlayer.self_attn.",),
    "shared": ("midlayer.mlp.gate_proj.", "midlayer.mlp.up_proj.", "midlayer.mlp.down_proj."),
    "head": ("lm_head.",),
    "embed": ("embed_tokens.",),
}
WHOLE = ("fc", "norms", "attention", "shared", "head")


@dataclass(frozen=True)
class PrivateSize:
    """How large the private parts are. A method takes what concerns it.

    ``width`` is the inner width of the private expert, or of all private experts together. Low-rank updates have
    ``rank`` and, with ``alpha``, peft's scale alpha / rank (else one); ``on`` are patterns of the linear layers that
    have them (all by default); with ``aim`` they begin where the gradient is (``attic/aim.py``). Without a width or
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


def group_of(parameter: str) -> str:
    """The group of a parameter by its name. Raises ``KeyError`` when it has none (a defect of ours)."""
    if f".{LOW_RANK}." in f".{parameter}":
        return LOW_RANK
    for group, prefixes in GROUPS.items():
        if parameter.startswith(prefixes):
            return group
    raise KeyError(f"parameter {parameter} belongs to no group")


def trainable_names(draft: AnyDraft, method_name: str) -> list[str]:
    """Names of the parameters that ``method_name`` trains on this draft, in the draft's own order."""
    groups = method(method_name).groups
    return [name for name, _ in draft.named_parameters() if group_of(name) in groups]


def prepare(
    draft: AnyDraft, method_name: str, size: PrivateSize, seed: int = 0, target: Any = None
) -> tuple[AnyDraft, list[str]]:
    """The draft a method trains, its private parts attached where it has some, and the names of what is trained.

    Private parts that ``draft`` has already are trained on, if they are of the size asked for. ``target`` is needed
    by ``scratch`` alone. Raises ``UserError`` for sizes that cannot be, parts of another size, and a method whose
    groups this draft does not have.
    """
    chosen = method(method_name)
    asked = chosen.size(size)
    check_bits(method_name, asked)
    if chosen.fresh:
        if target is None:
            raise UserError(f"method {method_name} starts a new draft and needs the target, which was not given")
        draft = cast(AnyDraft, draft.restarted(target, seed))
    # What the method trains besides its private part leaves the part so much room.
    room = int(SHARE * trained_parameters(draft, "full")) - trained_parameters(draft, method_name)
    if chosen.private:
        draft = _with_private(draft, asked, seed, room)
    if chosen.low_rank:
        draft = _with_low_rank(draft, asked, seed, room)
    names = trainable_names(draft, method_name)
    if chosen.groups and not names:
        raise UserError(f"method {method_name} trains {', '.join(chosen.groups)}, of which this draft has nothing")
    trained = set(names)
    for name, parameter in draft.named_parameters():
        parameter.requires_grad_(name in trained)
    return draft, names


def fair_width(draft: AnyDraft, room: int, experts: int = 1) -> int:
    """The inner width at which private ``experts`` together have about ``room`` parameters, and no more."""
    most = room // (3 * draft.config.hidden_size)
    step = experts * max(1, round(WIDTH_STEP / experts))
    if most < step:  # a draft so small that every row counts
        step = experts
    return max(experts, most // step * step)


def fair_rank(draft: AnyDraft, room: int, on: Sequence[str] = ()) -> int:
    """The rank at which updates of the layers that ``on`` names have about ``room`` parameters, and no more; or the
    rank of the smallest of these layers if that is less. Raises ``UserError`` for a pattern that fits nothing.
    """
    weights = [draft.get_parameter(f"{name}.weight") for name in match_linears(draft, on)]
    shapes: list[tuple[int, ...]] = [tuple(weight.shape) for weight in weights]
    most = room // sum(map(sum, shapes))
    fair = most // RANK_STEP * RANK_STEP if most >= RANK_STEP else most
    return max(1, min(fair, *map(min, shapes)))


def _with_private(draft: AnyDraft, size: PrivateSize, seed: int, room: int) -> AnyDraft:
    if not draft.config.private_width:
        return attach_private(
            draft,
            fair_width(draft, room, size.experts) if size.width is None else size.width,
            seed,
            experts=size.experts,
            active=size.active,
            shared_experts=size.shared_experts,
            shared_active=size.shared_active,
            balance=size.balance,
        )
    wanted = {
        "private_width": draft.config.private_width if size.width is None else size.width,
        "private_experts": size.experts,
        "private_active": size.active,
        "shared_experts": size.shared_experts,
        "shared_active": size.shared_experts if size.shared_active is None else size.shared_active,
    }
    found = {name: getattr(draft.config, name) for name in wanted}
    if found != wanted:
        described = ", ".join(f"{name} {value}" for name, value in found.items())
        raise UserError(
            f"the draft has a private part already ({described}): ask for the same size to train it further, "
            "or merge it first"
        )
    return draft


def _with_low_rank(draft: AnyDraft, size: PrivateSize, seed: int, room: int) -> AnyDraft:
    config = draft.config
    if not config.low_rank:
        rank = fair_rank(draft, room, size.on) if size.rank is None else size.rank
        return attach_low_rank(draft, rank, size.on, seed, size.alpha, size.aim)
    asked = (config.low_rank if size.rank is None else size.rank, size.alpha, tuple(match_linears(draft, size.on)))
    if (config.low_rank, config.low_rank_alpha, config.low_rank_on) != asked:
        raise UserError(
            f"the draft has low-rank updates already, of rank {config.low_rank} and alpha {config.low_rank_alpha} on "
            f"{', '.join(config.low_rank_on)}: ask for the same to train them further, or merge them first"
        )
    return draft


def trained_parameters(draft: AnyDraft, method_name: str) -> int:
    """How many parameters the method trains on this draft, as :func:`prepare` returned it."""
    names = set(trainable_names(draft, method_name))
    return sum(p.numel() for n, p in draft.named_parameters() if n in names)
