"""A run directory belongs to one set of settings: made for them, or checked against them when a run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from redraft.arithmetic import go_on_with
from redraft.artifact import atomic_write_json, read_json
from redraft.drafts.formats.base import check_formats
from redraft.errors import UserError
from redraft.settings.adapt import AdaptConfig
from redraft.settings.base import AUTO
from redraft.settings.distill import DistillConfig
from redraft.settings.training import DistilConfig, PretrainConfig, TrainConfig

CONFIG_FILE = "config.json"
REVISABLE = ("exports",)  # settings that a run may be gone on with otherwise
Held = TypeVar("Held", bound=BaseModel)
Say = Callable[[str], None]


def settled(config: Held, file: Path, say: Say | None) -> Held:
    """The settings with the data type of the run that ``file`` stands for; of one that begins here, of this machine.

    Every run that was begun before there was a choice names its type there. Raises ``UserError``.
    """
    held: Any = config  # every settings model has these two
    stored = str(read_json(file).get("dtype", "bfloat16")) if file.is_file() else None
    if held.dtype != AUTO and stored is not None:
        return config  # a difference is told beside the others
    return config.model_copy(update={"dtype": go_on_with(held.dtype, stored, held.device, say)})


def claim_run(config: AdaptConfig, say: Say | None = None) -> AdaptConfig:
    """Make the run directory, or check that it belongs to the same settings; the settings with the run's data type.

    Raises ``UserError``.
    """
    config.check_needs()
    check_formats(config.exports, "eagle3")
    config = settled(config, config.out / CONFIG_FILE, say)
    values = json.loads(config.model_dump_json(exclude={"out"})) | {"train": config.train_config().identity()}
    claim_folder(config.out, values, AdaptConfig, {"train": TrainConfig().identity()})
    return config


def claim_distill(config: DistillConfig, say: Say | None = None) -> DistillConfig:
    """Make the run directory, or check that it belongs to the same settings; the settings with the run's data types.

    Raises ``UserError``.
    """
    check_formats(config.exports, "standalone")
    file = config.out / CONFIG_FILE
    config = settled(config, file, say)
    defaults = {"pretrain": PretrainConfig().identity(), "align": DistilConfig().identity()}
    if file.is_file():
        # What trains kept its precision whatever the target's type was, before there was a choice.
        stored = read_json(file)
        kept = {name: {key: v for key, v in stored.get(name, {}).items() if key == "precision"} for name in defaults}
        config = config.model_copy(update={name: kept[name] | getattr(config, name) for name in defaults})
    values = json.loads(config.model_dump_json(exclude={"out"}))
    values |= {"pretrain": config.pretrain_config().identity(), "align": config.align_config().identity()}
    # earlier runs name what they never had
    claim_folder(config.out, values | {"bench_prompts": 0}, DistillConfig, defaults)
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
