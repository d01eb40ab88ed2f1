"""Shared and private parts of a draft: experts of the MLP (EDA, arXiv 2603.09527) and low-rank updates.

``y = shared(x) + private(x)``. With one expert on each side the routers of the paper's general form are constant
one, and the sum is exactly one SwiGLU: rows of gate and up concatenated, columns of down concatenated. So a
private expert attaches to any dense draft, is a file of its own, and merges back into an ordinary checkpoint.

With several experts on a side, a router gives each token its weights (``drafts/routing.py``). What a token
multiplies then depends on the token: no dense MLP is equal, and such a draft is neither merged nor exported.

A low-rank update (LoRA, arXiv 2106.09685) of any linear layer is the other private part: outer @ inner beside the
frozen shared matrix, to which merging adds it.

Shape legend: H hidden size, I inner width of the shared expert, P inner width of the private one(s).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from redraft.drafts.layers import Linear
from redraft.drafts.routing import RoutedMLP, Router
from redraft.errors import UserError
from redraft.settings.methods import check_experts

if TYPE_CHECKING:
    from redraft.drafts.base import AnyDraft


class SharedPrivateMLP(RoutedMLP):
    """A SwiGLU (the shared expert or experts, under the plain names) with optional private ones beside it."""

    def __init__(
        self,
        hidden: int,
        inner: int,
        private_width: int = 0,
        private: tuple[int, int] = (1, 1),
        shared: tuple[int, int] = (1, 1),
    ) -> None:
        """``private`` and ``shared`` are (experts, active ones a token); widths are divided among the experts.

        The shared experts are slices of one old MLP, whose sum they were: their weights add up to how many are
        active. Private ones add up to one, as in the reference's code. Raises ``ValueError`` for counts that
        divide nothing.
        """
        super().__init__(hidden, inner, *shared, total=shared[1])
        self.private = RoutedMLP(hidden, private_width, *private) if private_width else None

    @classmethod
    def of(cls, config: Any) -> SharedPrivateMLP:
        """The MLP that a draft's config describes."""
        experts = (config.private_experts, config.private_active)
        shared = (config.shared_experts, config.shared_active)
        return cls(config.hidden_size, config.intermediate_size, config.private_width, experts, shared)

    def forward(self, x: Tensor) -> Tensor:
        shared = super().forward(x)
        return shared if self.private is None else shared + self.private(x)


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
    """A copy of ``draft`` with private experts of inner width ``width`` together, whose output starts at exactly zero.

    The private gate and up rows are copies of the shared expert's rows (a random choice of them, tiled when there
    are fewer), with a little noise where they repeat, so that the experts start from useful directions; their down
    matrix is zero, hence every logit is bit-identical to the old draft's.

    ``experts`` > 1 divides the width among private experts of which a router gives each token ``active``.
    ``shared_experts`` > 1 cuts the old MLP into equal slices with a router of their own: with all of them active
    (the default) its weights start at exactly one and no bit changes; with fewer, the slices left out are missing
    from the start. ``balance`` weighs the load-balancing term of both routers.

    Raises ``UserError`` when a private expert is attached already, or for a width or counts that cannot be.
    """
    config = draft.config
    if config.private_width or config.shared_experts > 1:
        raise UserError("the draft has a private expert already; merge it first")
    shared_active = shared_experts if shared_active is None else shared_active
    _check_counts("private", width, experts, active)
    _check_counts("shared", config.intermediate_size, shared_experts, shared_active)
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
    mlp = SharedPrivateMLP.of(split.config).to(draft.midlayer.mlp.gate_proj.weight)
    start_private(mlp, draft.midlayer.mlp, torch.Generator().manual_seed(seed))
    split.midlayer.mlp = mlp
    return split


def start_private(mlp: SharedPrivateMLP, old: Any, generator: torch.Generator) -> None:
    """Give ``mlp`` the layers of an ``old`` SwiGLU and a private part that adds nothing yet."""
    for name in ("gate_proj", "up_proj", "down_proj"):
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
def linear_names(draft: AnyDraft) -> list[str]:
    """The linear layers that a low-rank update can be put on: all but those of a private expert."""
    return [n for n, layer in draft.named_modules() if isinstance(layer, Linear) and not is_private(f"{n}.weight")]


def match_linears(draft: AnyDraft, patterns: Sequence[str]) -> list[str]:
    """Names of the linear layers that any of the patterns fits (all when there is none), in the draft's order.

    A pattern (``*_proj``, ``fc``, ``midlayer.mlp.*``) is compared with the whole name and with its last part, so
    that ``q_proj`` finds ``midlayer.self_attn.q_proj``. Raises ``UserError`` for one that fits nothing.
    """
    known = linear_names(draft)

    def fits(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or fnmatchcase(name.rsplit(".", 1)[-1], pattern)

    for pattern in patterns:
        if not any(fits(name, pattern) for name in known):
            choices = ", ".join(known)
            raise UserError(f"no linear layer of the draft fits the LoRA pattern {pattern!r}; there are: {choices}")
    return [name for name in known if not patterns or any(fits(name, pattern) for pattern in patterns)]


def attach_low_rank(
    draft: AnyDraft,
    rank: int,
    on: Sequence[str] = (),
    seed: int = 0,
    alpha: float | None = None,
    aim: bool = False,
) -> AnyDraft:
    """A copy of ``draft`` with updates of ``rank`` on the linear layers that ``on`` fits (all by default).

    They start at zero. ``alpha`` scales them by alpha / rank, as peft does; without it the scale is one. With ``aim``
    training begins by turning them to where the gradient is (``train/aim.py``).
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
        layer = split.get_submodule(name)
        assert isinstance(layer, Linear)
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


def merge_private(draft: AnyDraft) -> AnyDraft:
    """An equal dense draft: a private expert becomes part of one wider SwiGLU, low-rank updates part of their matrix.

    Unchanged if there is neither. Raises ``UserError`` for routed experts.
    """
    config = draft.config
    refuse_unmergeable(draft)
    if not config.private_width and not config.low_rank:
        return draft
    merged = copy.deepcopy(draft)
    for layer in merged.modules():
        if isinstance(layer, Linear):
            layer.merge_low_rank()
    if config.private_width:
        merged.midlayer.mlp = _merged_mlp(merged)
    merged.config = replace(
        config,
        intermediate_size=config.intermediate_size + config.private_width,
        private_width=0,
        low_rank=0,
        low_rank_on=(),
        low_rank_alpha=None,
    )
    return merged


def _merged_mlp(draft: AnyDraft) -> SharedPrivateMLP:
    mlp = draft.midlayer.mlp
    private = mlp.private
    assert private is not None
    dense = SharedPrivateMLP(draft.config.hidden_size, draft.config.intermediate_size + draft.config.private_width)
    dense = dense.to(mlp.gate_proj.weight)
    with torch.no_grad():
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            both: list[Tensor] = [getattr(mlp, name).weight, getattr(private, name).weight]
            getattr(dense, name).weight.copy_(torch.cat(both, axis))
    return dense


def is_private(name: str) -> bool:
    """Whether a tensor of a draft's state belongs to its private parts: experts, routers, low-rank updates."""
    return any(part in name for part in (".private.", ".router.", ".low_rank."))
