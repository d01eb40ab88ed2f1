"""What the single steps work on, by name or opened already: the target, its facts, a draft; and where output goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from redraft.adaptation.models import (
    OpenDraft,
    contestants,
    open_target,
    use_target_embedding,
)
from redraft.adaptation.stages import half
from redraft.arithmetic import AUTO, choose_dtype
from redraft.artifact import (
    META_FILE,
    load_draft,
    load_private,
    read_json,
    tensors_hash,
)
from redraft.data.template import settings_of
from redraft.drafts.base import Proposer
from redraft.drafts.standalone import StandaloneDraft
from redraft.errors import UserError
from redraft.export import TargetInfo, import_checkpoint
from redraft.export.importer import is_language_model
from redraft.loading import (
    ADAPTER_FILE,
    adapter_base,
    locate,
    notes_of,
    one_line,
    quiet,
    read_standalone,
)
from redraft.target import Target


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
            for note in notes_of(target):
                print(f"note on {self.name}: {note}", flush=True)
        return target


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


def target_info(target: AnyTarget) -> TargetInfo:
    """The facts about a target that a draft must fit, without loading its weights. Raises ``UserError``."""
    spec = TargetSpec.of(target)
    if spec.opened is not None:
        return TargetInfo.of(spec.opened)
    name = spec.name
    base = adapter_base(name) if (Path(name) / ADAPTER_FILE).is_file() else name
    with quiet(), one_line(f"the config of {base}"):
        config = AutoConfig.from_pretrained(**locate(base))
    return TargetInfo.of(config, name)


def read_draft(
    source: str | Path | OpenDraft, info: TargetInfo | None, base: str | Path | OpenDraft | None = None
) -> tuple[Proposer, dict[str, Any]]:
    """A draft in the types of its file: own format, a private part on ``base``, or a public checkpoint.

    One that is open already comes in bfloat16. ``info`` is needed for public checkpoints of drafts that read the
    target's states alone. Raises ``UserError``.
    """
    if isinstance(source, OpenDraft):
        return half(source.draft), source.meta
    if is_language_model(source):
        return read_standalone(source, base.source if isinstance(base, OpenDraft) else base)
    folder = Path(source)
    if (folder / META_FILE).is_file():
        if read_json(folder / META_FILE).get("kind") != "private":
            return load_draft(folder)
        if base is None:
            raise UserError(f"{source} is a private part; name the draft that it belongs to with --base-draft")
        shared, _ = read_draft(base, info)
        if isinstance(shared, StandaloneDraft):
            raise UserError(f"{base} is a language model of its own, and {source} no private part of one")
        base_hash = tensors_hash(shared.state_dict())
        sizes: Any = info  # of the target's facts, only its width is read
        return load_private(folder, use_target_embedding(shared, sizes) if info else shared, base_hash)
    if info is None:
        raise UserError(f"{source} is not in redraft's own format; give --target, whose sizes it must fit")
    return import_checkpoint(source, info)


def timed_targets(target: Target, draft: Proposer, dtype: str, open_as: Callable[[str], Target]) -> dict[str, Target]:
    """The target in the data types that it may be served in, each tapped where the draft reads."""
    found = contestants(target, dtype, open_as)
    if not isinstance(draft, StandaloneDraft):
        for each in found.values():
            each.tap(draft.config.taps)
    return found
