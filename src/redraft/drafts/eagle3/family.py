"""The family ``eagle3``, as the registry holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redraft.drafts.base import Draft, Family
from redraft.drafts.eagle3.module import Eagle3Config, Eagle3Draft, fresh_draft
from redraft.drafts.eagle3.reading import ARCHITECTURES, read, recognises
from redraft.drafts.eagle3.writing import WRITERS
from redraft.drafts.formats.reading import Checkpoint
from redraft.registries import FAMILIES


class Eagle3Family(Family):
    """See :class:`redraft.drafts.base.Family`."""

    name = "eagle3"
    writers = WRITERS
    refusal = (
        "this draft reads the target's states and is no language model, which {format} is for; export it for {choices}"
    )
    architectures = ARCHITECTURES

    def build(self, config: dict[str, Any]) -> Draft:
        return Eagle3Draft(Eagle3Config.from_dict(config))

    def fresh(self, target: Any, vocabulary: Sequence[int], seed: int = 0) -> Draft:
        return fresh_draft(target, vocabulary, seed)

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return recognises(checkpoint)

    def read(
        self, checkpoint: Checkpoint, target: Any, notes: list[str], **options: Any
    ) -> tuple[Draft, dict[str, Any]]:
        return read(checkpoint, target, notes, **options)


FAMILIES.register("eagle3")(Eagle3Family())
