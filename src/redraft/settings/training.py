"""How drafts and drafters are trained: the settings of every training loop."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, ClassVar

from redraft.registries import LOSSES
from redraft.settings.base import AUTO, BlockOf, DtypeName, Recipe, one_of, recipe, setting

LossName = Annotated[str, one_of("loss", LOSSES.names)]
OPTIMIZERS = ("muon", "adamw")
OptimizerName = Annotated[str, one_of("optimizer", lambda: OPTIMIZERS)]


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
    seed: int = setting(0, "seed of everything random")

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
    batch_anchors: int = setting(1536, "supervised positions a step", ge=1)
    unroll: int = setting(3, "draft steps that training unrolls, J of EAGLE-3", ge=1)
    step_decay: float = setting(0.8, "weight of each unrolled step over that of the one before")
    gamma: int = setting(5, "drafted tokens a round when held-out tau is measured", ge=1)


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
