"""Lossless speculative decoding of many sequences at once, each a chain of its own.

All slots draft and verify together; each rolls back to what its own verification kept, in the target's cache and in
the draft's. Freed slots are refilled by groups of waiting prompts of similar length. What a request gets depends on
its prompt and its seed alone: its uniforms are those that it would use by itself
(:class:`redraft.decode.engine.ChainDecoder`), and its slot sees nothing of the others.

Rows do not keep in step: one has two newly verified pairs for the draft, another five; one may propose four tokens,
another has room for one. Shorter rows are padded on the right. Padding writes keys behind a row's length, where they
are masked until the next real token overwrites them.

Shape legend: B slots, b slots of a group, T new tokens, G proposed tokens, C capacity, Q query heads, K key heads,
W head width, H draft width, F fused taps, D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft.decode.accept import accept_chains
from redraft.decode.engine import for_decoding
from redraft.decode.requests import Generation, Round, Uniforms, check_room, trim
from redraft.drafts.base import Draft
from redraft.drafts.layers import Attend, attend_causally
from redraft.errors import UserError
from redraft.sampling import draw, warp
from redraft.settings.sampler import Sampler
from redraft.target import Target
from redraft.target.cache import SlotCache, causal_mask, slot_attention, write

Done = Callable[[int, Generation], None]
"""Called with a prompt's index and its generation as soon as it has ended."""


