"""The settings of ``redraft distill``, from flags or one YAML file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from redraft.adaptation.config import (
    CONFIG_FILE,
    checked,
    claim_folder,
    merged,
    one_value,
    read_settings,
    recipe,
    settled,
)
from redraft.arithmetic import AUTO, CHOICES
from redraft.artifact import read_json
from redraft.data.transport import check_address
from redraft.drafts.formats.base import check_formats
from redraft.errors import UserError
from redraft.registries import LOSSES
from redraft.sampling import samplers_of
from redraft.train.distil import DistilConfig
from redraft.train.pretrain import PretrainConfig

COMMAND = "redraft distill"
# Settings that stand on top and in a recipe too: name on top -> name in the recipe.
ALIGN_TOO = {name: name for name in ("loss", "gamma", "text_share", "seed")}
PRETRAIN_TOO = {"seed": "seed"}
TEACHERS = ("states", "tops", "tokens")
RECIPES = ("pretrain", "align")


class DistillConfig(BaseModel):
    """What ``redraft distill`` does. Every field is a key of the YAML file, most are flags too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str = Field(description="the chat target: folder, hub id, or a folder with a PEFT adapter")
    out: Path = Field(description="run directory; a stopped run resumes from it")
    adapter: str | None = Field(None, description="PEFT adapter to merge into --target")
    template_arg: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the target's chat template, such as enable_thinking: false"
    )
    # the drafter
    draft: str | None = Field(None, description="a drafter to align as it is, instead of pretraining a new one")
    size: str = Field("1/10", description="size of a new one: share of the target, parameters, or a preset's name")
    layers: int | None = Field(None, gt=0, description="how many layers a new one has")
    embeddings: str = Field("target", description="what its embeddings start from: target or random")
    tied: bool | None = Field(None, description="whether it shares the embedding table with the head")
    from_layers: tuple[int, ...] = Field((), description="layers of the target that it starts from, counted from 0")
    private_width: int = Field(0, ge=0, description="train only private experts of this width beside every MLP")
    # pretraining
    text: tuple[str, ...] = Field((), description="plain text: files, folders, datasets:NAME")
    text_field: str = Field("text", description="field of JSON lines and data sets that holds the text")
    heldout_text: str | None = Field(None, description="held-out text; by default a share of --text")
    heldout_share: float = Field(0.01, gt=0, lt=1, description="share of --text that is held out")
    pretrain: dict[str, Any] = Field(default_factory=dict, description="pretraining settings, such as tokens")
    # responses
    prompts: str | None = Field(None, description="seed instructions that the target answers")
    responses: str | None = Field(None, description="a log of served responses instead of prompts")
    temperatures: tuple[float, ...] = Field((0.0, 0.3, 0.7, 1.0), description="sampling temperatures of the answers")
    top_p: float = Field(0.95, description="nucleus of sampled answers")
    max_new_tokens: int = Field(256, gt=1, description="longest answer")
    server: str | None = Field(None, description="OpenAI-compatible server that answers")
    server_model: str | None = Field(None, description="the target's name on that server")
    server_only: bool = Field(False, description="the target's weights are not at hand: only config and tokenizer")
    batch_size: int = Field(64, gt=0, description="sequences decoded together, or requests under way")
    heldout_prompts: int = Field(24, gt=0, description="prompts kept back for early stopping")
    # alignment
    loss: str = Field("tvdpp", description="training loss")
    teacher: str = Field("states", description="what the target is known by: states, tops or tokens")
    top_logprobs: int = Field(20, gt=0, description="likeliest tokens asked of the server for teacher tops")
    text_share: float = Field(0.1, ge=0, lt=1, description="share of plain text in alignment")
    store_states: bool = Field(True, description="keep the target's states on disk over the epochs")
    align: dict[str, Any] = Field(default_factory=dict, description="alignment settings, such as epochs")
    gamma: int = Field(3, gt=0, description="drafted tokens a round")
    dtype: str = Field(
        AUTO, description="data type of the target: bfloat16, float32, or auto, the one that the machine is faster in"
    )
    device: str = Field("cpu", description="torch device")
    seed: int = 0
    exports: tuple[str, ...] = Field(("hf",), description="formats to export")
    # what a source of responses asks for and distillation has no use for
    eval_prompts: None = None
    bench_prompts: int = Field(0, ge=0, le=0)

    @model_validator(mode="before")
    @classmethod
    def _once(cls, values: Any) -> Any:
        found = one_value(values, "align", DistilConfig, "alignment setting", ALIGN_TOO)
        return one_value(found, "pretrain", PretrainConfig, "pretraining setting", PRETRAIN_TOO)

    @field_validator("loss")
    @classmethod
    def _loss(cls, value: str) -> str:
        LOSSES.get(value)
        return value

    @field_validator("server")
    @classmethod
    def _server(cls, value: str | None) -> str | None:
        if value is not None:
            check_address(value)
        return value

    @field_validator("exports")
    @classmethod
    def _exports(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_formats(value, "standalone")
        return value

    @field_validator("teacher", "dtype", "embeddings")
    @classmethod
    def _choice(cls, value: str, info: Any) -> str:
        choices = {"teacher": TEACHERS, "dtype": CHOICES, "embeddings": ("target", "random")}
        if value not in choices[info.field_name]:
            raise UserError(f"{info.field_name} must be one of {', '.join(choices[info.field_name])}, not {value!r}")
        return value

    @model_validator(mode="after")
    def _together(self) -> DistillConfig:
        if (self.prompts is None) == (self.responses is None):
            raise UserError("give --prompts for the target to answer, or --responses with a log of served ones")
        assert samplers_of(self.temperatures, self.top_p)
        if not self.text and (self.draft is None or self.text_share > 0):
            raise UserError("give --text to pretrain on and to mix in (with --draft and --text-share 0 none is needed)")
        if self.server_model and not self.server:
            raise UserError("--server-model names the target on a server; give --server too, or leave it out")
        if self.private_width and self.draft is None:
            raise UserError("private experts stand beside the MLPs of a trained drafter; give it with --draft")
        if self.server_only and self.teacher == "states":
            raise UserError(
                "a server gives no logits to distil from; give the target's weights, or train with --teacher tops "
                "(its top log-probabilities) or --teacher tokens (its answers alone)"
            )
        if self.teacher == "tops" and not self.server or self.server_only and not (self.server or self.responses):
            raise UserError("name the --server that answers and gives log-probabilities")
        if self.server_only and (self.embeddings == "target" or self.from_layers) and self.draft is None:
            raise UserError("without the target's weights a new drafter starts with --embeddings random and no layers")
        assert self.pretrain_config() and self.align_config()
        return self

    @property
    def self_prompts(self) -> int:
        """A drafter learns from instructions of many kinds; the target writes none of them itself."""
        return 0

    def pretrain_config(self) -> PretrainConfig:
        """Raises ``UserError`` for an unknown setting."""
        own = {"seed": self.seed, "precision": self.dtype}
        return recipe(PretrainConfig, own | self.pretrain, "pretraining setting")

    def align_config(self) -> DistilConfig:
        """Raises ``UserError`` for an unknown setting."""
        own = {"loss": self.loss, "gamma": self.gamma, "text_share": self.text_share, "seed": self.seed}
        own["precision"] = self.dtype
        return recipe(DistilConfig, own | self.align, "alignment setting")


def read_distill_config(path: Path | None, given: dict[str, Any]) -> DistillConfig:
    """Settings from a YAML file (if any); ``given`` flags win. Raises ``UserError``."""
    return checked(DistillConfig, merged(read_settings(path, COMMAND) if path else {}, given), COMMAND)


def claim_distill(config: DistillConfig, say: Callable[[str], None] | None = None) -> DistillConfig:
    """Make the run directory, or check that it belongs to the same settings; the settings with the run's data types.

    Raises ``UserError``.
    """
    file = config.out / CONFIG_FILE
    config = settled(config, file, say)
    if file.is_file():
        # What trains kept its precision whatever the target's type was, before there was a choice.
        stored = read_json(file)
        kept = {name: {key: v for key, v in stored.get(name, {}).items() if key == "precision"} for name in RECIPES}
        config = config.model_copy(update={name: kept[name] | getattr(config, name) for name in RECIPES})
    values = json.loads(config.model_dump_json(exclude={"out"}))
    values |= {"pretrain": config.pretrain_config().identity(), "align": config.align_config().identity()}
    defaults = {"pretrain": PretrainConfig().identity(), "align": DistilConfig().identity()}
    claim_folder(config.out, values, DistillConfig, defaults)
    return config
