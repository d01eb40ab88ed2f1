"""Applying a method to a draft: the groups of its parameters, what of them is trained, and how large parts become."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from redraft.drafts.base import AnyDraft, Draft
from redraft.drafts.experts import attach_low_rank, attach_private, match_linears
from redraft.errors import UserError
from redraft.settings.training import LOW_RANK, RANK_STEP, SHARE, WIDTH_STEP, PrivateSize, check_bits, method


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


def trained_parameters(draft: Draft, method_name: str) -> int:
    """How many parameters the method trains on this draft, as :func:`prepare` returned it."""
    names = set(trainable_names(draft, method_name))
    return sum(p.numel() for n, p in draft.named_parameters() if n in names)
