"""Batched in-process generation by the target: token ids in, token ids out.

Continuous batching: a fixed number of slots, each with its own length. A finished sequence frees its slot at
once; freed slots are refilled by groups of waiting prompts of similar length, so that neither finished rows nor
padding cost a forward pass.

Shape legend: B slots, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redraft.sampling import Sampler, draw, warp
from redraft.slots import SlotCache, slot_attention
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


class _Slots:
    """The sequences in flight."""

    def __init__(self, target: Target, size: int, capacity: int, max_new_tokens: int) -> None:
        self.target, self.max_new_tokens = target, max_new_tokens
        self.cache = SlotCache(target.layers, size, capacity, target.device)
        self.uniforms = torch.zeros(size, max_new_tokens, dtype=torch.float64)
        self.requests: list[Request | None] = [None] * size
        self.responses: list[list[int]] = [[] for _ in range(size)]
        self.logits_BV = torch.zeros(size, target.vocab_size, dtype=target.dtype, device=target.device)

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
        self.cache.fill(index, prompt_cache, ends)
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
        cache = self.cache
        cache.lengths[self.free()] = 0
        ids_B1 = torch.tensor(tokens, device=cache.lengths.device)[:, None]
        step = self.target.forward(ids_B1, cache, cache.positions(1), cache.mask(1), taps=False)
        self.logits_BV = self.target.logits(step.hidden_BTH[:, -1])
        cache.lengths += 1


def _check(target: Target, requests: Sequence[Request], max_new_tokens: int) -> None:
    for request in requests:
        if not request.prompt_ids or len(request.prompt_ids) + max_new_tokens > target.context:
            raise ValueError(f"prompt {request.key}: {len(request.prompt_ids)} tokens do not fit")


@torch.inference_mode()
def generate(
    target: Target,
    requests: Sequence[Request],
    max_new_tokens: int,
    batch_size: int = 64,
    stop_ids: Sequence[int] = (),
) -> Iterator[Completion]:
    """Answer every request; completions come as they finish, not in the order of the requests.

    ``stop_ids`` end a response besides the target's own end tokens.
    Raises ``ValueError`` for an empty prompt or one that leaves no room for a response; callers check user input
    first.
    """
    _check(target, requests, max_new_tokens)
    waiting = sorted(requests, key=lambda r: len(r.prompt_ids), reverse=True)
    if not waiting:
        return
    size = min(batch_size, len(waiting))
    slots = _Slots(target, size, len(waiting[0].prompt_ids) + max_new_tokens, max_new_tokens)
    group, ends = max(1, size // 8), {*target.eos_ids, *stop_ids}
    with slot_attention(target):
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
