"""Batched in-process generation by the target: token ids in, token ids out.

Continuous batching: a fixed number of slots, each with its own length. A finished sequence frees its slot at
once; freed slots are refilled by groups of waiting prompts of similar length, so that neither finished rows nor
padding cost a forward pass.

Shape legend: B slots, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Iterator, Sequence
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

    def admit(self, group: Sequence[Request], rows: Sequence[int], wanted: Collection[str]) -> None:
        """Prefill a group, padded on the right so that the plain causal mask holds, and copy it into its slots.

        Requests whose keys are not ``wanted`` pad the prefill and leave their slots free.
        """
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
            self.requests[row], self.responses[row] = request if request.key in wanted else None, []
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
    among: Sequence[Request] = (),
) -> Iterator[Completion]:
    """Answer every request; completions come as they finish, not in the order of the requests.

    ``stop_ids`` end a response besides the target's own end tokens. ``among``: all requests of a run of which these
    are left. Slots, their capacity and the groups of the prefill then follow from all of them, so that every pass
    has the shape that it would have had without the stop, and in bfloat16 too the answers are the same.
    Raises ``ValueError`` for an empty prompt or one that leaves no room for a response; callers check user input
    first.
    """
    everyone = among or requests
    _check(target, everyone, max_new_tokens)
    if not requests:
        return
    ordered = sorted(everyone, key=lambda r: len(r.prompt_ids), reverse=True)[::-1]
    size, wanted = min(batch_size, len(ordered)), {request.key for request in requests}
    slots = _Slots(target, size, len(ordered[-1].prompt_ids) + max_new_tokens, max_new_tokens)
    step, ends = max(1, size // 8), {*target.eos_ids, *stop_ids}
    groups = [ordered[i : i + step] for i in range(0, len(ordered), step)]
    waiting = deque(group for group in groups if any(request.key in wanted for request in group))
    with slot_attention(target):
        while True:
            free = slots.free()
            while waiting and len(free) >= len(waiting[0]):
                slots.admit(waiting[0], free[: len(waiting[0])], wanted)
                waiting.popleft()
                free = slots.free()
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
