"""Named parameter groups of a draft, and the methods that are sets of them.

A method says which groups are trained; everything else is frozen. All methods start from the same draft, see the
same data and meet the same budget, so that they can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from redraft.drafts.eagle3 import Eagle3Draft
from redraft.drafts.experts import attach_low_rank, attach_private
from redraft.errors import UserError

# Updates stand inside the layers that they update, so that no prefix tells them apart.
LOW_RANK = "low_rank"

GROUPS: dict[str, tuple[str, ...]] = {
    "private": ("midlayer.mlp.private.",),
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


@dataclass(frozen=True)
class Method:
    """A set of trained groups and what it is good for."""

    groups: tuple[str, ...]
    about: str

    @property
    def private(self) -> bool:
        return "private" in self.groups

    @property
    def low_rank(self) -> bool:
        return LOW_RANK in self.groups


METHODS: dict[str, Method] = {
    "none": Method((), "train nothing; measure the draft as it is"),
    "eda": Method(("private",), "a private expert beside the frozen shared draft (EDA)"),
    "fc": Method(("fc",), "the projection of the target's features"),
    "eda+fc": Method(("private", "fc"), "private expert and feature projection"),
    "lora": Method((LOW_RANK, "norms"), "low-rank updates of every matrix, and the norms; the default"),
    "full": Method(("fc", "norms", "attention", "shared", "head"), "every weight of the draft"),
}


def method(name: str) -> Method:
    """Raises ``UserError`` for a name that is not there, listing those that are."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def group_of(parameter: str) -> str:
    """The group of a parameter by its name. Raises ``KeyError`` when it has none (a defect of ours)."""
    if f".{LOW_RANK}." in parameter:
        return LOW_RANK
    for group, prefixes in GROUPS.items():
        if parameter.startswith(prefixes):
            return group
    raise KeyError(f"parameter {parameter} belongs to no group")


def trainable_names(draft: Eagle3Draft, method_name: str) -> list[str]:
    """Names of the parameters that ``method_name`` trains on this draft, in the draft's own order."""
    groups = method(method_name).groups
    return [name for name, _ in draft.named_parameters() if group_of(name) in groups]


@dataclass(frozen=True)
class PrivateSize:
    """How large the private part is: inner width of the expert, rank of the updates and the layers that have them."""

    width: int = 768
    rank: int = 64
    on: tuple[str, ...] = ()


def prepare(draft: Eagle3Draft, method_name: str, size: PrivateSize, seed: int = 0) -> tuple[Eagle3Draft, list[str]]:
    """The draft a method trains, its private parts attached where it has some, and the names of what is trained."""
    chosen = method(method_name)
    if chosen.private and not draft.config.private_width:
        draft = attach_private(draft, size.width, seed)
    if chosen.low_rank and not draft.config.low_rank:
        draft = attach_low_rank(draft, size.rank, size.on, seed)
    names = set(trainable_names(draft, method_name))
    for name, parameter in draft.named_parameters():
        parameter.requires_grad_(name in names)
    return draft, [n for n, _ in draft.named_parameters() if n in names]


def trained_parameters(draft: Eagle3Draft, method_name: str) -> int:
    names = set(trainable_names(draft, method_name))
    return sum(p.numel() for n, p in draft.named_parameters() if n in names)
