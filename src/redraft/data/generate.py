"""Batched in-process generation by the target: token ids in, token ids out.

Continuous batching: a fixed number of slots, each with its own length. A finished sequence frees its slot at
once; freed slots are refilled by groups of waiting prompts of similar length, so that neither finished rows nor
padding cost a forward pass.

Shape legend: B slots, T tokens, C cached tokens, H heads, G query heads a key head, D head width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from redraft.sampling import Sampler, draw, warp
from redraft.target import Target


@dataclass(frozen=True)
class Request:
    """One prompt to be answered: its key, its token ids and the sampling rule."""

    key: str
    prompt_ids: Sequence[int]
    sampler: Sampler
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """The answer to a request. ``finish_reason`` is ``stop`` (an end token, kept in the ids) or ``length``."""

    request: Request
    response_ids: list[int]
    finish_reason: str


def request_uniforms(request: Request, count: int) -> Tensor:
    """The uniforms [count] that a request draws with: a function of its key, sampler and seed alone."""
    text = f"{request.key}|{request.sampler}|{request.seed}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One query a row as two batched products on the key heads; anything wider goes to the stock kernel.

    The stock CPU kernel is made for long queries: for 128 rows of 300 tokens it takes 3.0 ms where these two
    products take 1.6.
    """
    batch, query_heads, length, width = query.shape
    if length != 1 or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    heads, cached = key.shape[1], key.shape[2]
    scores = torch.bmm(
        query.reshape(batch * heads, query_heads // heads, width),
        key.view(batch * heads, cached, width).transpose(1, 2),
    ).float() * (scaling if scaling is not None else 1 / math.sqrt(width))
    if attention_mask is not None:
        scores = scores.view(batch, query_heads, 1, cached).masked_fill_(~attention_mask, float("-inf"))
    weights = scores.softmax(-1).to(value.dtype).view(batch * heads, query_heads // heads, cached)
    mixed = torch.bmm(weights, value.view(batch * heads, cached, value.shape[-1]))
    return mixed.view(batch, 1, query_heads, -1), None


AttentionInterface.register("redraft_decode", _decode_attention)


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, H, C, D]; every slot is written at its own length."""

    def __init__(self, slots: _Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.slots.size, key_states.shape[1], self.slots.capacity)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        rows, at = self.slots.rows, self.slots.lengths
        self.keys[rows, :, at] = key_states[:, :, 0]
        self.values[rows, :, at] = value_states[:, :, 0]
        # Whole buffers, not slices: the batched product over a strided slice is four times slower than the few
        # masked columns beyond the longest row cost.
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.capacity, 0

    def get_seq_length(self) -> int:
        return self.slots.capacity

    def get_max_length(self) -> int:
        return self.slots.capacity


class _Slots:
    """The sequences in flight."""

    def __init__(self, target: Target, size: int, capacity: int, max_new_tokens: int) -> None:
        self.target, self.size, self.capacity, self.max_new_tokens = target, size, capacity, max_new_tokens
        device = target.device
        self.rows = torch.arange(size, device=device)
        self.lengths = torch.zeros(size, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(size, max_new_tokens, dtype=torch.float64)
        self.requests: list[Request | None] = [None] * size
        self.responses: list[list[int]] = [[] for _ in range(size)]
        self.layers = [_SlotLayer(self) for _ in range(target.layers)]
        self.cache = Cache(layers=self.layers)
        self.logits_BV = torch.zeros(size, target.vocab_size, dtype=target.dtype, device=device)

    def free(self) -> list[int]:
        return [row for row, request in enumerate(self.requests) if request is None]

    def admit(self, group: Sequence[Request], rows: Sequence[int]) -> None:
        """Prefill a group, padded on the right so that the plain causal mask holds, and copy it into its slots."""
        lengths = [len(r.prompt_ids) for r in group]
        ids_BT = torch.zeros(len(group), max(lengths), dtype=torch.long)
        for i, request in enumerate(group):
            ids_BT[i, : lengths[i]] = torch.tensor(list(request.prompt_ids))
        prompt_cache = self.target.new_cache(max(lengths))
        step = self.target.forward(ids_BT.to(self.target.device), prompt_cache, taps=False)
        ends = torch.tensor(lengths, device=self.target.device)
        last_BH = step.hidden_BTH[torch.arange(len(group), device=ends.device), ends - 1]
        index = torch.tensor(rows, device=ends.device)
        self.logits_BV[index] = self.target.logits(last_BH)
        for layer, filled in zip(self.layers, prompt_cache.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(filled.keys, filled.values)
            layer.keys[index, :, : max(lengths)] = filled.keys[:, :, : max(lengths)]
            layer.values[index, :, : max(lengths)] = filled.values[:, :, : max(lengths)]
        self.lengths[index] = ends
        for row, request in zip(rows, group, strict=True):
            self.requests[row], self.responses[row] = request, []
            self.uniforms[row] = request_uniforms(request, self.max_new_tokens)

    def choose(self) -> list[int]:
        """The next token of every slot, by its own sampler and its own uniforms."""
        tokens_B = self.logits_BV.argmax(-1)
        groups: dict[Sampler, list[int]] = {}
        for row, request in enumerate(self.requests):
            if request is not None and not request.sampler.greedy:
                groups.setdefault(request.sampler, []).append(row)
        for sampler, rows in groups.items():
            step = torch.tensor([len(self.responses[r]) for r in rows])
            uniforms = self.uniforms[torch.tensor(rows), step].to(tokens_B.device)
            tokens_B[rows] = draw(warp(self.logits_BV[rows], sampler), uniforms)
        return tokens_B.tolist()

    def advance(self, tokens: list[int]) -> None:
        """Feed one token to every slot. Idle slots are fed too; what they compute is never read."""
        idle = self.free()
        self.lengths[idle] = 0
        mask_BC = torch.arange(self.capacity, device=self.lengths.device) <= self.lengths[:, None]
        ids_B1 = torch.tensor(tokens, device=self.lengths.device)[:, None]
        step = self.target.forward(ids_B1, self.cache, self.lengths[:, None], mask_BC[:, None, None], taps=False)
        self.logits_BV = self.target.logits(step.hidden_BTH[:, -1])
        self.lengths += 1


def _check(target: Target, requests: Sequence[Request], max_new_tokens: int) -> None:
    for request in requests:
        if not request.prompt_ids or len(request.prompt_ids) + max_new_tokens > target.context:
            raise ValueError(f"prompt {request.key}: {len(request.prompt_ids)} tokens do not fit")


@torch.inference_mode()
def generate(
    target: Target, requests: Sequence[Request], max_new_tokens: int, batch_size: int = 64
) -> Iterator[Completion]:
    """Answer every request; completions come as they finish, not in the order of the requests.

    Raises ``ValueError`` for an empty prompt or one that leaves no room for a response; callers check user input
    first.
    """
    _check(target, requests, max_new_tokens)
    waiting = sorted(requests, key=lambda r: len(r.prompt_ids), reverse=True)
    if not waiting:
        return
    size = min(batch_size, len(waiting))
    slots = _Slots(target, size, len(waiting[0].prompt_ids) + max_new_tokens, max_new_tokens)
    group, ends = max(1, size // 8), set(target.eos_ids)
    previous = target.model.config._attn_implementation
    target.model.set_attn_implementation("redraft_decode")
    try:
        while True:
            free = slots.free()
            while waiting and len(free) >= min(group, len(waiting)):
                batch = [waiting.pop() for _ in range(min(group, len(waiting)))]
                slots.admit(batch, free[: len(batch)])
                free = free[len(batch) :]
            if len(free) == size:
                return
            tokens = slots.choose()
            for row, request in enumerate(slots.requests):
                if request is None:
                    continue
                response = slots.responses[row]
                response.append(tokens[row])
                if tokens[row] in ends or len(response) == max_new_tokens:
                    slots.requests[row] = None
                    yield Completion(request, response, "stop" if tokens[row] in ends else "length")
            if len(slots.free()) < size:
                slots.advance(tokens)
    finally:
        target.model.set_attn_implementation(previous)
