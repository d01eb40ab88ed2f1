"""What may be wrong with how a draft is read: one thing changed at a time, to be tried on stored text.

A draft whose file says one thing while it was trained with another proposes badly, and so does a good draft in an
engine that reads the file in another way. Both are the same question asked from two sides: *with this one thing
changed, what is accepted?* A family files the changes that it knows (``Family.suspects``); whoever looks for a cause
walks each of them over the same text.

Changed drafts share every tensor with the one they are made of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from redraft.drafts.base import Draft
from redraft.features import FeatureSource
from redraft.rows import TokenRow
from redraft.target import Head

Part = TypeVar("Part", bound=nn.Module)


@dataclass(frozen=True)
class Suspect:
    """One thing changed.

    ``cause`` is what is wrong where the *changed* draft is the one that was trained; ``served`` where an engine
    computes the changed one and the draft at hand was trained. ``what`` says the change in words. ``option`` is what
    `redraft import` is given to read the file so, where it has an option for it. ``seen`` are the keys of rows that the
    change was learnt from, and that can say nothing about it.
    """

    cause: str
    what: str
    draft: Draft
    served: str
    option: str = ""
    seen: frozenset[str] = frozenset()


Suspecting = Callable[[Any, Head, Sequence[TokenRow], FeatureSource | None], Iterator[Suspect]]
"""(bound draft, its target, rows of the target's own greedy text, their features at the draft's taps) -> changes."""


def twin(part: Part, **changed: Any) -> Part:
    """A module with the very tensors of ``part`` and these attributes or parts changed; ``part`` stays as it is."""
    new = copy.copy(part)
    for kept in ("_parameters", "_buffers", "_modules"):
        new.__dict__[kept] = dict(part.__dict__[kept])
    for name, value in changed.items():
        if name in new._buffers:
            new._buffers[name] = value
        elif isinstance(value, nn.Module):
            new.__dict__.pop(name, None)
            new._modules[name] = value
        elif name in new._modules:
            new._modules[name] = value
        else:
            setattr(new, name, value)
    return new
