"""The family ``standalone``, as the registry holds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redraft.drafts.base import Draft, Family
from redraft.drafts.formats.reading import Checkpoint
from redraft.drafts.standalone.folder import OTHER_BYTES, OTHER_FILES, WEIGHTS_FILE, read_beside, write_beside
from redraft.drafts.standalone.gguf import GgufWriter
from redraft.drafts.standalone.module import build
from redraft.drafts.standalone.reading import check_passes, read, recognises
from redraft.drafts.standalone.shapes import fresh_standalone
from redraft.drafts.standalone.writing import ModelWriter
from redraft.registries import FAMILIES
from redraft.target import Target


class StandaloneFamily(Family):
    """See :class:`redraft.drafts.base.Family`. A whole draft is saved with its private parts merged."""

    name = "standalone"
    reads_states = False
    writers = {"hf": ModelWriter(), "gguf": GgufWriter()}
    refusal = (
        "{format} is for drafts that read the target's states; a standalone draft is a language model of its own, "
        "which every engine loads as hf; export hf"
    )
    takes_any = True
    weights_file = WEIGHTS_FILE
    other_files = OTHER_FILES
    other_bytes = OTHER_BYTES

    def build(self, config: dict[str, Any]) -> Draft:
        return build(config)

    def fresh(self, target: Any, vocabulary: Sequence[int], seed: int = 0) -> Draft:
        return fresh_standalone(target, seed=seed)

    def storable(self, draft: Any) -> Draft:
        return draft.merged()

    def write_beside(self, folder: Path, draft: Any) -> None:
        write_beside(folder, draft)

    def read_beside(self, folder: Path, draft: Any) -> None:
        read_beside(folder, draft)

    def check_usable(self, draft: Any, source: str) -> None:
        check_passes(Target(draft.model, taps=()), source)
        draft.model.requires_grad_(True)

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return recognises(checkpoint)

    def read(
        self, checkpoint: Checkpoint, target: Any, notes: list[str], **options: Any
    ) -> tuple[Draft, dict[str, Any]]:
        return read(checkpoint, notes)


FAMILIES.register("standalone")(StandaloneFamily())
