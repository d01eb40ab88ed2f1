"""A causal language model as training sees it, and the objective of a standalone draft.

Rows of any lengths stand side by side in one long row: linear layers see every token once and nothing else, attention
runs row by row. Works for every Hugging Face causal LM whose attention goes through transformers' interface.

The objective is the draft's words against a teacher's, under any loss: one teacher-forced pass gives the draft's
distribution at every response token (prompts are read and not supervised). Memory does not grow with vocabulary times
sequence: head and loss run over portions of positions. A loss over chains sees, at every position, the ``gamma`` next
ones as the steps of a chain, for that is what a round drafts.

Shape legend: T packed tokens, B rows of equal length, M supervised positions of a batch, N those of a portion, J steps
of a chain, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from redraft.drafts.proposing import Reduce, alone
from redraft.features import FeatureSource
from redraft.losses.portions import Value, portions, sum_over_portions
from redraft.registries import LOSSES
from redraft.rows import TokenRow, anchors, whole_length
from redraft.sampling import scale_logits
from redraft.settings.training import ACTIVATION_GIB, TrainConfig
from redraft.target import Head

# Logits that stand in memory at once, counted in numbers, whatever vocabulary and sequence are. A GPU needs larger
# matrices to be busy: every portion also adds a gradient of the head's size to the sum.
PORTION_NUMBERS = {"cpu": 2**25, "cuda": 2**28}


@contextmanager
def packed(model: Any, lengths: list[int]) -> Iterator[None]:
    """Let ``model`` take rows of these lengths side by side in one: each attends, causally, to itself alone."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        kwargs["is_causal"] = True
        parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
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

    def __init__(self, model: Any, portion_numbers: int | None = None, memory: float = ACTIVATION_GIB) -> None:
        """``memory``: GiB of activations beyond which layers make theirs again in the backward pass."""
        self.memory = memory * 2**30
        self.model = model if hasattr(model, "get_output_embeddings") else model.model
        self.backbone: Any = self.model.base_model
        self.head: Any = self.model.get_output_embeddings()
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
        with packed(self.model, lengths), self.layers_again(lengths):
            found = self.backbone(input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False)
        return found.last_hidden_state[0]

    @contextmanager
    def layers_again(self, lengths: list[int]) -> Iterator[None]:
        """Where rows are long, layers drop their inner states and make them again in the backward pass."""
        if not (torch.is_grad_enabled() and self.model.supports_gradient_checkpointing):
            yield
            return
        config = self.model.config.get_text_config()
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        layer = 4 * (14 * config.hidden_size + 4 * inner)
        if sum(lengths) * layer * config.num_hidden_layers <= self.memory:
            yield
            return
        # They attend in the backward pass as they did.
        contexts = lambda: (nullcontext(), packed(self.model, lengths))  # noqa: E731
        how = {"use_reentrant": False, "preserve_rng_state": True, "context_fn": contexts}
        model = self.model  # the newer name, where transformers has it
        start = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        stop = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        start(how)
        try:
            yield
        finally:
            stop()

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., V] of final-norm states [..., H], with the model's own scaling and soft cap."""
        return scale_logits(self.head(states), self.model.config)

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


# -- the objective -----------------------------------------------------------------------------------------------------
TeacherLogits = Callable[[Tensor], Tensor]
"""Indices [N] into the supervised positions of some rows -> the teacher's logits [N, V] there."""


class Teacher(Protocol):
    """``of(rows, device)`` gives the teacher's logits at the supervised positions of rows, in their order."""

    @property
    def vocab_size(self) -> int: ...

    def of(self, rows: Sequence[Any], device: torch.device) -> TeacherLogits: ...


class StateTeacher:
    """The target's distribution, from its states through its head."""

    def __init__(self, target: Head, source: FeatureSource) -> None:
        self.target, self.source, self.vocab_size = target, source, target.vocab_size

    def of(self, rows: Sequence[TokenRow], device: torch.device) -> TeacherLogits:
        """See :class:`Teacher`."""
        hidden_MH = torch.cat([self.source.get(row)[1] for row in rows]).to(self.target.device)

        def logits(index_N: Tensor) -> Tensor:
            with torch.no_grad():
                return self.target.scale_logits(self.target.head(hidden_MH[index_N.to(hidden_MH.device)])).to(device)

        return logits


def size(row: TokenRow) -> int:
    return whole_length(row)


