"""The settings of a whole adaptation, from flags or one YAML file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from redraft.adaptation.yamlfile import read_yaml
from redraft.arithmetic import AUTO, check_dtype, go_on_with
from redraft.artifact import atomic_write_json, read_json
from redraft.data.transport import check_address
from redraft.drafts.formats.base import check_formats
from redraft.drafts.methods import PrivateSize, check_bits, method
from redraft.errors import UserError
from redraft.registries import LOSSES
from redraft.registry import nearest
from redraft.sampling import samplers_of
from redraft.select import parse_scorer
from redraft.select.rules import parse_budget
from redraft.starts.apply import parse_start
from redraft.train.trainer import TrainConfig

# Settings that stand on top and in a recipe too: name on top -> name in the recipe.
TRAIN_TOO = {"loss": "loss", "gamma": "gamma", "seed": "seed"}
SIZES_TOO = {"private_width": "width", "rank": "rank"}

CONFIG_FILE = "config.json"
REVISABLE = ("exports",)  # settings that a run may be gone on with otherwise
COMMAND = "redraft adapt"
SELF = "self"
ARGUMENTS = "template_arg"


class AdaptConfig(BaseModel):
    """What ``redraft adapt`` does. Every field is a flag of the same name and a key of the YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str = Field(description="the fine-tuned target: folder, hub id, or a folder with a PEFT adapter")
    draft: str = Field(description="the old draft: redraft folder, public EAGLE-3 checkpoint folder, or hub id")
    prompts: str | None = Field(
        None,
        description="prompts of the target's domain (JSONL, ShareGPT, Alpaca, text, datasets:NAME); "
        "self:400 lets the target write 400 questions itself",
    )
    responses: str | None = Field(
        None, description="a log of served responses (text or token ids) instead of prompts: nothing is generated"
    )
    out: Path = Field(description="run directory; a stopped run resumes from it")
    adapter: str | None = Field(None, description="PEFT adapter to merge into --target")
    template_arg: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the target's chat template, such as enable_thinking: false"
    )
    base_target: str | None = Field(None, description="the target the old draft was made for (scorer shift needs it)")
    eval_prompts: str | None = Field(None, description="prompts to measure on; by default held out from --prompts")
    method: str = Field("lora", description="which parameters are trained")
    private_width: int | None = Field(
        None, gt=0, description="inner width of the private expert; by default what makes it a fifth of the draft"
    )
    rank: int | None = Field(
        None, gt=0, description="rank of the low-rank updates; by default what makes them a fifth of the draft"
    )
    private: dict[str, Any] = Field(
        default_factory=dict,
        description="sizes of the private part that differ from the defaults (alpha, on, experts), and bits",
    )
    start: str = Field(
        "vocabulary", description="what training starts from: none, ridge, delta, vocabulary, or several, +"
    )
    loss: str = Field("kl", description="training loss")
    replay: int = Field(0, ge=0, description="passes over the states where the trained draft's rounds end early")
    scorer: str = Field("rejection", description="how samples are scored for selection: NAME or NAME:KEY=VALUE,...")
    budget: str = Field("100%", description='what selection keeps: "25%", "400" rows or "60k tokens"')
    select_on: Literal["responses", "prompts"] = Field(
        "responses", description="what is scored: responses, or prompts, of which only the kept ones are then answered"
    )
    general: str | None = Field(None, description="responses to general prompts, mixed in to guard the other speed")
    general_share: float = Field(0.0, ge=0, lt=1, description="their share of all response tokens")
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
    dtype: str = Field(
        AUTO, description="data type of the target: bfloat16, float32, or auto, the one that the machine is faster in"
    )
    device: str = Field("cpu", description="torch device")
    seed: int = 0
    exports: tuple[str, ...] = Field(("vllm",), description="formats to export")
    train: dict[str, Any] = Field(
        default_factory=dict,
        description="training settings that differ from the method's (epochs, batch_anchors, learning_rate, ...)",
    )

    @model_validator(mode="before")
    @classmethod
    def _once(cls, values: Any) -> Any:
        found = one_value(values, "train", TrainConfig, "training setting", TRAIN_TOO)
        return one_value(found, "private", PrivateSize, "private size", SIZES_TOO, lift=False)

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
        parse_scorer(value)
        return value

    @field_validator("exports")
    @classmethod
    def _exports(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_formats(value, "eagle3")
        return value

    @field_validator("server")
    @classmethod
    def _server(cls, value: str | None) -> str | None:
        if value is not None:
            check_address(value)
        return value

    @field_validator("start")
    @classmethod
    def _start(cls, value: str) -> str:
        parse_start(value)
        return value

    @model_validator(mode="after")
    def _text(self) -> AdaptConfig:
        if (self.prompts is None) == (self.responses is None):
            raise UserError("give --prompts, or --responses with a log of served responses: one of the two")
        if self.responses and (self.server or self.eval_prompts):
            raise UserError("--responses takes served text as it is; --server and --eval-prompts go with --prompts")
        if self.server_model and not self.server:
            raise UserError("--server-model names the target on a server; give --server too, or leave it out")
        assert samplers_of(self.temperatures, self.top_p)
        if self.top_p != 1 and not any(self.temperatures):
            raise UserError("--top-p filters what is sampled, and all --temperatures are 0; raise one, or leave it out")
        if self.responses and self.select_on == "prompts":
            raise UserError("--select-on prompts saves generation, and --responses are written already; leave it out")
        whole = parse_budget(self.budget).whole
        if whole and self.select_on == "prompts":
            raise UserError("--select-on prompts has nothing to choose: a budget of 100% answers them all; give less")
        if whole and self.scorer != type(self).model_fields["scorer"].default:
            raise UserError(f"scorer {self.scorer} has nothing to choose: the budget is 100%; give --budget, say 50%")
        if (self.general is None) != (self.general_share == 0):
            raise UserError("--general and --general-share go together: the responses, and their share of all tokens")
        assert self.self_prompts >= 0 and self.private_size
        return self

    @field_validator("budget", mode="before")
    @classmethod
    def _rows(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value  # a number of rows, as YAML reads it

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: str) -> str:
        parse_budget(value)
        return value

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, value: str) -> str:
        return check_dtype(value)

    @property
    def self_prompts(self) -> int:
        """How many questions the target writes itself; 0 for a prompt file. Raises ``UserError``."""
        if self.prompts is None or not (self.prompts == SELF or self.prompts.startswith(f"{SELF}:")):
            return 0
        count = self.prompts.partition(":")[2] or "400"
        if not count.isdigit() or not int(count):
            raise UserError(f"prompts {self.prompts!r} is not understood; write {SELF}:400 for 400 questions")
        return int(count)

    @model_validator(mode="after")
    def _together(self) -> AdaptConfig:
        assert self.private_size and self.train_config()  # a bad one is refused before there is a run directory
        check_bits(self.method, self.private_size)
        if "base_target" in parse_scorer(self.scorer).needs and self.base_target is None:
            raise UserError(f"scorer {self.scorer} compares the target with its base; give --base-target")
        return self

    @property
    def private_size(self) -> PrivateSize:
        """Raises ``UserError`` for an unknown size."""
        return recipe(PrivateSize, {"width": self.private_width, "rank": self.rank, **self.private}, "private size")

    def train_config(self) -> TrainConfig:
        """Raises ``UserError`` for an unknown training setting."""
        own = {"loss": self.loss, "gamma": self.gamma, "seed": self.seed}
        return recipe(TrainConfig, adaptation(self.method) | own | self.train, "training setting")


