"""The settings of a whole adaptation, from flags or one YAML file."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from redraft.artifact import atomic_write_json
from redraft.drafts.groups import PrivateSize, method
from redraft.errors import UserError
from redraft.losses import LOSSES
from redraft.select import SCORERS
from redraft.select.rules import parse_budget
from redraft.train.loop import TrainConfig

CONFIG_FILE = "config.json"


class AdaptConfig(BaseModel):
    """What ``redraft adapt`` does. Every field is a flag of the same name and a key of the YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str = Field(description="the fine-tuned target: folder, hub id, or a folder with a PEFT adapter")
    draft: str = Field(description="the old draft: redraft folder, public EAGLE-3 checkpoint folder, or hub id")
    prompts: str = Field(description="prompts of the target's domain (JSONL, ShareGPT, Alpaca, text, datasets:NAME)")
    out: Path = Field(description="run directory; a stopped run resumes from it")
    adapter: str | None = Field(None, description="PEFT adapter to merge into --target")
    base_target: str | None = Field(None, description="the target the old draft was made for (scorer shift needs it)")
    eval_prompts: str | None = Field(None, description="prompts to measure on; by default held out from --prompts")
    method: str = Field("lora", description="which parameters are trained")
    private_width: int = Field(768, gt=0, description="inner width of the private expert")
    rank: int = Field(64, gt=0, description="rank of the low-rank updates")
    loss: str = Field("kl", description="training loss")
    scorer: str = Field("rejection", description="how samples are scored for selection")
    budget: str = Field("75%", description='what selection keeps: "25%", "400" rows or "60k tokens"')
    temperatures: tuple[float, ...] = Field((0.0,), description="sampling temperatures of regeneration")
    top_p: float = Field(1.0, description="nucleus of sampled regeneration")
    max_new_tokens: int = Field(256, gt=1, description="longest response")
    server: str | None = Field(
        None, description="OpenAI-compatible server to regenerate with, e.g. http://127.0.0.1:8000"
    )
    server_model: str | None = Field(None, description="model name on that server")
    batch_size: int = Field(64, gt=0, description="sequences decoded together, or requests under way at the server")
    heldout_prompts: int = Field(24, gt=0, description="prompts kept back for early stopping")
    bench_prompts: int = Field(24, gt=0, description="prompts of the final benchmark")
    bench_tokens: int = Field(128, gt=1, description="longest response in the benchmark")
    gamma: int = Field(5, gt=0, description="drafted tokens a round")
    dtype: str = Field("bfloat16", description="data type of the target: bfloat16 or float32")
    device: str = Field("cpu", description="torch device")
    seed: int = 0
    exports: tuple[str, ...] = Field(("vllm",), description="formats to export")
    train: dict[str, Any] = Field(default_factory=dict, description="training settings that differ from the defaults")

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        method(value)
        return value

    @field_validator("loss")
    @classmethod
    def _loss(cls, value: str) -> str:
        LOSSES.get(value)
        return value

    @field_validator("scorer")
    @classmethod
    def _scorer(cls, value: str) -> str:
        SCORERS.get(value)
        return value

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: str) -> str:
        parse_budget(value)
        return value

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, value: str) -> str:
        if value not in ("bfloat16", "float32"):
            raise UserError(f"dtype must be bfloat16 or float32, not {value!r}")
        return value

    @property
    def private_size(self) -> PrivateSize:
        return PrivateSize(self.private_width, self.rank)

    def train_config(self) -> TrainConfig:
        """Raises ``UserError`` for an unknown training setting."""
        known = {f.name for f in fields(TrainConfig)}
        unknown = sorted(set(self.train) - known)
        if unknown:
            raise UserError(f"unknown training setting {', '.join(unknown)}; choose from {', '.join(sorted(known))}")
        return TrainConfig(**{"loss": self.loss, "gamma": self.gamma, "seed": self.seed, **self.train})


def parse_config(values: dict[str, Any]) -> AdaptConfig:
    """Checked settings. Raises ``UserError`` that names the first bad one."""
    try:
        return AdaptConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        raise UserError(f"{name.replace('_', '-')}: {first['msg'].lower()}; see `redraft adapt --help`") from None


def read_config(path: Path, overrides: dict[str, Any] | None = None) -> AdaptConfig:
    """Settings from a YAML file; ``overrides`` (flags that were given) win. Raises ``UserError``."""
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a YAML file with the settings of `redraft adapt`") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold settings as `name: value` lines")
    return parse_config({k.replace("-", "_"): v for k, v in values.items()} | (overrides or {}))


def claim_run(config: AdaptConfig) -> None:
    """Make the run directory, or check that it belongs to the same settings. Raises ``UserError``."""
    folder = config.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {folder} as run directory: {error.strerror or error}") from None
    values = json.loads(config.model_dump_json(exclude={"out"})) | {"train": asdict(config.train_config())}
    path = folder / CONFIG_FILE
    if not path.exists():
        if any(folder.iterdir()):
            raise UserError(f"{folder} holds other files; give a new or empty run directory")
        atomic_write_json(path, values)
        return
    stored = json.loads(path.read_text())
    changed = sorted(k for k in {*stored, *values} if stored.get(k) != values.get(k))
    if changed:
        raise UserError(
            f"{folder} belongs to a run with another {', '.join(changed)}; "
            "give another run directory, or the same settings to resume it"
        )
