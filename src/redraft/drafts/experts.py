"""Private parts of a draft: experts beside its MLPs (EDA, arXiv 2603.09527) and low-rank updates of its matrices.

``y = shared(x) + private(x)``. With one expert on each side the routers of the paper's general form are constant
one, and the sum is exactly one SwiGLU: rows of gate and up concatenated, columns of down concatenated. So a
private expert attaches to any dense draft, is a file of its own, and merges back into an ordinary checkpoint.

With several experts on a side, a router gives each token its weights (``drafts/routing.py``). What a token
multiplies then depends on the token: no dense MLP is equal, and such a draft is neither merged nor exported.

A low-rank update (LoRA, arXiv 2106.09685) of any linear layer is the other private part: outer @ inner beside the
frozen shared matrix, to which merging adds it.

A family names its MLPs and its linear layers (:class:`Parted`); all else is the same for every draft.

Shape legend: H hidden size, I inner width of the shared expert, P inner width of the private one(s).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from redraft.drafts.config import DraftConfig
from redraft.drafts.layers import Linear
from redraft.drafts.routing import RoutedMLP, Router
from redraft.errors import UserError
from redraft.settings.training import check_experts

# Matrices of a SwiGLU, and the axis along which those of a private expert are joined to the shared one's.
MATRICES = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}


class Parted(nn.Module):
    """A module that private parts can be put on."""

    config: Any

    def mlps(self) -> tuple[str, ...]:
        """Names of the SwiGLUs that have private experts beside them. Raises ``UserError`` where none can be."""
        raise NotImplementedError

    def linears(self) -> list[str]:
        """Names of the linear layers that a low-rank update can be put on: all but those of private experts."""
        return [n for n, m in self.named_modules() if isinstance(m, nn.Linear) and not is_private(f"{n}.weight")]

    def rebuilt(self, config: Any, state: Mapping[str, Tensor]) -> Self:
        """A draft like this one, of another shape, that holds these tensors."""
        raise NotImplementedError


P = TypeVar("P", bound=Parted)


class SharedPrivateMLP(RoutedMLP):
    """A SwiGLU (the shared expert or experts, under the plain names) with optional private ones beside it."""

    def __init__(self, hidden: int, inner: int, parts: DraftConfig) -> None:
        """``parts`` says what private experts there are and into how many shared ones the old MLP is cut.

        Widths are divided among the experts. The shared experts are slices of one old MLP, whose sum they were: their
        weights add up to how many are active. Private ones add up to one, as in the reference's code. Raises
        ``ValueError`` for counts that divide nothing.
        """
        super().__init__(hidden, inner, parts.shared_experts, parts.shared_active, total=parts.shared_active)
        width, counts = parts.private_width, (parts.private_experts, parts.private_active)
        self.private = RoutedMLP(hidden, width, *counts) if width else None

    def forward(self, x: Tensor) -> Tensor:
        shared = super().forward(x)
        return shared if self.private is None else shared + self.private(x)


# -- experts ---------------------------------------------------------------------------------------------------------
def attach_private(
    draft: P,
    width: int,
    seed: int = 0,
    *,
    experts: int = 1,
    active: int = 1,
    shared_experts: int = 1,
    shared_active: int | None = None,
    balance: float = 0.0,
) -> P:
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
def match_linears(draft: Parted, patterns: Sequence[str]) -> list[str]:
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
    draft: P,
    rank: int,
    on: Sequence[str] = (),
    seed: int = 0,
    alpha: float | None = None,
    aim: bool = False,
) -> P:
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


# -- merging ---------------------------------------------------------------------------------------------------------
def refuse_unmergeable(draft: torch.nn.Module) -> None:
    """Raise ``UserError`` that names what keeps ``draft`` from being one dense draft. Routed experts do."""
    routers = [(name, part) for name, part in draft.named_modules() if isinstance(part, Router)]
    if routers:
        sides = [
            f"{part.active} of {part.experts} {'private' if '.private.' in name else 'shared'} experts"
            for name, part in routers
        ]
        raise UserError(
            f"a router gives each token {' and '.join(sides)}, which no dense MLP equals: a draft of method eda-moe "
            "cannot be merged or exported; decode with redraft itself, or train the method eda"
        )


def attach_parts(draft: P, parts: DraftConfig) -> P:
    """A copy of a plain ``draft`` with the private parts that ``parts`` names, for a loader to fill."""
    if parts.private_width:
        draft = attach_private(
            draft,
            parts.private_width,
            experts=parts.private_experts,
            active=parts.private_active,
            shared_experts=parts.shared_experts,
            shared_active=parts.shared_active,
            balance=parts.balance,
        )
    if parts.low_rank:
        draft = attach_low_rank(draft, parts.low_rank, parts.low_rank_on, alpha=parts.low_rank_alpha)
    return draft


def merge_private(draft: P) -> P:
    """An equal dense draft: a private expert becomes part of one wider SwiGLU, low-rank updates part of their matrix.

    Unchanged if there is neither. Raises ``UserError`` for routed experts.
    """
    refuse_unmergeable(draft)
    if not draft.config.private_width and not draft.config.low_rank:
        return draft
    state = {name: t.detach().clone() for name, t in draft.state_dict().items() if not is_private(name)}
    for name, layer in draft.named_modules():
        if isinstance(layer, Linear) and layer.low_rank is not None:
            matrix = state[f"{name}.weight"]
            matrix.copy_(matrix.float() + layer.low_rank.matrix().detach())
    for name, mlp in draft.named_modules():
        if isinstance(mlp, SharedPrivateMLP) and mlp.private is not None:
            for matrix_name, axis in MATRICES.items():
                whole, part = f"{name}.{matrix_name}.weight", getattr(mlp.private, matrix_name).weight
                state[whole] = torch.cat([state[whole], part.detach()], axis)
    return draft.rebuilt(draft.config.dense(), state)


def private_names(draft: nn.Module) -> list[str]:
    """Names of the tensors of a draft's private parts."""
    return [name for name in draft.state_dict() if is_private(name)]


def is_private(name: str) -> bool:
    """Whether a tensor of a draft's state belongs to its private parts: experts, routers, low-rank updates."""
    return any(part in name for part in (".private.", ".router.", ".low_rank."))
