"""What a draft is, whatever its family, and what a family is. Nothing here knows which families there are.

A family is a folder of this room. Its ``family.py`` files one :class:`Family` in ``FAMILIES`` under the name that
``redraft.json`` gives, with how checkpoints of others are read and how drafts are written for engines; beside it stand
the config and the module (:class:`Draft`). Everybody else asks the draft, or its family by
``FAMILIES.get(draft.family)``, and never which class a draft is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from redraft.artifact import tensors_hash
from redraft.drafts.layers import Router
from redraft.drafts.merging import MergedState
from redraft.drafts.merging import is_private as is_private
from redraft.drafts.proposing import Objective, Reduce, Walk, alone
from redraft.errors import UserError
from redraft.registries import FAMILIES
from redraft.settings.training import TrainConfig
from redraft.target import Head, Target


# -- the shape -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """The shape of a draft: what it reads of the target, and the private parts that it carries.

    A family adds its own fields, ``hidden_size``, ``draft_vocab_size`` and ``taps`` among them. Every field is written
    into ``redraft.json``; one that is new needs a default, so that older files load.
    """

    # Fields that are tuples here and lists in JSON.
    LISTS: ClassVar[tuple[str, ...]] = ("low_rank_on",)
    # Fields that came later. They are written only where they are not at their defaults, so that a draft without them
    # is the same file, by the same name in a run directory, as it always was.
    LATER: ClassVar[tuple[str, ...]] = ()
    # Fields with a default that every file has nevertheless: one without them is damaged, and would be another draft.
    ALWAYS: ClassVar[tuple[str, ...]] = ()

    private_width: int = 0
    low_rank: int = 0
    low_rank_on: tuple[str, ...] = ()
    low_rank_alpha: float | None = None
    private_experts: int = 1
    private_active: int = 1
    shared_experts: int = 1
    shared_active: int = 1
    balance: float = 0.0

    def check_fit(self, target: Any) -> None:
        """Raise ``UserError`` when a draft of this shape cannot sit on ``target``, of which sizes alone are asked."""
        raise NotImplementedError

    def dense(self) -> Self:
        """The shape of the equal draft without private parts; a family widens its MLPs by ``private_width``."""
        return replace(self, private_width=0, low_rank=0, low_rank_on=(), low_rank_alpha=None)

    def to_dict(self) -> dict[str, Any]:
        known = {**asdict(self), **{name: list(getattr(self, name)) for name in self.LISTS}}
        usual = {f.name: f.default for f in fields(self) if f.name in self.LATER}
        return {name: v for name, v in known.items() if name not in usual or getattr(self, name) != usual[name]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ``UserError`` for unknown or missing keys."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise UserError(f"draft config has unknown keys: {', '.join(unknown)}; was it written by a newer redraft?")
        absent = [name for name in cls.ALWAYS if name not in values]
        if absent:
            raise UserError(f"draft config is incomplete: it lacks {', '.join(absent)}; copy it again")
        try:
            return cls(**{**values, **{name: tuple(values[name]) for name in cls.LISTS if name in values}})
        except TypeError as error:
            raise UserError(f"draft config is incomplete: {error}") from None


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary settings that a new draft takes over from a text model's config.

    Of several for several kinds of layers, those of full attention. Angles that are tabulated for one head width or
    turn a part of the head alone are the model's own affair: a new draft learns the plain ones as well. So are those
    that follow the length of the text: within the target's context they are the plain ones, and engines read them in
    other ways.
    """
    known = dict(getattr(config, "rope_parameters", None) or {})
    if known and all(isinstance(value, dict) for value in known.values()):
        known = dict(known.get("full_attention") or next(iter(known.values())))
    theta = known.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    if known.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        return {"rope_theta": theta, "rope_type": "default"}
    dropped = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
    return {"rope_theta": theta, "rope_type": "default"} | {k: v for k, v in known.items() if k not in dropped}


