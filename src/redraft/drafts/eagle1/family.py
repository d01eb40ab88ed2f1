"""The family ``eagle1``, as the registry holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redraft.drafts.base import Draft, Family
from redraft.drafts.eagle1.module import Eagle1Config, Eagle1Draft, fresh_eagle1
from redraft.drafts.eagle1.reading import ARCHITECTURES, kind_of, read
from redraft.drafts.eagle1.writing import WRITERS
from redraft.drafts.formats.reading import Checkpoint
from redraft.registries import FAMILIES


class Eagle1Family(Family):
    """See :class:`redraft.drafts.base.Family`."""

    name = "eagle1"
    writers = WRITERS
    refusal = (
        "an Eagle1 draft reads the target's states and has no file that all engines load alike, which {format} would "
        "be; export it for {choices}"
    )
    architectures = tuple(ARCHITECTURES)

    def build(self, config: dict[str, Any]) -> Draft:
        return Eagle1Draft(Eagle1Config.from_dict(config))

    def fresh(self, target: Any, vocabulary: Sequence[int], seed: int = 0) -> Draft:
        return fresh_eagle1(target, seed)

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return kind_of(checkpoint) is not None

    def read(
        self, checkpoint: Checkpoint, target: Any, notes: list[str], **options: Any
    ) -> tuple[Draft, dict[str, Any]]:
        return read(checkpoint, target, notes, **options)


FAMILIES.register("eagle1")(Eagle1Family())
