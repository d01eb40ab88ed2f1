"""The ends of a target: embedding, final norm and output head. With stored states they are all that training reads.

Shape legend: H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redraft.sampling import scale_logits
from redraft.target.facts import Facts


class Head(Facts):
    """A frozen target without its layers: what turns states into logits, and tokens into embeddings.

    ``embedding`` is the table as it lies in the file, ``norm`` the norm before the head, ``head`` the output layer.
    """

    def __init__(self, facts: Facts, embedding: Any, norm: Any, head: Any) -> None:
        super().__init__(**_parts(facts), fingerprint=facts.content_hash)
        self.embedding, self.norm, self.head = embedding, norm, head

    @property
    def facts(self) -> Facts:
        """The facts alone, which hold no weights."""
        known = self.content_hash()
        return Facts(**_parts(self), fingerprint=lambda: known, device=self.device)

    @property
    def head_part(self) -> Head:
        """The ends alone: whoever keeps no more than this lets go of the layers."""
        return Head(self.facts, self.embedding, self.norm, self.head)

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return int(self.head.weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final-norm states [..., H], with the model's own scaling and soft cap."""
        return self.scale_logits(self.head(hidden))

    def scale_logits(self, logits: Tensor) -> Tensor:
        """The head's output with the scaling and soft cap that the config names."""
        return scale_logits(logits, self.config)


def _parts(facts: Facts) -> dict[str, Any]:
    names = ("name", "tokenizer", "generation", "notes", "rounding")
    return {"config": facts.whole_config} | {name: getattr(facts, name) for name in names}
