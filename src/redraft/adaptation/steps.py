"""What the single steps work on, by name or opened already: the target, its facts, a draft; and where output goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from redraft.adaptation.models import (
    contestants,
    open_target,
    settle_template,
)
from redraft.arithmetic import choose_dtype
from redraft.data.template import settings_of
from redraft.drafts.base import Draft
from redraft.errors import UserError
from redraft.loading.targets import open_facts, open_head, read_facts
from redraft.settings.base import AUTO
from redraft.target import Facts, Head, Target


@dataclass(frozen=True)
class TargetSpec:
    """A target by name, with how to open it. ``opened`` is the target itself where it is open already.

    ``name`` is a folder, a hub id or the folder of a PEFT adapter, ``dtype`` bfloat16, float32 or auto, ``device`` a
    torch device, ``adapter`` a PEFT adapter to merge in, ``template_args`` arguments of the chat template.
    """

    name: str
    dtype: str = AUTO
    device: str = "cpu"
    adapter: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    opened: Target | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, target: AnyTarget) -> TargetSpec:
        """A name in the default settings, an opened target in its own, or the spec that it is already."""
        if isinstance(target, TargetSpec):
            return target
        if not isinstance(target, Target):
            return cls(str(target))
        name, _, adapter = target.name.partition(" + ")  # as loading calls a base with its adapter
        dtype = str(target.dtype).removeprefix("torch.")
        arguments = settings_of(target.tokenizer).arguments
        return cls(name, dtype, str(target.device), adapter or None, arguments, target)

    def open(self, dtype: str | None = None, served: bool = False) -> Target:
        """Load it, in another ``dtype`` if one is given; ``served`` as :func:`open_target`. Raises ``UserError``."""
        if self.opened is not None and dtype in (None, self.dtype):
            return self.opened
        chosen = choose_dtype(dtype or self.dtype, self.device, print)
        target = open_target(self.name, chosen, self.device, self.adapter, self.template_args, served=served)
        if dtype is None:
            print(f"target {self.name}: {target.verdict()}", flush=True)
            for note in target.notes:
                print(f"note on {self.name}: {note}", flush=True)
        return target

    def head(self, dtype: str) -> Head:
        """Its head alone, for who computes with stored states. Raises ``UserError``."""
        if self.opened is not None:
            return self.open(dtype)
        found = open_head(self.name, getattr(torch, dtype), self.device, self.adapter)
        settle_template(found.tokenizer, self.template_args)
        return found

    def facts(self) -> Facts:
        """What is known of it, where nothing is computed with it here. Raises ``UserError``."""
        if self.opened is not None:
            return self.opened.facts
        found = open_facts(self.name, self.adapter)
        settle_template(found.tokenizer, self.template_args)
        return found


AnyTarget = str | Path | TargetSpec | Target
"""A target by name, with settings of its own, or opened."""


def check_output(path: Path, suffix: str = "") -> None:
    """Raise ``UserError`` before any work when ``path`` cannot be the file that the work ends with."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file{f' ending in {suffix}' if suffix else ''}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def target_info(target: AnyTarget) -> Facts:
    """The facts about a target that a draft must fit, without loading its weights. Raises ``UserError``."""
    spec = TargetSpec.of(target)
    return read_facts(spec.name, tokenizer=False) if spec.opened is None else spec.opened.facts


def timed_targets(target: Target, draft: Draft, dtype: str, open_as: Callable[[str], Target]) -> dict[str, Target]:
    """The target in the data types that it may be served in, each tapped where the draft reads."""
    found = contestants(target, dtype, open_as)
    if draft.taps:
        for each in found.values():
            each.tap(draft.taps)
    return found