def adaptation(method_name: str) -> dict[str, Any]:
    """Training settings of an old draft where nobody says otherwise: those of the studies (docs/studies).

    A few hundred answers want many small steps; a new draft, with its millions of tokens, keeps the larger ones of
    :class:`~redraft.train.trainer.TrainConfig`.
    """
    return {"epochs": 6.0, "batch_anchors": 768, "learning_rate": method(method_name).learning_rate}


def one_value(values: Any, name: str, kind: Any, what: str, shared: Mapping[str, str], lift: bool = True) -> Any:
    """The settings ``values``, where each of ``shared`` (name on top -> name in the recipe ``name``) has one value.

    ``what`` names a setting of the recipe, which is of ``kind``. With ``lift`` a value that stands in the recipe alone
    holds on top too, so that a run has one of it throughout.
    Raises ``UserError`` for two values.
    """
    inner = values.get(name) if isinstance(values, dict) else None
    if not isinstance(inner, dict):
        return values
    hints, found = get_type_hints(kind), dict(values)
    for outer, own in shared.items():
        if inner.get(own) is None:
            continue
        value = typed(f"{what} {own}", inner[own], hints[own])
        there = values.get(outer)
        if there is None:
            found |= {outer: value} if lift else {}
        elif typed(outer, there, hints[own]) != value:
            raise UserError(
                f"{outer.replace('_', '-')} is {there} and {name} {own} is {inner[own]}: two values of one setting; "
                "give it once"
            )
    return found