def heads_of(config: Any) -> dict[str, Any]:
    """Query heads, key heads and head width that a new draft takes over, the first layer's where layers differ."""

    def value(name: str) -> int:
        try:
            return int(getattr(config, name, None) or 0)
        except RuntimeError:  # transformers' answer to who asks for one value where there are several
            return int(getattr(config.per_layer_config[0], name))

    heads = value("num_attention_heads")
    width = value("head_dim") or config.hidden_size // heads
    key_heads = value("num_key_value_heads") or heads
    return {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": width}


# -- the draft -------------------------------------------------------------------------------------------------------


class Draft(nn.Module, ABC):
    """A module that proposes tokens to a target.

    ``config`` is a :class:`DraftConfig`. How a draft reads states and text is its family's.
    """

    family: ClassVar[str]
    config: Any
    # Groups of parameters that a method may train: patterns of names, the first that fits counts. Low-rank updates,
    # which stand inside the layers that they update, are a group of their own.
    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]]
    # Parameters whose rows are the tokens of :meth:`vocabulary`, in its order.
    TOKEN_ROWS: ClassVar[tuple[str, ...]] = ()
    # Tensors that a draft may have of its own, or borrow of its target.
    BORROWED: ClassVar[tuple[str, ...]] = ()

    # Whether :meth:`proposer` grows trees too (:class:`TreeProposer`).
    grows_trees: ClassVar[bool] = False
    # Whether the objective takes weights of its states.
    weighable: ClassVar[bool] = False

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

    # -- its work: it is bound to its target before ------------------------------------------------------------
    def proposer(self, target: Target, capacity: int) -> Any:
        """A :class:`ChainProposer` for one request of at most ``capacity`` tokens, a round's guesses included."""
        raise NotImplementedError

    def static_proposer(self, target: Target, capacity: int, gamma: int) -> Any:
        """A :class:`ChainProposer` of greedy chains whose steps have static shapes, for CUDA graphs; it serves one
        request after another. A family without one gives its usual proposer."""
        return self.proposer(target, capacity)

    def walk(self, target: Head) -> Walk:
        """The draft over stored responses of ``target``."""
        raise NotImplementedError

    def objective(self, target: Head, settings: TrainConfig, reduce: Reduce = alone) -> Objective[Any]:
        """What a training step minimises. Raises ``UserError`` for an unknown loss."""
        raise NotImplementedError

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
    def mlps(self) -> tuple[str, ...]:
        """Names of the SwiGLUs that have private experts beside them. Raises ``UserError`` where none can be."""
        raise NotImplementedError

    def linears(self) -> list[str]:
        """Names of the linear layers that a low-rank update can be put on: all but those of private experts."""
        return [n for n, m in self.named_modules() if isinstance(m, nn.Linear) and not is_private(f"{n}.weight")]

    def refuse_unmergeable(self) -> None:
        """Raise ``UserError`` that names what keeps this from being one dense draft. Routed experts do."""
        sides = [
            f"{part.active} of {part.experts} {'private' if '.private.' in name else 'shared'} experts"
            for name, part in self.named_modules()
            if isinstance(part, Router)
        ]
        if sides:
            raise UserError(
                f"a router gives each token {' and '.join(sides)}, which no dense MLP equals: a draft of method "
                "eda-moe cannot be merged or exported; decode with redraft itself, or train the method eda"
            )

    def merged(self) -> Self:
        """An equal dense draft: a private expert becomes part of one wider SwiGLU, a low-rank update of its matrix.

        Unchanged if there is neither. Raises ``UserError`` for routed experts.
        """
        self.refuse_unmergeable()
        if not self.config.private_width and not self.config.low_rank:
            return self
        state = {name: tensor.clone() for name, tensor in self.dense_state().items()}
        return self.rebuilt(self.config.dense(), state)

    def dense_state(self) -> Mapping[str, Tensor]:
        """The tensors of :meth:`merged`, each made when it is asked for. Raises ``UserError`` for routed experts."""
        self.refuse_unmergeable()
        return MergedState(self)

    def extra_loss(self) -> Tensor:
        """What training adds to the loss: the weighted load-balancing term of routed experts since the last call."""
        terms = [term for m in self.modules() if isinstance(m, Router) and (term := m.balance()) is not None]
        if not terms:
            return torch.zeros((), device=next(self.parameters()).device)
        return self.config.balance * torch.stack(terms).sum()

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
    about one, or is none where the family does without; what our draft does not compute or hold is refused. ``options``
    are those that it takes. ``check_state(state, draft, where)`` refuses a
    draft of our own format, not filled yet, whose tensors fit their places and tell no draft.
    ``remarks(draft, source, target)`` are notes on a draft of any format that opens and fits, for whoever uses it.

    Engines: ``writers`` has a :class:`redraft.drafts.formats.base.Writer` for each format; ``refusal`` is what is said
    of a ``{format}`` that is not among them.

    Causes: ``suspects`` is a :data:`redraft.drafts.suspects.Suspecting`, what may be read wrongly of a draft;
    ``meaning(config)`` says in fields what a draft means, and ``readers`` has for each engine how it reads a file:
    ``reader(config, tensors, target)`` gives a :class:`redraft.drafts.formats.meaning.Reading`.
    """

    name: str
    build: Callable[[dict[str, Any]], Draft]
    fresh: Callable[[Any, Sequence[int], int], Draft]
    reads_states: bool = True

    weights_file: str = "draft.safetensors"
    other_files: tuple[str, ...] = ()
    other_bytes: int = 0
    merges: bool = False
    write_beside: Callable[[Path, Any], None] = lambda *_: None
    read_beside: Callable[[Path, Any], None] = lambda *_: None
    check_usable: Callable[[Any, str], None] = lambda *_: None

    recognises: Callable[[Any], bool]
    takes_any: bool = False
    architectures: tuple[str, ...] = ()
    read: Callable[..., tuple[Draft, dict[str, Any]]]
    options: tuple[str, ...] = ()
    check_state: Callable[[Mapping[str, Tensor], Any, Any], None] = lambda *_: None
    remarks: Callable[[Any, str, Any], list[str]] = lambda *_: []

    writers: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = "drafts of this family are not written as {format}"

    suspects: Callable[..., Any] = lambda *_: iter(())
    meaning: Callable[[Any], dict[str, Any]] = lambda config: dict(config.to_dict())
    readers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def fresh(family: str, target: Any, vocabulary: Sequence[int], seed: int = 0) -> Draft:
    """A new draft of a family for ``target``. Raises ``UserError`` for an unknown family."""
    draft: Draft = FAMILIES.get(family).fresh(target, vocabulary, seed)
    return draft
