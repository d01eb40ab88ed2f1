"""How drafts are trained: the settings of every training loop, and the methods.

A method says which groups of parameters are trained; everything else is frozen. All methods start from the same draft,
see the same data and meet the same budget, so that they can be compared. ``scratch`` alone starts from a new draft of
the same shape. What the groups are is the draft's own affair (``Draft.GROUPS``), and :mod:`redraft.drafts.groups`
applies a method to a draft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, ClassVar

from pydantic import model_validator

from redraft.errors import UserError
from redraft.registries import LOSSES
from redraft.settings.base import AUTO, BlockOf, DtypeName, Recipe, known_name, one_of, recipe, said, setting

LossName = Annotated[str, one_of("loss", LOSSES.names)]
OPTIMIZERS = ("muon", "adamw")
OptimizerName = Annotated[str, one_of("optimizer", lambda: OPTIMIZERS)]

# Activations of a step beyond which training and walks go by blocks of positions: a setting of training alone.
ACTIVATION_GIB = 4.0


@recipe
class LoopConfig(Recipe):
    """How anything is trained."""

    learning_rate: float = setting(1e-3, "highest learning rate", gt=0, allow_inf_nan=False)
    warmup: float = setting(0.05, "share of all steps before the cosine", ge=0, lt=1)
    optimizer: OptimizerName = setting("adamw", "muon (matrices; adamw for the rest) or adamw")
    weight_decay: float = setting(0.01, "weight decay", ge=0, allow_inf_nan=False)
    clip: float = setting(1.0, "longest gradient; inf clips nothing", gt=0)
    evaluate_every: int = setting(25, "steps between two evaluations", ge=1)
    patience: int = setting(6, "evaluations without a new best before training stops; 0: never stop early", ge=0)
    save_seconds: float = setting(300.0, "seconds after which a checkpoint is written, besides at evaluations")
    seed: int = setting(0, "seed of everything random", lt=2**62)

    # What may differ between a run and its resumption.
    FREE: ClassVar[tuple[str, ...]] = ("save_seconds",)

    def identity(self) -> dict[str, Any]:
        """The settings that a checkpoint belongs to."""
        return {k: v for k, v in asdict(self).items() if k not in self.FREE}  # type: ignore[call-overload]


@recipe
class TrainConfig(LoopConfig):
    """How a draft that reads the target's states is trained."""

    optimizer: OptimizerName = setting("muon", "muon (matrices; adamw for the rest) or adamw")
    loss: LossName = setting("kl", "training loss")
    epochs: float = setting(3.0, "passes over the responses", gt=0, allow_inf_nan=False)
    batch_anchors: int = setting(1536, "supervised positions a step; a row with more is cut into spans", ge=1)
    unroll: int = setting(3, "draft steps that training unrolls, J of EAGLE-3", ge=1)
    step_decay: float = setting(0.8, "weight of each unrolled step over that of the one before")
    gamma: int = setting(5, "drafted tokens a round when held-out tau is measured", ge=1)
    activation_memory: float = setting(
        ACTIVATION_GIB,
        "GiB of activations above which a step is computed in blocks of positions",
        gt=0,
        allow_inf_nan=False,
    )

    FREE: ClassVar[tuple[str, ...]] = ("save_seconds", "activation_memory")


TrainBlock = Annotated[dict[str, Any], BlockOf(TrainConfig)]


@recipe
class CausalConfig(LoopConfig):
    """How a causal language model is trained, whatever on."""

    precision: DtypeName = setting(AUTO, "arithmetic of training: bfloat16, float32 or auto, the faster here")


