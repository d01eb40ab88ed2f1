"""What of a draft a method trains: groups of its parameters, and private parts that are put on it.

A private expert beside an MLP (EDA, arXiv 2603.09527): ``y = shared(x) + private(x)``. With one expert on each side the
routers of the paper's general form are constant one, and the sum is exactly one SwiGLU: rows of gate and up
concatenated, columns of down concatenated. So a private expert attaches to any dense draft, is a file of its own, and
merges back into an ordinary checkpoint. With several experts on a side, a router gives each token its weights
(``drafts/layers.py``). What a token multiplies then depends on the token: no dense MLP is equal, and such a draft is
neither merged nor exported.

A low-rank update (LoRA, arXiv 2106.09685) of any linear layer is the other private part: outer @ inner beside the
frozen shared matrix, to which merging adds it.

A family names its groups, its MLPs and its linear layers; all else is the same for every draft.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from redraft.drafts.base import AnyDraft, Draft, DraftConfig
from redraft.drafts.layers import Linear, SharedPrivateMLP
from redraft.drafts.merging import MATRICES
from redraft.errors import UserError
from redraft.settings.training import (
    LOW_RANK,
    RANK_STEP,
    SHARE,
    WIDTH_STEP,
    PrivateSize,
    check_bits,
    check_experts,
    method,
)

# What a size says of routed experts, and what a draft's config calls it.
COUNTS = {
    "experts": "private_experts",
    "active": "private_active",
    "shared_experts": "shared_experts",
    "shared_active": "shared_active",
    "balance": "balance",
}


def group_of(draft: Draft, parameter: str) -> str:
    """The group of a parameter by its name. Raises ``KeyError`` when it has none (a defect of its family)."""
    if f".{LOW_RANK}." in f".{parameter}":
        return LOW_RANK
    for group, patterns in draft.GROUPS.items():
        if any(fnmatchcase(parameter, pattern) for pattern in patterns):
            return group
    raise KeyError(f"parameter {parameter} belongs to no group")


def trainable_names(draft: Draft, method_name: str) -> list[str]:
    """Names of the parameters that ``method_name`` trains on this draft, in the draft's own order."""
    groups = method(method_name).groups
    return [name for name, _ in draft.named_parameters() if group_of(draft, name) in groups]


def trained_parameters(draft: Draft, method_name: str) -> int:
    """How many parameters the method trains on this draft, as :func:`prepare` returned it."""
    return sum(draft.get_parameter(name).numel() for name in trainable_names(draft, method_name))


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
        draft = draft.restarted(target, seed)
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