class DraftSlots:
    """Keys and values [B, K, C, W] of every layer of the draft, and how many verified pairs each slot holds."""

    def __init__(self, draft: Draft, size: int, capacity: int) -> None:
        config, like = draft.config, draft.fc.weight
        self.capacity, self.windows = capacity, config.reach
        shape = (config.num_layers, size, config.num_key_value_heads, capacity, config.head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = torch.zeros(size, dtype=torch.long, device=like.device)

    def extend(self, at_BT: Tensor) -> list[Attend]:
        """Each layer's way to write new keys at these columns of all slots; each query sees its slot up to itself."""
        return [functools.partial(self.attend, number, at_BT) for number in range(len(self.windows))]

    def attend(self, number: int, at_BT: Tensor, query_BTQW: Tensor, key_BTKW: Tensor, value_BTKW: Tensor) -> Tensor:
        """Mixed values [B, T, Q, W] of a layer."""
        keys, values, window = self.keys[number], self.values[number], self.windows[number]
        write(keys, key_BTKW, at_BT)
        write(values, value_BTKW, at_BT)
        mask_B1TC = causal_mask(at_BT, self.capacity)
        if window:
            mask_B1TC = mask_B1TC & ~causal_mask(at_BT - window, self.capacity)
        mixed = F.scaled_dot_product_attention(
            query_BTQW.transpose(1, 2), keys, values, attn_mask=mask_B1TC, enable_gqa=True
        )
        return mixed.transpose(1, 2)

    def fill(self, rows_b: Tensor) -> list[Attend]:
        """Each layer's way to write the keys of prompts into emptied slots; each query sees those up to its own."""
        return [functools.partial(self.write_prompt, number, rows_b) for number in range(len(self.windows))]

    def write_prompt(
        self, number: int, rows_b: Tensor, query_bTQW: Tensor, key_bTKW: Tensor, value_bTKW: Tensor
    ) -> Tensor:
        """Mixed values [b, T, Q, W] of a layer."""
        key_bKTW, value_bKTW = key_bTKW.transpose(1, 2), value_bTKW.transpose(1, 2)
        tokens = key_bKTW.shape[2]
        self.keys[number, rows_b, :, :tokens], self.values[number, rows_b, :, :tokens] = key_bKTW, value_bKTW
        mixed = attend_causally(query_bTQW.transpose(1, 2), key_bKTW, value_bKTW, self.windows[number])
        return mixed.transpose(1, 2)


@dataclass
class _Sequence:
    """A request in flight: its place among the prompts, its uniforms, and the pairs that the draft has not seen."""

    index: int
    uniforms: Uniforms
    generation: Generation
    began: float
    pending_ids: list[int]
    pending_taps_TF: Tensor


@dataclass
class _Flight:
    """All buffers of one call of :meth:`BatchedChainDecoder.generate`; ``rows[i]`` is who sits in slot i."""

    cache: SlotCache
    draft_cache: DraftSlots
    rows: list[_Sequence | None]

    def active(self) -> list[tuple[int, _Sequence]]:
        return [(row, one) for row, one in enumerate(self.rows) if one is not None]

    def free(self) -> list[int]:
        return [row for row, one in enumerate(self.rows) if one is None]


@dataclass
class _Proposal:
    """Proposed ids [B, G] and how many of them count in each slot; of sampled drafts the probabilities [B, G, D]."""

    ids_BG: Tensor
    counts: list[int]
    probs_BGD: Tensor | None


class BatchedChainDecoder:
    """Speculative decoding of up to ``slots`` sequences at once, with a chain of ``gamma`` drafted tokens a round."""

    def __init__(
        self,
        target: Target,
        draft: Draft,
        gamma: int = 5,
        sampler: Sampler | None = None,
        slots: int = 8,
        greedy_drafts: bool = False,
    ) -> None:
        """``greedy_drafts``: the draft proposes its likeliest tokens also when the target samples.

        Raises ``UserError`` when the draft does not fit the target, for a standalone draft, for a gamma or a number of
        slots below 1, and for a target whose text is not its own in such a pass.
        """
        target.require("slots")
        if not draft.taps:
            raise UserError(f"batched decoding takes no {draft.family} draft; decode with it one request at a time")
        draft.check_fit(target)
        if gamma < 1:
            raise UserError(f"gamma must be at least 1, not {gamma}")
        if slots < 1:
            raise UserError(f"batched decoding needs at least 1 slot, not {slots}")
        self.target, self.gamma, self.sampler, self.slots = target, gamma, sampler or Sampler(), slots
        self.draft = for_decoding(draft, target)
        self.fixed = greedy_drafts or self.sampler.greedy
        self.vocabulary = self.draft.vocabulary()
        self.ends = frozenset(target.eos_ids)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        seeds: Sequence[int] | None = None,
        done: Done | None = None,
    ) -> list[Generation]:
        """Decode every prompt; the results stand in the order of the prompts. ``seeds`` are 0 unless given.

        Seconds of a generation are those of the clock on the wall while it was in flight, and a round's are the
        whole batch's: they are not to be summed over requests. Raises ``ValueError`` when a prompt and its response
        do not fit the context, or when there is not one seed a prompt.
        """
        for prompt in prompts:
            check_room(self.target, prompt, max_new_tokens)
        seeds = [0] * len(prompts) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
        found: list[Generation | None] = [None] * len(prompts)
        waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        if not waiting:
            return []
        if self.target.taps != self.draft.taps:
            self.target.tap(self.draft.taps)
        flight = self._take_off(min(self.slots, len(prompts)), len(prompts[waiting[0]]) + max_new_tokens)
        group = max(1, len(flight.rows) // 8)
        with slot_attention(self.target):
            while True:
                free = flight.free()
                while waiting and len(free) >= min(group, len(waiting)):
                    chosen = [waiting.pop() for _ in range(min(group, len(waiting)))]
                    self._admit(flight, free[: len(chosen)], {i: (prompts[i], seeds[i]) for i in chosen})
                    free = free[len(chosen) :]
                self._land(flight, max_new_tokens, found, done)
                if flight.active():
                    self._round(flight, max_new_tokens)
                elif not waiting:
                    return [one for one in found if one is not None]

    def _take_off(self, size: int, longest: int) -> _Flight:
        # One round beyond the longest sequence, since short rows are padded to the widest.
        capacity = longest + self.gamma + 1
        cache = SlotCache(self.target.layers, size, capacity, self.target.device)
        return _Flight(cache, DraftSlots(self.draft, size, capacity), [None] * size)

    # -- joining and leaving -------------------------------------------------------------------------------------
    def _admit(self, flight: _Flight, free: list[int], group: dict[int, tuple[Sequence[int], int]]) -> None:
        """Prefill target and draft with a group, padded on the right so that the plain causal mask holds."""
        began = time.perf_counter()
        target, draft, device = self.target, self.draft, self.target.device
        lengths = [len(prompt) for prompt, _ in group.values()]
        ids_bT = torch.zeros(len(group), max(lengths), dtype=torch.long)
        for i, (prompt, _) in enumerate(group.values()):
            ids_bT[i, : lengths[i]] = torch.tensor(list(prompt))
        ids_bT = ids_bT.to(device)
        prompt_cache = target.new_buffers(max(lengths))
        step = target.forward(ids_bT, prompt_cache)
        assert step.taps_BTKH is not None
        rows_b, ends_b = torch.tensor(free, device=device), torch.tensor(lengths, device=device)
        flight.cache.fill(rows_b, prompt_cache, ends_b)
        # The pairs (h_t, x_{t+1}) within the prompts; the last, with the first response token, waits for the round.
        pairs = max(lengths) - 1
        if pairs:
            positions_bT = torch.arange(pairs, device=device).expand(len(group), pairs)
            embeds, states = draft.embed(ids_bT[:, 1:], target.embedding), draft.fuse(step.taps_BTKH[:, :-1])
            draft(embeds, states, positions_bT, flight.draft_cache.fill(rows_b))
        flight.draft_cache.lengths[rows_b] = ends_b - 1
        logits_bV = target.logits(step.hidden_BTH[torch.arange(len(group), device=device), ends_b - 1])
        for i, (row, (index, (_, seed))) in enumerate(zip(free, group.items(), strict=True)):
            uniforms = Uniforms(seed, device)
            first = self._first(logits_bV[i], uniforms)
            taps_TF = step.taps_BTKH[i, lengths[i] - 1 : lengths[i]].clone()
            one = _Sequence(index, uniforms, Generation([first], "length", 0.0, 0.0), 0.0, [first], taps_TF)
            flight.rows[row] = one
        now = time.perf_counter()
        for row in free:
            if (joined := flight.rows[row]) is not None:
                joined.generation.prefill_seconds, joined.began = now - began, now

    def _first(self, logits_V: Tensor, uniforms: Uniforms) -> int:
        if self.sampler.greedy:
            return int(logits_V.argmax())
        return int(draw(warp(logits_V[None], self.sampler), uniforms.take(1)))

    def _land(self, flight: _Flight, max_new_tokens: int, found: list[Generation | None], done: Done | None) -> None:
        """Free the slots of sequences that have ended."""
        for row, one in flight.active():
            reason = trim(one.generation.ids[-1:], self.ends, 2)[1]
            if reason is None and len(one.generation.ids) < max_new_tokens:
                continue
            one.generation.finish_reason = reason or "length"
            one.generation.decode_seconds = time.perf_counter() - one.began
            found[one.index], flight.rows[row] = one.generation, None
            if done:
                done(one.index, one.generation)

    # -- a round -------------------------------------------------------------------------------------------------
    def _round(self, flight: _Flight, max_new_tokens: int) -> None:
        start = time.perf_counter()
        idle = flight.free()
        # Idle slots run along at length 0; what they compute is never read.
        flight.cache.lengths[idle] = flight.draft_cache.lengths[idle] = 0
        rooms = {row: max_new_tokens - len(one.generation.ids) for row, one in flight.active()}
        proposal = self._propose(flight, rooms)
        drafted = time.perf_counter()
        accepted, following, taps_BTF = self._verify(flight, proposal)
        verified = time.perf_counter()
        for row, one in flight.active():
            proposed = proposal.ids_BG[row, : proposal.counts[row]].tolist()
            kept = [*proposed[: accepted[row]], following[row]]
            one.pending_ids, one.pending_taps_TF = kept, taps_BTF[row, : accepted[row] + 1]
            shown = trim(kept, self.ends, rooms[row])[0]
            one.generation.ids.extend(shown)
            record = Round(proposed, accepted[row], shown, drafted - start, verified - drafted)
            one.generation.rounds.append(record)

    def _propose(self, flight: _Flight, rooms: dict[int, int]) -> _Proposal:
        """Feed every slot its newly verified pairs, then draft; a slot proposes no more than it has room for."""
        draft, cache, embedding = self.draft, flight.draft_cache, self.target.embedding
        counts = [min(self.gamma, rooms.get(row, 0)) for row in range(len(flight.rows))]
        width = max(counts)
        ids_BT, taps_BTF, fed_B = self._pending(flight)
        at_BT = cache.lengths[:, None] + torch.arange(ids_BT.shape[1], device=ids_BT.device)
        states_BTH = draft(draft.embed(ids_BT, embedding), draft.fuse(taps_BTF), at_BT, cache.extend(at_BT))
        rows_B = torch.arange(len(counts), device=ids_BT.device)
        states_BH = states_BTH[rows_B, fed_B - 1]
        cache.lengths += fed_B
        chances_BG = None if self.fixed else self._uniforms(flight, counts, width)
        tokens, probs = list[Tensor](), list[Tensor]()
        for i in range(width):
            logits_BD = draft.logits(states_BH)
            if chances_BG is None:
                index_B = logits_BD.argmax(-1)
            else:
                probs.append(warp(logits_BD, self.sampler))
                index_B = draw(probs[-1], chances_BG[:, i])
            tokens.append(self.vocabulary[index_B])
            if i + 1 < width:
                at_B1 = (cache.lengths + i)[:, None]
                embeds_B1H = draft.embed(tokens[-1][:, None], embedding)
                states_BH = draft(embeds_B1H, draft.carry(states_BH)[:, None], at_B1, cache.extend(at_B1))[:, 0]
        return _Proposal(torch.stack(tokens, 1), counts, torch.stack(probs, 1) if probs else None)

    def _pending(self, flight: _Flight) -> tuple[Tensor, Tensor, Tensor]:
        """Newly verified ids [B, T] and taps [B, T, F] of all slots, padded on the right, and how many count [B]."""
        active = flight.active()
        size, most = len(flight.rows), max(len(one.pending_ids) for _, one in active)
        ids = [[0] * most for _ in range(size)]
        fed = [1] * size
        first = active[0][1].pending_taps_TF
        taps_BTF = first.new_zeros(size, most, first.shape[-1])
        for row, one in active:
            fed[row] = len(one.pending_ids)
            ids[row][: fed[row]] = one.pending_ids
            taps_BTF[row, : fed[row]] = one.pending_taps_TF
        return torch.tensor(ids, device=first.device), taps_BTF, torch.tensor(fed, device=first.device)

    def _uniforms(self, flight: _Flight, counts: Sequence[int], width: int, last: bool = False) -> Tensor:
        """Each slot's next uniforms [B, width], its own count of them; with ``last`` one more, in the last column."""
        device = self.target.device
        chances = torch.zeros(len(counts), width + last, dtype=torch.float64, device=device)
        for row, one in flight.active():
            taken = one.uniforms.take(counts[row] + last)
            chances[row, : counts[row]] = taken[: counts[row]]
            if last:
                chances[row, -1] = taken[-1]
        return chances

    def _verify(self, flight: _Flight, proposal: _Proposal) -> tuple[list[int], list[int], Tensor]:
        """One target pass over every slot's last token and proposals, by the rule of :mod:`redraft.decode.accept`.

        Returns accepted counts and next ids by slot, and the taps [B, G + 1, F]; rolls every slot back.
        """
        target, cache, ids_BG = self.target, flight.cache, proposal.ids_BG
        last = [one.generation.ids[-1] if one is not None else 0 for one in flight.rows]
        ids_BT = torch.cat([ids_BG.new_tensor(last)[:, None], ids_BG], 1)
        tokens = ids_BT.shape[1]
        # What pads a short row must not stand behind the context: some models bend the angles of a whole pass by its
        # furthest position. It writes its keys where it would anyway, and nobody looks at them.
        positions_BT = cache.positions(tokens).clamp(max=target.context - 1)
        step = target.forward(ids_BT, cache, positions_BT, cache.mask(tokens))
        assert step.taps_BTKH is not None
        logits_BTV = target.logits(step.hidden_BTH)
        width, counts_B = tokens - 1, ids_BG.new_tensor(proposal.counts)
        counted_BG = torch.arange(width, device=ids_BG.device) < counts_B[:, None]
        if self.fixed:
            accepted_B, next_B = self._follow(flight, proposal, logits_BTV, counted_BG)
        else:
            assert proposal.probs_BGD is not None
            target_BTV = warp(logits_BTV.flatten(0, 1), self.sampler).view(logits_BTV.shape)
            full_BGV = target_BTV.new_zeros(len(ids_BG), width, target_BTV.shape[-1])
            # What a slot had no room for has no probability either: it is rejected and the target's own row decides,
            # which makes that token the bonus of a shorter chain.
            full_BGV[:, :, self.vocabulary] = proposal.probs_BGD * counted_BG[..., None]
            chances = self._uniforms(flight, proposal.counts, width, last=True)
            accepted_B, next_B = accept_chains(target_BTV, full_BGV, ids_BG, chances)
        cache.lengths += accepted_B + 1
        return accepted_B.tolist(), next_B.tolist(), step.taps_BTKH

    def _follow(
        self, flight: _Flight, proposal: _Proposal, logits_BTV: Tensor, counted_BG: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Accepted counts [B] and next ids [B] of fixed proposals: accept while the target chooses the same."""
        if self.sampler.greedy:
            chosen_BT = logits_BTV.argmax(-1)
        else:
            # One uniform a position up to the bonus, as in plain decoding; those behind the kept ones go back.
            taken = [count + 1 for count in proposal.counts]
            chances_BT = self._uniforms(flight, taken, logits_BTV.shape[1])
            probs = warp(logits_BTV.flatten(0, 1), self.sampler)
            chosen_BT = draw(probs, chances_BT.flatten()).view(chances_BT.shape)
        same_BG = (chosen_BT[:, :-1] == proposal.ids_BG) & counted_BG
        accepted_B = same_BG.long().cumprod(1).sum(1)
        if not self.sampler.greedy:
            accepted = accepted_B.tolist()
            for row, one in flight.active():
                one.uniforms.put_back(proposal.counts[row] - accepted[row])
        return accepted_B, chosen_BT.gather(1, accepted_B[:, None])[:, 0]