@recipe
class PretrainConfig(CausalConfig):
    """Pretraining on plain text."""

    warmup: float = setting(0.02, "share of all steps before the cosine", ge=0, lt=1)
    weight_decay: float = setting(0.1, "weight decay", ge=0, allow_inf_nan=False)
    evaluate_every: int = setting(200, "steps between two evaluations", ge=1)
    patience: int = setting(0, "evaluations without a new best before training stops; 0: never stop early", ge=0)
    tokens: int = setting(10_000_000, "tokens in all", ge=1)
    length: int = setting(512, "tokens of a block of text", ge=1)
    batch_tokens: int = setting(16_384, "tokens a step", ge=1)
    micro_tokens: int = setting(4_096, "of these, tokens that go through the model at once", ge=1)
    heldout_tokens: int = setting(32_768, "tokens that perplexity is measured on", ge=1)

    @property
    def batch_blocks(self) -> int:
        return max(1, self.batch_tokens // self.length)

    @property
    def micro_blocks(self) -> int:
        return min(self.batch_blocks, max(1, self.micro_tokens // self.length))

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (self.batch_blocks * self.length)))


PretrainBlock = Annotated[dict[str, Any], BlockOf(PretrainConfig)]


@recipe
class DistilConfig(CausalConfig):
    """Distillation from a target's answers, with plain text mixed in."""

    learning_rate: float = setting(3e-4, "highest learning rate", gt=0, allow_inf_nan=False)
    loss: LossName = setting("kl", "training loss")
    epochs: float = setting(3.0, "passes over the answers", gt=0, allow_inf_nan=False)
    batch_anchors: int = setting(4096, "supervised answer tokens a step", ge=1)
    micro_tokens: int = setting(4096, "tokens, prompts counted, that go through the model at once", ge=1)
    gamma: int = setting(5, "drafted tokens a round", ge=1)
    text_share: float = setting(0.1, "share of plain text among supervised tokens", ge=0, lt=1)
    text_length: int = setting(256, "tokens of a block of plain text", ge=1)


AlignBlock = Annotated[dict[str, Any], BlockOf(DistilConfig)]


@recipe
class ReplayConfig(Recipe):
    """Further training on the states where the trained draft's rounds end early.

    A loss over chains needs every step that led to a weighed one, so that no weight but the floor may be zero.
    """

    passes: int = setting(0, "passes after the first training; 0 is off", ge=0)
    epochs: float = setting(1.0, "epochs of a pass", gt=0)
    rate: float = setting(0.3, "learning rate over that of the first training", gt=0)
    accepted: float = setting(1.0, "weight of a step that a lost round still got right", gt=0)
    failed: float = setting(1.0, "weight of the step that ended a round", gt=0)
    floor: float = setting(0.0, "weight of every other state that the draft can be right at", ge=0)


ReplayBlock = Annotated[dict[str, Any], BlockOf(ReplayConfig)]


# -- methods -----------------------------------------------------------------------------------------------------------
# Updates stand inside the layers that they update, so that no pattern of a family tells them apart.
LOW_RANK = "low_rank"
WHOLE = ("fc", "norms", "attention", "shared", "head")

# A change of a matrix is told in bytes at most (:mod:`redraft.drafts.scaling`).
MOST_BITS = 8


@recipe
class PrivateSize(Recipe):
    """How large the private parts are. A method takes what concerns it.

    Without a width or a rank what is trained is made a fifth of the draft (``SHARE``), as in the studies.
    Raises ``UserError`` for sizes that no draft can have.
    """

    width: int | None = setting(None, "inner width of the private expert, or of all of them together", ge=1)
    rank: int | None = setting(None, "rank of the low-rank updates", ge=1)
    bits: int | None = setting(None, "bits a weight that a change is told in; 2 are usual", ge=1, le=MOST_BITS)
    on: tuple[str, ...] = setting((), "patterns of the linear layers with low-rank updates; all by default")
    alpha: float | None = setting(None, "scale of low-rank updates, alpha / rank as in peft; one by default", gt=0)
    aim: bool = setting(False, "begin low-rank updates where the gradient of the first steps is")
    experts: int = setting(4, "routed private experts")
    active: int = setting(2, "routed private experts that a token goes through")
    shared_experts: int = setting(1, "parts that the old MLP is cut into, as routed experts")
    shared_active: int | None = setting(None, "of these, how many a token goes through; all by default")
    balance: float = setting(0.01, "weight of the load-balancing term of routed experts", ge=0)

    @model_validator(mode="after")
    def _routed(self) -> PrivateSize:
        shared_active = self.shared_experts if self.shared_active is None else self.shared_active
        try:
            check_experts("private", self.experts, self.active)
            check_experts("shared", self.shared_experts, shared_active)
        except UserError as error:
            raise said(error) from None
        return self


PrivateBlock = Annotated[dict[str, Any], BlockOf(PrivateSize)]


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

MethodName = Annotated[str, one_of("method", lambda: METHODS)]


def method(name: str) -> Method:
    """Raises ``UserError`` for a name that is not there, listing those that are."""
    known_name("method", name, METHODS)
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