def fair_width(draft: Draft, room: int, experts: int = 1) -> int:
    """The inner width at which private ``experts`` together have about ``room`` parameters, and no more."""
    downs = [draft.get_parameter(f"{name}.down_proj.weight") for name in draft.mlps()]
    most = room // sum(3 * len(down) for down in downs)
    step = experts * max(1, round(WIDTH_STEP / experts))
    if most < step:  # a draft so small that every row counts
        step = experts
    return max(experts, most // step * step)


def fair_rank(draft: Draft, room: int, on: Sequence[str] = ()) -> int:
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
        width = fair_width(draft, room, size.experts) if size.width is None else size.width
        return attach_private(draft, width, seed, **{count: getattr(size, count) for count in COUNTS})
    wanted = {
        "private_width": draft.config.private_width if size.width is None else size.width,
        **{name: getattr(size, count) for count, name in COUNTS.items() if count != "balance"},
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


# -- experts ---------------------------------------------------------------------------------------------------------
def attach_private(
    draft: AnyDraft,
    width: int,
    seed: int = 0,
    *,
    experts: int = 1,
    active: int = 1,
    shared_experts: int = 1,
    shared_active: int | None = None,
    balance: float = 0.0,
) -> AnyDraft:
    """A copy of ``draft`` with private experts of inner width ``width`` together beside every MLP; they add zero yet.

    The private gate and up rows are copies of the shared expert's rows (a random choice of them, tiled when there
    are fewer), with a little noise where they repeat, so that the experts start from useful directions; their down
    matrix is zero, hence every logit is bit-identical to the old draft's.

    ``experts`` > 1 divides the width among private experts of which a router gives each token ``active``.
    ``shared_experts`` > 1 cuts the old MLP into equal slices with a router of their own: with all of them active
    (the default) its weights start at exactly one and no bit changes; with fewer, the slices left out are missing
    from the start. ``balance`` weighs the load-balancing term of both routers.

    Raises ``UserError`` when private experts are attached already, for a width or counts that cannot be, and for a
    draft without such MLPs.
    """
    config = draft.config
    if config.private_width or config.shared_experts > 1:
        raise UserError("the draft has private experts already; merge them first")
    shared_active = shared_experts if shared_active is None else shared_active
    _check_counts("private", width, experts, active)
    if balance < 0:
        raise UserError(f"the weight of the load-balancing term is {balance}; give zero or more")
    split = copy.deepcopy(draft)
    split.config = replace(
        config,
        private_width=width,
        private_experts=experts,
        private_active=active,
        shared_experts=shared_experts,
        shared_active=shared_active,
        balance=balance if experts > 1 or shared_experts > 1 else 0.0,
    )
    names = draft.mlps()
    for number, name in enumerate(names):
        old: Any = draft.get_submodule(name)
        inner, hidden = old.gate_proj.weight.shape
        _check_counts("shared", inner, shared_experts, shared_active)
        mlp = SharedPrivateMLP(hidden, inner, split.config).to(old.gate_proj.weight)
        start_private(mlp, old, torch.Generator().manual_seed(seed if len(names) == 1 else 1000 * seed + number))
        split.set_submodule(name, mlp)
    return split


def start_private(mlp: SharedPrivateMLP, old: Any, generator: torch.Generator) -> None:
    """Give ``mlp`` the layers of an ``old`` SwiGLU and a private part that adds nothing yet."""
    for name in MATRICES:
        setattr(mlp, name, copy.deepcopy(getattr(old, name)))
    private = mlp.private
    assert private is not None
    inner, width = mlp.gate_proj.weight.shape[0], private.gate_proj.weight.shape[0]
    rows = torch.cat([torch.randperm(inner, generator=generator) for _ in range(-(-width // inner))])[:width]
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            source = getattr(mlp, name).weight
            noise = torch.randn(width, source.shape[1], generator=generator).to(source) * source.std() * 0.1
            getattr(private, name).weight.copy_(source[rows.to(source.device)] + noise)
        private.down_proj.weight.zero_()
    for side in (private, mlp):
        # A router over all the slices of the old MLP starts at zero, which weighs each of them with exactly one.
        if side.router is not None and (side is private or side.router.active < side.router.experts):
            side.router.spread(generator)


def _check_counts(side: str, width: int, experts: int, active: int) -> None:
    if width <= 0:
        raise UserError(f"the width of the {side} expert is {width}; give a positive number")
    check_experts(side, experts, active)
    if width % experts:
        raise UserError(f"a width of {width} cannot be divided among {experts} {side} experts; give a multiple")


# -- low-rank updates ------------------------------------------------------------------------------------------------
def match_linears(draft: Draft, patterns: Sequence[str]) -> list[str]:
    """Names of the linear layers that any of the patterns fits (all when there is none), in the draft's order.

    A pattern (``*_proj``, ``fc``, ``midlayer.mlp.*``) is compared with the whole name and with its last part, so
    that ``q_proj`` finds ``midlayer.self_attn.q_proj``. Raises ``UserError`` for one that fits nothing.
    """
    known = draft.linears()

    def fits(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or fnmatchcase(name.rsplit(".", 1)[-1], pattern)

    for pattern in patterns:
        if not any(fits(name, pattern) for name in known):
            choices = ", ".join(known)
            raise UserError(f"no linear layer of the draft fits the LoRA pattern {pattern!r}; there are: {choices}")
    return [name for name in known if not patterns or any(fits(name, pattern) for pattern in patterns)]


def attach_low_rank(
    draft: AnyDraft, rank: int, on: Sequence[str] = (), seed: int = 0, alpha: float | None = None, aim: bool = False
) -> AnyDraft:
    """A copy of ``draft`` with updates of ``rank`` on the linear layers that ``on`` fits (all by default).

    They start at zero. ``alpha`` scales them by alpha / rank, as peft does; without it the scale is one. With ``aim``
    training begins by turning them to where the gradient is (``attic/aim.py``).
    Raises ``UserError`` when there are some already, for a rank or alpha that is not positive, and for a pattern
    that fits nothing.
    """
    if draft.config.low_rank:
        raise UserError("the draft has low-rank updates already; merge them first")
    if rank <= 0:
        raise UserError(f"the rank of the low-rank updates is {rank}; give a positive number")
    if alpha is not None and alpha <= 0:
        raise UserError(f"alpha of the low-rank updates is {alpha}; give a positive number, or leave it out")
    names = match_linears(draft, on)
    split = copy.deepcopy(draft)
    split.config = replace(draft.config, low_rank=rank, low_rank_on=tuple(names), low_rank_alpha=alpha)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        layer: Any = split.get_submodule(name)
        if not isinstance(layer, Linear):
            layer = Linear.over(layer)
            split.set_submodule(name, layer)
        layer.attach_low_rank(rank, alpha, generator)
        assert layer.low_rank is not None
        layer.low_rank.aim = aim
    return split


def attach_parts(draft: AnyDraft, parts: DraftConfig) -> AnyDraft:
    """A copy of a plain ``draft`` with the private parts that ``parts`` names, for a loader to fill."""
    if parts.private_width:
        counts = {count: getattr(parts, name) for count, name in COUNTS.items()}
        draft = attach_private(draft, parts.private_width, **counts)
    if parts.low_rank:
        draft = attach_low_rank(draft, parts.low_rank, parts.low_rank_on, alpha=parts.low_rank_alpha)
    return draft
