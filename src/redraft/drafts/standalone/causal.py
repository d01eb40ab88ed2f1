"""A causal language model as training sees it: states of packed rows, logits of chosen states, loss without padding.

Rows of any lengths stand side by side in one long row: linear layers see every token once and nothing else, attention
runs row by row. Works for every Hugging Face causal LM whose attention goes through transformers' interface.

Shape legend: T packed tokens, B rows of equal length, N chosen positions, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from redraft.losses.portions import Value, portions, sum_over_portions
from redraft.sampling import scale_logits

# Logits that stand in memory at once, counted in numbers, whatever vocabulary and sequence are. A GPU needs larger
# matrices to be busy: every portion also adds a gradient of the head's size to the sum.
PORTION_NUMBERS = {"cpu": 2**25, "cuda": 2**28}


@contextmanager
def packed(model: Any, lengths: Sequence[int]) -> Iterator[None]:
    """Let ``model`` take rows of these lengths side by side in one: each attends, causally, to itself alone."""
    sizes = list(lengths)

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        kwargs["is_causal"] = True
        parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
        mixed = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in parts]
        return torch.cat(mixed, dim=1), None

    # No mask function goes by this name, so transformers makes no mask of the whole row.
    AttentionInterface.register("redraft_packed", attention)
    previous = model.config._attn_implementation
    model.set_attn_implementation("redraft_packed")
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


class CausalModel:
    """A Hugging Face causal LM behind the few calls that training needs. ``model`` is the LM or a wrapper with it
    as ``.model`` that is no LM itself."""

    def __init__(self, model: Any, portion_numbers: int | None = None) -> None:
        self.model = model if hasattr(model, "get_output_embeddings") else model.model
        self.backbone: Any = self.model.base_model
        self.head: Any = self.model.get_output_embeddings()
        self.config: Any = self.model.config
        self.portion_numbers = portion_numbers or PORTION_NUMBERS.get(self.device.type, 2**25)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def vocab_size(self) -> int:
        return int(self.head.weight.shape[0])

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters that require a gradient by name, without the backbone's prefix; tied ones once."""
        prefix = f"{self.model.base_model_prefix}."
        return [(n.removeprefix(prefix), p) for n, p in self.model.named_parameters() if p.requires_grad]

    def states(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Final-norm states [T, H] of rows of token ids, one behind the other."""
        lengths = [len(row) for row in rows]
        ids_T = torch.tensor([i for row in rows for i in row], device=self.device)
        positions_T = torch.cat([torch.arange(n, device=self.device) for n in lengths])
        with packed(self.model, lengths):
            return self.backbone(
                input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False
            ).last_hidden_state[0]

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., V] of final-norm states [..., H], with the model's own scaling and soft cap."""
        return scale_logits(self.head(states), self.config)

    def slices(self, count: int, copies: int = 1) -> list[slice]:
        """``count`` positions in portions whose logits, ``copies`` times over, keep to ``portion_numbers``."""
        return portions(count, max(1, self.portion_numbers // (copies * self.vocab_size)))

    def portioned(self, value: Value, states: Sequence[Tensor]) -> Tensor:
        """The sum of ``value`` over portions of positions; see :func:`redraft.losses.portions.sum_over_portions`."""
        head = [p for p in self.head.parameters() if p.requires_grad]
        return sum_over_portions(value, self.slices(len(states[0]), len(states)), states, head)

    def block_loss(self, block_BT: Tensor) -> Tensor:
        """Sum of the next-token cross-entropy over blocks [B, T + 1] of text, which need no filling up."""
        block_BT = block_BT.to(self.device)
        labels_N = block_BT[:, 1:].flatten()
        found = self.backbone(input_ids=block_BT[:, :-1], use_cache=False)

        def value(part: slice, states: list[Tensor]) -> Tensor:
            return F.cross_entropy(self.logits(states[0]).float(), labels_N[part], reduction="sum")

        return self.portioned(value, [found.last_hidden_state.flatten(0, 1)])