class Distillation:
    """The loss of some rows against their teacher, for any loss of the registry."""

    def __init__(self, causal: CausalModel, teacher: Teacher, loss: str, gamma: int, reduce: Reduce = alone) -> None:
        """``reduce`` adds batch statistics over workers. Raises ``UserError`` for an unknown loss."""
        self.causal, self.teacher, self.reduce = causal, teacher, reduce
        self.loss = LOSSES.get(loss)
        self.chained = hasattr(self.loss, "chain")
        self.steps = gamma if self.chained else 1
        # Tables of embeddings are padded to round sizes: nobody ever says the ids behind the smaller one.
        self.vocabulary = min(causal.vocab_size, teacher.vocab_size)

    def states(self, rows: Sequence[TokenRow]) -> list[Tensor]:
        """States [M, H] of the positions that predict a response token after the first; for a chain of J steps J
        tensors, of which number j holds the states j positions on (and anything behind the end of a row)."""
        states_TH = self.causal.states([[*row.prompt_ids, *row.response_ids[:-1]] for row in rows])
        places = torch.arange(len(states_TH), device=states_TH.device).split([size(row) - 1 for row in rows])
        index_M = torch.cat([place[len(row.prompt_ids) :] for place, row in zip(places, rows, strict=True)])
        return [states_TH[(index_M + j).clamp(max=len(states_TH) - 1)] for j in range(self.steps)]

    def inside(self, rows: Sequence[TokenRow]) -> Tensor:
        """Whether step j of the chain that begins at a position is in its row, [M, J], bool."""
        left_M = torch.cat([torch.arange(anchors(row), 0, -1) for row in rows])
        return (left_M[:, None] > torch.arange(self.steps)).to(self.causal.device)

    def pairs(self, rows: Sequence[TokenRow]) -> int:
        """How many pairs of a position and a step count."""
        return int(self.inside(rows).sum())

    def __call__(self, rows: Sequence[TokenRow], count: int, statistics: Tensor | None = None) -> Tensor:
        """The rows' sum of the loss over ``count``, the pairs of the whole step. ``statistics`` are the step's, where
        these rows are not all of it."""
        states, loss = self.states(rows), self.loss
        teacher, inside_MJ = self.teacher.of(rows, self.causal.device), self.inside(rows)
        if hasattr(loss, "statistics"):
            if statistics is None:  # these rows are the whole step
                statistics = self.reduce(self.sums(states, teacher, inside_MJ))
            loss = partial(loss, statistics=statistics)

        def value(part: slice, states: list[Tensor]) -> Tensor:
            draft, theirs = self.logits(part, states, teacher, inside_MJ[part])
            if self.chained:
                return self.loss.chain(draft, theirs, inside_MJ[part].float() / count)
            return loss(draft[0], theirs[0])[0] / count

        return self.causal.portioned(value, states)

    def logits(
        self, part: slice, states: Sequence[Tensor], teacher: TeacherLogits, inside_NJ: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Step by step the draft's and the teacher's logits [N, V] of the positions of a portion that reach it."""
        draft, theirs = [], []
        for step, states_NH in enumerate(states):
            index = inside_NJ[:, step].nonzero().squeeze(-1)
            draft.append(self.causal.logits(states_NH[index])[..., : self.vocabulary])
            theirs.append(teacher(index + part.start + step)[..., : self.vocabulary])
        return draft, theirs

    def sums(self, states: Sequence[Tensor], teacher: TeacherLogits, inside_MJ: Tensor) -> Tensor:
        """The loss's own statistics over these positions."""
        with torch.no_grad():
            slices = self.causal.slices(len(inside_MJ))
            logits = (self.logits(part, [s[part] for s in states], teacher, inside_MJ[part]) for part in slices)
            return torch.stack([self.loss.statistics(draft[0], theirs[0]) for draft, theirs in logits]).sum(0)

    def statistics(self, micro: Sequence[Sequence[TokenRow]]) -> Tensor | None:
        """Statistics over the micro-batches of a step and all workers, in a pass of its own; None where the loss
        needs none, and where there is one micro-batch, which then sees to it itself."""
        if not hasattr(self.loss, "statistics") or len(micro) < 2:
            return None
        with torch.no_grad():
            parts = ((rows, self.teacher.of(rows, self.causal.device)) for rows in micro)
            sums = [self.sums(self.states(rows), teacher, self.inside(rows)) for rows, teacher in parts]
            return self.reduce(torch.stack(sums).sum(0))


@dataclass
class TextBatch:
    """Rows, and where the target's states of them are."""

    rows: Sequence[TokenRow]
    features: FeatureSource

    def to(self, device: torch.device) -> TextBatch:
        """The same: what goes to a device is made of it there."""
        return self


class StandaloneObjective:
    """See :class:`redraft.drafts.proposing.Objective`: every position counts the same."""

    def __init__(self, draft: Any, target: Head, config: TrainConfig, reduce: Reduce = alone) -> None:
        """Raises ``UserError`` for an unknown loss."""
        self.causal = CausalModel(draft.model, memory=config.activation_memory)
        self.target, self.config, self.reduce = target, config, reduce
        LOSSES.get(config.loss)

    def collate(
        self, rows: Sequence[TokenRow], features: FeatureSource, weights: Mapping[str, Tensor] | None = None
    ) -> TextBatch:
        assert weights is None
        return TextBatch(rows, features)

    def __call__(self, batch: TextBatch) -> Tensor:
        """The mean loss over the supervised positions of ``batch``, or over the steps of the chains there."""
        teacher = StateTeacher(self.target, batch.features)
        distillation = Distillation(self.causal, teacher, self.config.loss, self.config.gamma, self.reduce)
        count = self.reduce(torch.tensor(float(distillation.pairs(batch.rows)), device=self.causal.device))
        return distillation(batch.rows, int(count))
