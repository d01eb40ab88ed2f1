"""The target of an adapter as one ordinary checkpoint, which is what serving engines load beside a draft."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import torch

from redraft.drafts.formats.base import MERGED, exported_as
from redraft.errors import UserError
from redraft.files import atomic_folder
from redraft.loading import config_at, load_target, locate, quiet
from redraft.loading.merged import merged_bytes, write_merged
from redraft.loading.places import CACHE_FILES, split_adapter
from redraft.loading.targets import plain_target


def merge_target_folder(target: str, adapter: str | None, out: Path) -> Path:
    """Write ``target`` with ``adapter`` merged in, its tokenizer and its generation settings: all of it or nothing.

    ``target`` may be an adapter by itself.

    In the data type of the target's checkpoint, and in the memory of one layer where the adapter can be merged so.
    Raises ``UserError`` when one of them cannot be loaded, the adapter does not fit, or the folder holds other files.
    """
    base, adapter = split_adapter(target, adapter)
    if adapter is None:
        raise UserError(f"{target} is no adapter and has nothing to merge; name one with --adapter")
    with quiet():
        dtype = getattr(config_at(locate(base), base), "dtype", None) or torch.float32
    if (plain := plain_target(base, adapter)) is not None:
        with atomic_folder(out, merged_bytes(plain, dtype), CACHE_FILES, no_draft) as folder:
            write_merged(plain, folder, dtype)
        return out
    opened = load_target(base, dtype, "cpu", adapter=adapter)
    weights = {id(weight): weight for weight in opened.model.state_dict().values()}
    size = sum(w.numel() * w.element_size() for w in weights.values())
    with atomic_folder(out, size, CACHE_FILES, no_draft) as folder:
        opened.save(folder)
    return out


def no_draft(folder: Path) -> None:
    """Raise ``UserError`` for a folder that holds an exported draft, which has the files of a model."""
    if (found := exported_as(folder)) is not None:
        raise UserError(f"{folder} holds a draft that was exported as {found}; name a new or empty folder")


def adapter_note(target: str, adapter: str | None = None) -> str | None:
    """How to serve a target that is an adapter, by itself or with ``adapter``; ``None`` for any other target."""
    base, adapter = split_adapter(target, adapter)
    if adapter is None:
        return None
    command = f"redraft merge-target --target {shlex.quote(base)} --adapter {shlex.quote(adapter)} --out {MERGED}"
    return f"the target is an adapter; engines serve it merged: `{command}` writes {MERGED}"


def served(line: str, target: str, adapter: str | None = None) -> str:
    """The ``line`` that starts an engine, with the merged target in the place of an adapter."""
    if adapter_note(target, adapter) is None:
        return line
    # An opened target with an adapter is called by both.
    for name in (f"{target} + {adapter}", target):
        alone = rf"(?<![\w./:-]){re.escape(shlex.quote(name))}(?![\w./:-])"  # no part of a longer name
        line = re.sub(alone, MERGED, line)
    return line


def merging(target: str, adapter: str | None = None) -> list[str]:
    """The command that must come before serving, where the target is an adapter."""
    note = adapter_note(target, adapter)
    return [note.split("`")[1]] if note else []
