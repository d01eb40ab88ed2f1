"""Opening targets and drafts by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from redraft.adaptation.models import AnyTarget, TargetSpec, open_any
from redraft.drafts.opening import AnyDraft, OpenDraft
from redraft.settings.base import Settings
from redraft.target import Target

Say = Callable[[str], None]
Kind = TypeVar("Kind", bound=Settings)


def open_target(
    target: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    adapter: str | None = None,
    template_arg: Mapping[str, Any] | None = None,
) -> Target:
    """The frozen target with its tokenizer.

    ``dtype`` is bfloat16, float32 or auto, the one that this machine is faster in; ``adapter`` a PEFT adapter to merge
    in; ``template_arg`` are arguments of its chat template.

        target = redraft.open_target("my-model", device="cuda", template_arg={"enable_thinking": False})
    """
    return TargetSpec(str(target), dtype, device, adapter, template_arg or {}).open()


def open_draft(draft: AnyDraft, target: AnyTarget, *, base_draft: AnyDraft | None = None) -> OpenDraft:
    """A draft of any family and format in float32, bound to its target: ``.draft`` is the module, ``.meta`` its record.

    A private part needs ``base_draft``, the shared draft that it was trained on.

        stale = redraft.open_draft("old-draft", target)
    """
    return open_any(draft, TargetSpec.of(target).open(), base_draft)


def checked(kind: type[Kind], given: Mapping[str, Any], **more: Any) -> Kind:
    """The settings of a command among the arguments ``given`` of a function, each in its type.

    Opened targets and drafts stand there by name. Raises ``UserError`` that tells all mistakes.
    """
    known = {name: value for name, value in {**given, **more}.items() if name in kind.model_fields}
    return kind(**{name: name_of(value) for name, value in known.items() if value is not None})


def name_of(given: Any) -> Any:
    """What an opened target or draft is called; anything else as it is, paths as texts."""
    if isinstance(given, OpenDraft):
        return given.source or "the opened draft"
    if isinstance(given, TargetSpec | Target):
        return TargetSpec.of(given).name or "the opened target"
    return str(given) if isinstance(given, Path) else given
