"""A run directory belongs to one set of settings: made for them, or checked against them when a run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from redraft.arithmetic import go_on_with
from redraft.artifact import read_sealed, write_sealed
from redraft.drafts.formats.base import check_formats
from redraft.errors import UserError
from redraft.inputs import there
from redraft.locks import contents, held
from redraft.seals import digest, file_digest
from redraft.settings.base import AUTO
from redraft.settings.runs import AdaptConfig, DistillConfig
from redraft.settings.training import DistilConfig, PretrainConfig, TrainConfig

CONFIG_FILE, SETTINGS = "config.json", "redraft.settings/1"
NEW_RUN = "give another run directory, or delete this one and begin anew"
# Settings that a run may be gone on with otherwise. Of servers that is which: all of them serve the target.
REVISABLE = ("exports", "server", "server_model")
Held = TypeVar("Held", bound=BaseModel)
Run = TypeVar("Run", AdaptConfig, DistillConfig)
Say = Callable[[str], None]


def settled(config: Held, file: Path, say: Say | None) -> Held:
    """The settings with the data type of the run that ``file`` stands for; of one that begins here, of this machine.

    Every run that was begun before there was a choice names its type there. Raises ``UserError``.
    """
    held: Any = config  # every settings model has these two
    known = read_sealed(file, None, None, NEW_RUN) if file.is_file() else None
    stored = None if known is None else str(known.get("dtype", "bfloat16"))
    if held.dtype != AUTO and stored is not None:
        return config  # a difference is told beside the others
    return config.model_copy(update={"dtype": go_on_with(held.dtype, stored, held.device, say)})


def claim_run(config: Run, say: Say | None = None) -> Run:
    """Make the run directory, or check that it belongs to the same settings; the settings with the run's data types.

    What a finished draft is exported to may change, and which servers answer, and everything while no stage has written
    a thing: a run that was refused before it began leaves only its settings. Raises ``UserError``.
    """
    with held(config.out, say=say):
        return _claimed(config, say)


def _claimed(config: Run, say: Say | None) -> Run:
    adapts = isinstance(config, AdaptConfig)
    if isinstance(config, AdaptConfig):
        config.check_needs()
    check_formats(config.exports, "eagle3" if adapts else "standalone")
    path = config.out / CONFIG_FILE
    config = settled(config, path, say)
    stored = read_sealed(path, SETTINGS, None, NEW_RUN) if there(path) else {}
    if wrong := [name for name in ("train", "pretrain", "align") if not isinstance(stored.get(name, {}), dict)]:
        raise UserError(f"{path} is damaged: {wrong[0]} holds no settings; give another run directory")
    recipes = {"train": TrainConfig()} if adapts else {"pretrain": PretrainConfig(), "align": DistilConfig()}
    if stored and not adapts:
        # What trains kept its precision whatever the target's type was, before there was a choice.
        kept = {name: {key: v for key, v in stored.get(name, {}).items() if key == "precision"} for name in recipes}
        config = config.model_copy(update={name: kept[name] | getattr(config, name) for name in recipes})
    values = json.loads(config.model_dump_json(exclude={"out"})) | {"bench_prompts": config.bench_prompts}
    values |= {name: config.blocks()[name].identity() for name in recipes}
    if not there(path):
        if contents(config.out):
            raise UserError(f"{config.out} holds other files; give a new or empty run directory")
        write_sealed(path, values, SETTINGS)
        return config
    # Settings that are newer than the run directory had their defaults then.
    fields = type(config).model_fields
    then = {name: fields[name].get_default(call_default_factory=True) for name in values if name in fields}
    before = json.loads(json.dumps(then, default=str)) | stored
    for name, recipe in recipes.items():
        defaults = recipe.identity()
        before[name] = defaults | {key: value for key, value in before[name].items() if key in defaults}
    if changed := sorted(_differences(before, values, recipes)):
        if contents(config.out) == [path] and values.keys() >= stored.keys() > {"target", "exports"}:
            write_sealed(path, values, SETTINGS)
            return config
        raise UserError(
            f"{config.out} belongs to a run with another {', '.join(changed)}; "
            "give another run directory, or the same settings to resume it"
        )
    return config


def _differences(stored: dict[str, Any], values: dict[str, Any], recipes: Iterable[str]) -> Iterator[str]:
    """The names of settings that differ, those within a recipe by both names."""
    for key in {*stored, *values} - {*recipes, *REVISABLE}:
        if stored.get(key) != values.get(key):
            yield key
    if bool(stored.get("server")) != bool(values.get("server")):  # one text in runs from before there were several
        yield "server"
    for key in recipes:
        yield from (f"{key} {name}" for name, value in values[key].items() if stored[key].get(name) != value)


# -- what a finished stage has left ------------------------------------------------------------------------------------
def mark_of(folder: Path) -> str:
    """The mark of the run in a folder, by which its files are told from another run's: that of its settings.

    Raises ``UserError`` for damaged settings.
    """
    return digest(read_sealed(folder / CONFIG_FILE, SETTINGS, None, NEW_RUN))


def fingerprints(root: Path, *folders: str) -> dict[str, str]:
    """By their paths from ``root``, fingerprints of the files in those of the ``folders`` that are there: drafts, whose
    cards may be written again."""
    there = (path for name in folders for path in sorted((root / name).glob("*")) if path.suffix != ".md")
    return {str(path.relative_to(root)): file_digest(path) for path in there if path.is_file()}


def check_files(root: Path, known: dict[str, str], mend: str) -> None:
    """Raise ``UserError`` that names the first file which is gone or no longer as :func:`fingerprints` found it."""
    for name, fingerprint in known.items():
        path = root / name
        try:
            fault = "no longer holds what was written" if file_digest(path) != fingerprint else ""
        except OSError as error:
            fault = f"cannot be read ({error.strerror or error})"
        if fault:
            raise UserError(f"{path} is damaged or another run's: it {fault}; {mend}")
