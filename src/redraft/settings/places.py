"""Whether the files and folders that settings name are there, asked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redraft.errors import UserError
from redraft.settings.base import Settings
from redraft.settings.texts import self_prompts

INSTEAD = {
    "file": "name a file that is there",
    "prompts": "name a file, or datasets:NAME",
    "model": "name a folder, a hub id or embedded:smollm2-135m-instruct",
}


def check_places(settings: Settings) -> None:
    """Raise ``UserError`` that names every file or folder that is not there. Hub ids are left to the hub."""
    if missing := list(dict.fromkeys(_missing(settings))):
        raise UserError("; ".join(missing))


def _missing(settings: Settings) -> Iterator[str]:
    for name, field in type(settings).model_fields.items():
        extra: Any = field.json_schema_extra
        value = getattr(settings, name)
        for text in map(str, value if isinstance(value, tuple) else (value,)):
            if value is not None and extra["reads"] and not _there(text, extra["reads"]):
                yield f"{text} does not exist; {INSTEAD[extra['reads']]}"


def _there(text: str, kind: str) -> bool:
    """Whether the place is there, as far as its name tells where it would be."""
    if kind == "prompts" and (self_prompts(text) or text.startswith("datasets:")):
        return True
    path = Path(text).expanduser()
    if kind == "model" and not path.exists():
        # org/name, or a name alone, may be on the hub
        return text.startswith("embedded:") or not (text.startswith((".", "/", "~")) or text.count("/") > 1)
    return path.exists()