Settings = TypeVar("Settings", bound=BaseModel)


def checked(kind: type[Settings], values: dict[str, Any], command: str) -> Settings:
    """Checked settings of a command. Raises ``UserError`` that names the first bad one."""
    if unknown := sorted(set(values) - set(kind.model_fields)):
        name = unknown[0].replace("_", "-")
        known = [field.replace("_", "-") for field in kind.model_fields]
        raise UserError(f"unknown setting {name}{nearest(name, known)}; see `{command} --help`")
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        said = FORMS.get(first["type"], first["msg"].lower())
        raise UserError(f"{name.replace('_', '-')}: {said}; see `{command} --help`") from None


# How a value of another form is written in a file.
FORMS = {
    "tuple_type": "must be a list, written [a, b]",
    "dict_type": "must hold settings as `name: value` lines",
    "string_type": "must be a text, written in quotes where it looks like a number",
}
Recipe = TypeVar("Recipe")


def recipe(
    kind: type[Recipe], values: dict[str, Any], what: str, without: Sequence[str] = (), beside: Sequence[str] = ()
) -> Recipe:
    """The dataclass ``kind`` of settings, each in its own type.

    ``what`` names one of them, ``without`` are none of the user's, and ``beside`` may stand beside them in their file.
    Raises ``UserError`` for an unknown one and for one of another type.
    """
    known = {name: hint for name, hint in get_type_hints(kind).items() if name not in without}
    if unknown := sorted(set(values) - set(known)):
        near = nearest(unknown[0], [*known, *beside])
        raise UserError(
            f"unknown {what} {', '.join(unknown)}{near}; choose from {', '.join(sorted([*known, *beside]))}"
        )
    return kind(**{name: typed(f"{what} {name}", value, known[name]) for name, value in values.items()})


KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def typed(what: str, value: Any, hint: Any) -> Any:
    """A setting in its own type, from a flag's text or a YAML value; ``what`` names it in the error.

    YAML takes 3e-4 for a text and 1e6 for no whole number; names stand with commas between them in a flag.
    Raises ``UserError`` for a value of another kind.
    """
    if get_origin(hint) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise UserError(f"{what} must be a list of names, not {value!r}")
        return tuple(str(part).strip() for part in parts if str(part).strip())
    kinds = get_args(hint) or (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    if kind is str and isinstance(value, str):
        return value
    if kind is bool and isinstance(value, bool | str) and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind is int and (type(value) is int or (isinstance(value, str) and value.strip().isdecimal())):
        return int(value)
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if kind is float and not math.isnan(number):
        return number
    if kind is int and number.is_integer():
        return int(number)
    raise UserError(f"{what} must be {KINDS[kind]}, not {value!r}")


def read_settings(path: Path, command: str) -> dict[str, Any]:
    """The settings of ``command`` in a YAML file, dashes in their names as underscores. Raises ``UserError``."""
    return underscored(read_yaml(path, f"the settings of `{command}`"), str(path))


def underscored(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings with underscores in their names, also within recipes. Raises ``UserError`` for one in both forms."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in found:
            raise UserError(f"{where} has {name} twice, as {name} and with a dash; keep one")
        # what an argument of a template holds is the template's own
        inner = isinstance(value, dict) and not where.endswith(f": {ARGUMENTS}")
        found[name] = underscored(value, f"{where}: {name}") if inner else value
    return found


def merged(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file under those of flags, which win; recipes key by key.

    Raises ``UserError`` for something else than a recipe in the file where the flags give one.
    """
    found = {**values, **given}
    for name, value in given.items():
        old = values.get(name)
        if isinstance(value, dict) and old is not None:
            if not isinstance(old, dict):
                raise UserError(f"{name} must hold settings as `name: value` lines, not {old!r}")
            found[name] = {**old, **value}
    return found


def parse_config(values: dict[str, Any]) -> AdaptConfig:
    """Checked settings. Raises ``UserError`` that names the first bad one."""
    return checked(AdaptConfig, values, COMMAND)


def read_config(path: Path, overrides: dict[str, Any] | None = None) -> AdaptConfig:
    """Settings from a YAML file; ``overrides`` (flags that were given) win. Raises ``UserError``."""
    return parse_config(merged(read_settings(path, COMMAND), overrides or {}))


def settled(config: Settings, file: Path, say: Callable[[str], None] | None) -> Settings:
    """The settings with the data type of the run that ``file`` stands for; of one that begins here, of this machine.

    Every run that was begun before there was a choice names its type there. Raises ``UserError``.
    """
    held: Any = config  # every settings model has these two
    stored = str(read_json(file).get("dtype", "bfloat16")) if file.is_file() else None
    if held.dtype != AUTO and stored is not None:
        return config  # a difference is told beside the others
    return config.model_copy(update={"dtype": go_on_with(held.dtype, stored, held.device, say)})


def claim_run(config: AdaptConfig, say: Callable[[str], None] | None = None) -> AdaptConfig:
    """Make the run directory, or check that it belongs to the same settings; the settings with the run's data type.

    Raises ``UserError``.
    """
    config = settled(config, config.out / CONFIG_FILE, say)
    values = json.loads(config.model_dump_json(exclude={"out"})) | {"train": config.train_config().identity()}
    claim_folder(config.out, values, AdaptConfig, {"train": TrainConfig().identity()})
    return config


def claim_folder(
    folder: Path, values: dict[str, Any], kind: type[BaseModel], recipes: Mapping[str, dict[str, Any]]
) -> None:
    """Make a run directory of these settings of ``kind``, or check that it belongs to them. Raises ``UserError``.

    ``recipes`` are those settings that hold settings of their own, with their defaults. What a finished draft is
    exported to may change.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {folder} as run directory: {error.strerror or error}") from None
    path = folder / CONFIG_FILE
    if not path.exists():
        if any(folder.iterdir()):
            raise UserError(f"{folder} holds other files; give a new or empty run directory")
        atomic_write_json(path, values)
        return
    # Settings that are newer than the run directory had their defaults then.
    shown = kind.model_fields
    then = {name: shown[name].get_default(call_default_factory=True) for name in values if name in shown}
    stored = json.loads(json.dumps(then, default=str)) | read_json(path)
    for name, defaults in recipes.items():
        stored[name] = defaults | {key: value for key, value in stored[name].items() if key in defaults}
    changed = sorted(_differences(stored, values, recipes))
    if changed:
        raise UserError(
            f"{folder} belongs to a run with another {', '.join(changed)}; "
            "give another run directory, or the same settings to resume it"
        )


def _differences(stored: dict[str, Any], values: dict[str, Any], recipes: Iterable[str]) -> Iterator[str]:
    """The names of settings that differ, those within a recipe by both names."""
    for key in {*stored, *values} - {*recipes, *REVISABLE}:
        if stored.get(key) != values.get(key):
            yield key
    for key in recipes:
        yield from (f"{key} {name}" for name, value in values[key].items() if stored[key].get(name) != value)
