"""In-process generation by the target: token ids in, token ids out.

Continuous batching: a finished sequence frees its slot at once; freed slots are refilled by groups of waiting prompts
of similar length, so that neither finished rows nor padding cost a forward pass. Prompts of very different lengths are
answered one band of lengths after the other. What a draft will learn from, the target's features, passes by on the way
and can be kept. That is done where sequences of several lengths in one pass give the target's own text
(:mod:`redraft.target.paths`). For any other target transformers' own generation writes it, prompts of one length at a
time: what padding does to a window or to a recurrent state is nobody's business here.

Shape legend: B slots or rows, P prompt tokens, R response tokens, T tokens, H hidden size, K taps, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList

from redraft.sampling import draw, warp
from redraft.settings.sampler import Sampler
from redraft.target import Target, TargetStep
from redraft.target.cache import SlotCache, slot_attention

# The most room that a slot may have beside the least that is needed in it.
WIDEST = 2


@dataclass(frozen=True)
class Request:
    """One prompt to be answered: its key, its token ids and the sampling rule."""

    key: str
    prompt_ids: Sequence[int]
    sampler: Sampler
    seed: int = 0

    def uniforms(self, count: int) -> Tensor:
        """The uniforms [count] that its tokens are drawn with: a function of its key, sampler and seed alone."""
        text = f"{self.key}|{self.sampler}|{self.seed}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Completion:
    """The answer to a request. ``finish_reason`` is ``stop`` (an end token, kept in the ids) or ``length``.

    ``features``, where they were asked for: taps [P + R - 2, K*H] and final-norm states [R - 1, H] of the positions
    that :mod:`redraft.features` names; none for an answer of one token.
    """

    request: Request
    response_ids: list[int]
    finish_reason: str
    features: tuple[Tensor, Tensor] | None = None


@torch.inference_mode()
def generate(
    target: Target,
    requests: Sequence[Request],
    max_new_tokens: int,
    batch_size: int = 64,
    stop_ids: Sequence[int] = (),
    among: Sequence[Request] = (),
    features: bool = False,
) -> Iterator[Completion]:
    """Answer every request; completions come as they finish, not in the order of the requests.

    ``stop_ids`` end a response besides the target's own end tokens. ``among``: all requests of a run of which these are
    left, from which slots, their capacity and the groups of the prefill follow, so that every pass has the shape that
    it would have had without the stop, and in bfloat16 too the answers are the same. ``features``: keep what the target
    computes at its taps. Raises ``ValueError`` for a prompt that is empty or leaves no room; callers check user input.
    """
    everyone = among or requests
    for each in everyone:
        if not each.prompt_ids or len(each.prompt_ids) + max_new_tokens > target.context:
            raise ValueError(f"prompt {each.key}: {len(each.prompt_ids)} tokens do not fit")
    if not requests:
        return
    ends = frozenset({*target.eos_ids, *stop_ids})
    if not target.paths.slots:
        yield from _own_generation(target, requests, max_new_tokens, batch_size, ends)
        return
    wanted = {request.key for request in requests}
    with slot_attention(target):
        for band in bands(everyone, max_new_tokens):
            if any(request.key in wanted for request in band):
                yield from _in_slots(target, band, wanted, max_new_tokens, batch_size, ends, features)


def bands(requests: Sequence[Request], max_new_tokens: int) -> list[list[Request]]:
    """Requests by the length of their prompts, those together that share slots: none of them needs more than
    ``WIDEST`` times the room of another, so that one long prompt does not set the memory of every slot."""
    found: list[list[Request]] = []
    for request in sorted(requests, key=lambda r: len(r.prompt_ids), reverse=True)[::-1]:
        room = len(request.prompt_ids) + max_new_tokens
        if not found or room > WIDEST * (len(found[-1][0].prompt_ids) + max_new_tokens):
            found.append([])
        found[-1].append(request)
    return found


def _in_slots(
    target: Target,
    ordered: Sequence[Request],
    wanted: Collection[str],
    max_new_tokens: int,
    batch_size: int,
    ends: Collection[int],
    features: bool,
) -> Iterator[Completion]:
    """Answer those of ``ordered``, prompts of rising length, whose keys are ``wanted``."""
    size = min(batch_size, len(ordered))
    slots = _Slots(target, size, len(ordered[-1].prompt_ids) + max_new_tokens, max_new_tokens, features)
    step = max(1, size // 8)
    groups = [ordered[i : i + step] for i in range(0, len(ordered), step)]
    waiting = deque(group for group in groups if any(request.key in wanted for request in group))
    while True:
        while waiting and len(free := slots.free()) >= len(waiting[0]):
            slots.admit(waiting[0], free[: len(waiting[0])], wanted)
            waiting.popleft()
        if len(slots.free()) == size:
            return
        tokens = slots.choose()
        for row, request in enumerate(slots.requests):
            if request is None:
                continue
            slots.responses[row].append(tokens[row])
            if tokens[row] in ends or len(slots.responses[row]) == max_new_tokens:
                yield slots.finish(row, tokens[row] in ends)
        if len(slots.free()) < size:
            slots.advance(tokens)


# -- slots -----------------------------------------------------------------------------------------------------------
class Features:
    """What the target computed on the way to each answer in flight, in memory of the CPU."""

    def __init__(self, target: Target, size: int, max_new_tokens: int) -> None:
        width = target.hidden_size
        self.prompts_PKH: list[Tensor] = [torch.empty(0)] * size
        self.taps_BTKH = torch.zeros(size, max_new_tokens, len(target.taps) * width, dtype=target.dtype)
        self.hidden_BTH = torch.zeros(size, max_new_tokens, width, dtype=target.dtype)

    def begin(self, row: int, taps_PKH: Tensor) -> None:
        """A new answer in this slot, behind a prompt with these taps."""
        self.prompts_PKH[row] = taps_PKH.cpu().clone()

    def add(self, index_B: Tensor, step: TargetStep) -> None:
        """Of every slot the token that was fed as number ``index_B`` of its answer."""
        assert step.taps_BTKH is not None
        rows = torch.arange(len(index_B))
        self.taps_BTKH[rows, index_B] = step.taps_BTKH[:, -1].cpu()
        self.hidden_BTH[rows, index_B] = step.hidden_BTH[:, -1].cpu()

    def take(self, row: int, length: int) -> tuple[Tensor, Tensor] | None:
        """The features of the finished answer of ``length`` tokens in this slot."""
        if length < 2:
            return None
        taps = torch.cat([self.prompts_PKH[row], self.taps_BTKH[row, : length - 2]])
        return taps, self.hidden_BTH[row, : length - 1].clone()


class _Slots:
    """The sequences in flight."""

    def __init__(self, target: Target, size: int, capacity: int, max_new_tokens: int, features: bool) -> None:
        self.target, self.max_new_tokens = target, max_new_tokens
        self.features = Features(target, size, max_new_tokens) if features else None
        self.cache = SlotCache(target.layers, size, capacity, target.device)
        self.uniforms = torch.zeros(size, max_new_tokens, dtype=torch.float64)
        self.requests: list[Request | None] = [None] * size
        self.responses: list[list[int]] = [[] for _ in range(size)]
        self.logits_BV = torch.zeros(size, target.vocab_size, dtype=target.dtype, device=target.device)

    def free(self) -> list[int]:
        return [row for row, request in enumerate(self.requests) if request is None]

    def admit(self, group: Sequence[Request], rows: Sequence[int], wanted: Collection[str]) -> None:
        """Prefill a group, padded on the right so that the plain causal mask holds, and copy it into its slots; those
        of requests whose keys are not ``wanted`` stay free."""
        lengths = [len(r.prompt_ids) for r in group]
        ids_BT = pad_sequence([torch.tensor(list(r.prompt_ids)) for r in group], batch_first=True)
        prompt_cache = self.target.new_buffers(max(lengths))
        step = self.target.forward(ids_BT.to(self.target.device), prompt_cache, taps=self.features is not None)
        ends = torch.tensor(lengths, device=self.target.device)
        last_BH = step.hidden_BTH[torch.arange(len(group), device=ends.device), ends - 1]
        index = torch.tensor(rows, device=ends.device)
        self.logits_BV[index] = self.target.logits(last_BH)
        self.cache.fill(index, prompt_cache, ends)
        for i, (row, request) in enumerate(zip(rows, group, strict=True)):
            self.requests[row], self.responses[row] = request if request.key in wanted else None, []
            self.uniforms[row] = request.uniforms(self.max_new_tokens)
            if self.features and step.taps_BTKH is not None:
                self.features.begin(row, step.taps_BTKH[i, : lengths[i]])

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
        kept = self.features
        step = self.target.forward(ids_B1, cache, cache.positions(1), cache.mask(1), taps=kept is not None)
        self.logits_BV = self.target.logits(step.hidden_BTH[:, -1])
        cache.lengths += 1
        if kept:
            kept.add(torch.tensor([max(0, len(response) - 1) for response in self.responses]), step)

    def finish(self, row: int, ended: bool) -> Completion:
        """The answer in this slot, which becomes free."""
        request, response = self.requests[row], self.responses[row]
        assert request is not None
        self.requests[row] = None
        found = self.features.take(row, len(response)) if self.features else None
        return Completion(request, response, "stop" if ended else "length", found)


# -- transformers' own -----------------------------------------------------------------------------------------------
def _own_generation(
    target: Target, requests: Sequence[Request], max_new_tokens: int, batch_size: int, ends: frozenset[int]
) -> Iterator[Completion]:
    """Answer every request through ``model.generate``; ``ends`` are the ids that end a response."""
    last = sorted(ends)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=last or None, pad_token_id=last[0] if last else 0
    )
    ordered = sorted(requests, key=lambda request: len(request.prompt_ids))
    for length, found in groupby(ordered, key=lambda request: len(request.prompt_ids)):
        alike = list(found)
        for group in (alike[first : first + batch_size] for first in range(0, len(alike), batch_size)):
            ids_BT = torch.tensor([list(request.prompt_ids) for request in group], device=target.device)
            with _neutral(target.model):
                out_BT = target.model.generate(
                    input_ids=ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([_Draws(group, length, max_new_tokens)]),
                )
            for request, ids in zip(group, out_BT[:, length:].tolist(), strict=True):
                # What stands behind the end token pads the batch.
                end = next((place for place, token in enumerate(ids, 1) if token in ends), None)
                yield Completion(request, ids[:end], "length" if end is None else "stop")


@contextmanager
def _neutral(model: Any) -> Iterator[None]:
    """The model without the penalties and filters of its generation config: a request names its whole sampler."""
    kept = model.generation_config
    model.generation_config = GenerationConfig(bos_token_id=kept.bos_token_id)
    try:
        yield
    finally:
        model.generation_config = kept


class _Draws:
    """A logits processor that leaves one token possible: the one that the request's sampler draws."""

    def __init__(self, group: Sequence[Request], length: int, max_new_tokens: int) -> None:
        self.group, self.length = group, length
        drawn = (row for row, request in enumerate(group) if not request.sampler.greedy)
        self.uniforms = {row: group[row].uniforms(max_new_tokens) for row in drawn}

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        step = ids_BT.shape[1] - self.length
        scores_BV = scores_BV.clone()
        for row, uniforms in self.uniforms.items():
            chance = uniforms[step : step + 1].to(scores_BV.device)
            token = draw(warp(scores_BV[row : row + 1], self.group[row].sampler), chance)
            scores_BV[row] = float("-inf")
            scores_BV[row, token] = 0.0
        return scores_BV
