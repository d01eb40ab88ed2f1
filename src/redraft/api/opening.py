"""Opening targets and drafts by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from redraft.adaptation.models import open_any
from redraft.adaptation.steps import AnyTarget, TargetSpec
from redraft.drafts.opening import AnyDraft, OpenDraft
from redraft.target import Target

Say = Callable[[str], None]


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


def name_of(draft: AnyDraft) -> str:
    """Where a draft came from."""
    return draft.source if isinstance(draft, OpenDraft) else str(draft)


def text_of(place: str | Path | None) -> str | None:
    return None if place is None else str(place)


def path_of(place: str | Path | None) -> Path | None:
    return None if place is None else Path(place)
