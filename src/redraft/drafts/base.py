"""What a draft is, whatever its family, and what a family is. Nothing here knows which families there are.

A family is a folder of this room. Its ``family.py`` files one :class:`Family` in ``FAMILIES`` under the name that
``redraft.json`` gives; beside it stand the config, the module (:class:`Draft`), how checkpoints of others are read
(``reading.py``) and how drafts are written for engines (``writing.py``). Everybody else asks the draft, or its family
by ``FAMILIES.get(draft.family)``, and never which class a draft is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from redraft.artifact import tensors_hash
from redraft.drafts.experts import Parted, merge_private
from redraft.drafts.proposing import Proposes
from redraft.drafts.routing import balance_loss
from redraft.registries import FAMILIES


class Draft(Parted, Proposes, ABC):
    """A module that proposes tokens to a target.

    ``config`` is a :class:`redraft.drafts.config.DraftConfig`. How a draft reads states and text is its family's; what
    it proposes, and how it is trained, is asked by the methods of :class:`redraft.drafts.proposing.Proposes`.
    """

    family: ClassVar[str]
    # Groups of parameters that a method may train: patterns of names, the first that fits counts. Low-rank updates,
    # which stand inside the layers that they update, are a group of their own.
    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]]
    # Parameters whose rows are the tokens of :meth:`vocabulary`, in its order.
    TOKEN_ROWS: ClassVar[tuple[str, ...]] = ()

    # The data type of a base draft under which private parts are trained and tied to it; none: that of its file.
    BASE_DTYPE: ClassVar[torch.dtype | None] = None

    # The tokenizer that came with it, if any.
    tokenizer: Any = None

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers of the target whose states the draft reads, as layers passed; none for one that reads text."""
        return tuple(self.config.taps)

    @property
    def reduced(self) -> bool:
        """Whether the draft speaks a part of the target's vocabulary."""
        return False

    @abstractmethod
    def vocabulary(self) -> Tensor:
        """Target ids [D] that the draft can say, ascending."""

    @property
    @abstractmethod
    def parameters_per_token(self) -> int:
        """Parameters that one drafted token multiplies, what is borrowed of the target included."""

    @abstractmethod
    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., D] over :meth:`vocabulary` of the draft's states [..., H]."""

    # -- its target --------------------------------------------------------------------------------------------
    def check_fit(self, target: Any) -> None:
        """Raise ``UserError`` when this draft cannot serve ``target``: a ``Target`` or the facts about one."""
        self.config.check_fit(target)

    def bind(self, target: Any) -> Self:
        """This draft, with what it borrows of ``target`` in place. Whoever asks for logits has it bound before."""
        return self

    def borrowing(self, target: Any) -> Self:
        """This draft without tables of its own that the target's serve as well: the target's then take their place."""
        return self

    @abstractmethod
    def restarted(self, target: Any, seed: int = 0) -> Self:
        """A new, bound draft of this one's shape and vocabulary, private parts merged, that starts from ``target``.

        Raises ``UserError`` for routed experts and for a target of other sizes.
        """

    # -- its parts ---------------------------------------------------------------------------------------------
    def merged(self) -> Self:
        """An equal dense draft, without private parts. Raises ``UserError`` for routed experts."""
        return merge_private(self)

    def extra_loss(self) -> Tensor:
        """What training adds to the loss: the weighted load-balancing term of routed experts since the last call."""
        return balance_loss(self, self.config.balance)

    def rebuilt(self, config: Any, state: Mapping[str, Tensor]) -> Self:
        """A draft like this one, of another shape, that holds these tensors; what it borrows is kept."""
        new = type(self)(config)
        new.load_state_dict(dict(state), strict=True, assign=True)
        return new.inherit(self).train(self.training)

    # -- its file ----------------------------------------------------------------------------------------------
    def stored(self) -> dict[str, Tensor]:
        """The tensors of the draft's own file, by the names that they have there."""
        return dict(self.state_dict())

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Take these tensors, named as :meth:`stored` does, in their own data types."""
        self.load_state_dict(dict(state), strict=True, assign=True)

    def inherit(self, other: Any) -> Self:
        """This draft, with whatever is no tensor of ``other``, a draft of the same family."""
        self.tokenizer = other.tokenizer
        return self

    def base_hash(self) -> str:
        """By what a private part knows this draft as the one that it was trained on (16 hex digits)."""
        kind = self.BASE_DTYPE
        return tensors_hash(
            {n: t.to(kind) if kind and t.is_floating_point() else t for n, t in self.state_dict().items()}
        )


AnyDraft = TypeVar("AnyDraft", bound=Draft)


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """What all drafts of one kind share, and the way in and out of them. Whatever fails raises ``UserError``.

    Drafts: ``build(config)`` gives an untrained draft of the ``config`` entry of redraft.json, private parts included,
    for a loader to fill; ``fresh(target, vocabulary, seed)`` a new one for a target, bound to it, where ``vocabulary``
    concerns families that have one of their own. ``reads_states``: whether its drafts read the target's states; one
    that does not is a model by itself.

    Its own folders: ``weights_file`` beside redraft.json, and whatever ``write_beside(folder, draft)`` writes and
    ``read_beside(folder, draft)`` gives back to the draft, ``other_files`` of ``other_bytes`` at most. ``merges``: a
    whole draft is saved with its private parts merged. ``check_usable(draft, source)`` refuses a loaded draft whose
    proposals here would not be its own.

    Checkpoints of other hands: ``recognises(checkpoint)`` says whether a
    :class:`redraft.drafts.formats.reading.Checkpoint` is of this family, ``takes_any`` that it is asked after all
    others, ``architectures`` the names by which its own are told, for messages. ``read(checkpoint, target, notes,
    **options)`` gives the draft, in the types of its file, and what its record says of it; ``target`` holds the facts
    about one, or is none where the family does without; what our draft does not compute or hold is refused.

    Engines: ``writers`` has a :class:`redraft.drafts.formats.base.Writer` for each format; ``refusal`` is what is said
    of a ``{format}`` that is not among them.
    """

    name: str
    build: Callable[[dict[str, Any]], Draft]
    fresh: Callable[[Any, Sequence[int], int], Draft]
    reads_states: bool = True

    weights_file: str = "draft.safetensors"
    other_files: tuple[str, ...] = ()
    other_bytes: int = 0
    merges: bool = False
    write_beside: Callable[[Path, Any], None] = _nothing
    read_beside: Callable[[Path, Any], None] = _nothing
    check_usable: Callable[[Any, str], None] = _nothing

    recognises: Callable[[Any], bool]
    takes_any: bool = False
    architectures: tuple[str, ...] = ()
    read: Callable[..., tuple[Draft, dict[str, Any]]]

    writers: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = "drafts of this family are not written as {format}"


def fresh(family: str, target: Any, vocabulary: Sequence[int], seed: int = 0) -> Draft:
    """A new draft of a family for ``target``. Raises ``UserError`` for an unknown family."""
    draft: Draft = FAMILIES.get(family).fresh(target, vocabulary, seed)
    return draft
