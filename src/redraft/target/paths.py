"""Which passes of ours equal the model's own: tried on a few tokens, once a target.

Decoding and regeneration are fast because keys lie in buffers of ours, many sequences share a pass, and trees are
verified under one mask. Each of these is used for a model only where it gives what the model's own forward gives:
on a text of ``TOKENS`` tokens, with every window narrowed to ``WINDOW`` for the trial, so that the text is past it
however wide the real one is. What differs is left to the model's own cache and to transformers' own generation, or
refused by name.

Shape legend: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redraft.errors import UserError
from redraft.target.cache import KeyValueCache, OwnCache, SlotCache, slot_attention

TOKENS, WINDOW, SLOPE = 24, 7, 4
# Numbers that make a pass depend on the distance or the place in a text, and what they are in the trial.
NARROWED = {"sliding_window": WINDOW, "attention_chunk_size": WINDOW, "floor_scale": SLOPE}
# Relative distance of two states that count as the same. In long types that holds for every state. In short ones, where
# rounding may send a token to another expert, it holds for most of them, and they must be far nearer than a forgotten
# window would leave them. A recurrent state computes a block of tokens by another sum than single ones, and what is
# fed to the model's own cache is the model's own arithmetic whichever it takes: there only a lost state shows.
CLOSE, CLOSE_SHORT, FAR, CLOSE_OWN = 1e-4, 0.1, 0.3, 1e-2
# And of two results of the very same products in a short type, for most of them.
CLOSE_ROUNDED = 0.02

# States [N, H] of ours and of the model, for every part of a pass.
Parts = list[tuple[Tensor, Tensor]]

# The passes that are tried, in words.
IN_WORDS = {
    "cached": "passes through buffers of ours",
    "own_cache": "passes through its own cache",
    "masked": "passes under a tree's mask",
    "slots": "passes over several texts at once",
    "slots_by_kernel": "passes over several texts at once",
}


@dataclass(frozen=True)
class Paths:
    """What equals the model's own passes.

    ``cached``: keys in buffers that roll back; ``own_cache``: the model's own cache, with copies to go back to;
    ``masked``: masks of ours (trees); ``slots``: sequences of several lengths in one pass; ``kernel``: that with our
    attention for short queries. ``why`` says what stood against the first of them that fails.
    """

    cached: bool = False
    own_cache: bool = False
    masked: bool = False
    slots: bool = False
    kernel: bool = False
    why: str = ""

    def verdict(self) -> str:
        """One line for a person."""
        if self.slots and self.masked:
            return "every pass equals the model's own"
        done = "by the model's own generation" if not self.slots else "in batches"
        step = "a chain" if self.cached or self.own_cache else "nothing"
        return f"text is written {done}, and {step} can be decoded here: {self.why}"


def find_paths(target: Any) -> Paths:
    """Try them all. Raises ``UserError`` where even a plain pass is not the model's own."""
    if getattr(target.config, "index_topk", None):
        # Its choice is of thousands of keys, which no short trial reaches, and it was seen to move with the padding.
        raise UserError(
            f"{type(target.model).__name__} chooses the keys of its attention by an index (index_topk), and that "
            "choice moves with what shares a pass: its states cannot be had exactly, so no draft can be trained on it"
        )
    generator = torch.Generator().manual_seed(0)
    high = min(target.vocab_size, 20_000)
    ids_BT = torch.randint(min(100, high // 2), high, (2, TOKENS), generator=generator).to(target.device)
    with torch.inference_mode():
        wide_BTH = _own(target, ids_BT)
        effect = _effect(target, ids_BT, wide_BTH)
        with _narrowed(target) as narrow:
            own_BTH = _own(target, ids_BT) if narrow else wide_BTH
            # The trial says nothing about windows where narrowing them changed nothing.
            same = target.mask_plan is not None and torch.equal(wide_BTH, own_BTH)
            same = same and target.mask_plan.kinds != ("full_attention",)
            blind = "its window could not be narrowed for the trial" if same else ""
            trial = _Trial(target, ids_BT, own_BTH, effect)
            cached = trial.holds(trial.cached)
            own_cache = not cached and trial.holds(trial.own_cache, CLOSE_OWN if trial.exact else CLOSE_SHORT)
            ours = cached and not blind and target.mask_plan is not None
            slots = ours and trial.holds(trial.slots)
            stock = target.backbone.config._attn_implementation == "sdpa"
            kernel = slots and stock and trial.holds(trial.slots_by_kernel)
            masked = ours and trial.holds(trial.masked)
    why = "" if slots and masked else blind or _unknown_layers(target) or trial.why
    return Paths(cached, own_cache, masked, slots, kernel, why)


class _Trial:
    """Passes of ours over the trial's texts, each giving states [N, H] beside the model's own for the same tokens.

    They are given part by part, what stands behind the prompt apart from it: most tokens are the prompt's, and where
    only most of them need be the same, the others would never count.
    """

    def __init__(self, target: Any, ids_BT: Tensor, own_BTH: Tensor, effect: float) -> None:
        """``effect`` is how far the narrowed numbers move a state, the one of them that does so least."""
        self.target, self.ids_BT, self.own_BTH = target, ids_BT, own_BTH
        self.exact, self.tolerance = own_BTH.dtype in (torch.float32, torch.float64), CLOSE
        if not self.exact:
            self.tolerance = min(CLOSE_SHORT, FAR * effect if effect else CLOSE_SHORT)
        self.why = ""

    def holds(self, path: Callable[[], Parts], close: float = 0.0) -> bool:
        """Whether a pass equals the model's own; otherwise ``why`` says what was seen of the first that does not."""
        try:
            parts = [_distance(ours, theirs) for ours, theirs in path()]
        except Exception as error:  # whatever a model raises on a pass that it was not written for
            raised = " ".join(str(error).split())[:120] or type(error).__name__
            self.why = self.why or f"{IN_WORDS[path.__name__]} fail with: {raised}"
            return False
        worst = max(float(apart.max() if self.exact else apart.median()) for apart in parts)
        if all(bool(apart.isfinite().all()) for apart in parts) and worst <= max(self.tolerance, close):
            return True
        self.why = self.why or f"{IN_WORDS[path.__name__]} move its states by {worst:.2g} of their length"
        return False

    def cached(self) -> Parts:
        """Prompt, one token, several of which some are taken back, the rest."""
        return self._stepwise(KeyValueCache(self.target.layers, TOKENS))

    def own_cache(self) -> Parts:
        """The same through the model's own cache."""
        return self._stepwise(OwnCache(self.target.config, self.target.text_states))

    def _stepwise(self, cache: Any) -> Parts:
        ids_1T, found = self.ids_BT[:1], []
        for first, end, kept in ((0, 11, 11), (11, 12, 12), (12, 17, 14), (14, TOKENS, TOKENS)):
            found.append(self.target.forward(ids_1T[:, first:end], cache, taps=False).hidden_BTH[0, : kept - first])
            cache.rollback(kept)
        return list(zip((found[0], torch.cat(found[1:])), self.own_BTH[0].split([11, TOKENS - 11]), strict=True))

    def masked(self) -> Parts:
        """A tree behind a prompt: the text's own tokens hidden among wrong ones; then its path alone, and the rest."""
        ids_T, start = self.ids_BT[0], 12
        cache = KeyValueCache(self.target.layers, 2 * TOKENS)
        found = [self.target.forward(ids_T[None, :start], cache, taps=False).hidden_BTH[0]]
        # At each of five depths a wrong token and the right one; all hang on the right one above.
        depths = torch.arange(5).repeat_interleave(2)
        right = torch.arange(10) % 2 == 1
        above = right[None] & (depths[None] < depths[:, None]) | torch.eye(10, dtype=torch.bool)
        nodes = torch.where(right, ids_T.cpu()[start + depths], self.ids_BT.cpu()[1, start + depths])
        mask = torch.cat([torch.ones(10, start, dtype=torch.bool), above], 1)[None, None]
        positions = (start + depths)[None]
        device = ids_T.device
        step = self.target.forward(nodes[None].to(device), cache, positions.to(device), mask.to(device), taps=False)
        found.append(step.hidden_BTH[0, right.to(device)])
        cache.compact(start, right.nonzero().flatten().tolist())
        found.append(self.target.forward(ids_T[None, start + 5 :], cache, taps=False).hidden_BTH[0])
        return list(zip(found, self.own_BTH[0].split([start, 5, TOKENS - start - 5]), strict=True))

    def slots(self) -> Parts:
        """Two texts of different lengths, prefilled together, then one token each, then three."""
        lengths = torch.tensor([9, 14], device=self.ids_BT.device)
        cache = SlotCache(self.target.layers, 2, TOKENS, self.ids_BT.device)
        prompts = self.target.new_buffers(14)
        padded = self.ids_BT[:, :14].clone()
        padded[0, 9:] = 0
        step = self.target.forward(padded, prompts, taps=False)
        ours = [step.hidden_BTH[0, :9], step.hidden_BTH[1]]
        theirs = [self.own_BTH[0, :9], self.own_BTH[1, :14]]
        cache.fill(torch.arange(2, device=lengths.device), prompts, lengths)
        for tokens in (1, 3):
            at_BT = cache.positions(tokens)
            step = self.target.forward(self.ids_BT.gather(1, at_BT), cache, at_BT, cache.mask(tokens), taps=False)
            ours.append(step.hidden_BTH.flatten(0, 1))
            theirs.append(self.own_BTH.gather(1, at_BT[..., None].expand(-1, -1, self.own_BTH.shape[-1])).flatten(0, 1))
            cache.lengths += tokens
        return [(torch.cat(ours[part]), torch.cat(theirs[part])) for part in (slice(2), slice(2, None))]

    def slots_by_kernel(self) -> Parts:
        """The same with our attention for short queries."""
        with slot_attention(self.target, True):
            return self.slots()


def _unknown_layers(target: Any) -> str:
    if target.mask_plan is not None:
        return ""
    known = {"full_attention", "sliding_attention", "chunked_attention"}
    kinds = sorted(set(getattr(target.config, "layer_types", None) or []) - known)
    if kinds:
        return f"its layers of the kind {', '.join(kinds)} keep more than keys and values"
    return "its config does not say how wide its windows are"


def _own(target: Any, ids_BT: Tensor) -> Tensor:
    """Final-norm states [B, T, H] of a plain pass, held against the whole model's own forward.

    Raises ``UserError`` when logits or taps are not the model's.
    """
    out = target.model(input_ids=ids_BT, use_cache=False, output_hidden_states=True)
    step = target.forward(ids_BT, taps=False)
    name = type(target.model).__name__
    if not _same(target.logits(step.hidden_BTH), out.logits):
        raise UserError(
            f"the logits of {name} are not its head over the states of its text part, so no draft can be trained on it"
        )
    _check_taps(target, ids_BT, out.hidden_states)
    return step.hidden_BTH


def _check_taps(target: Any, ids_BT: Tensor, states: Any) -> None:
    """Raise ``UserError`` when taps are not the model's own states."""
    try:
        fused_BTKH = target.forward(ids_BT).taps_BTKH
    except UserError:  # there are none; who asks for them is told, and nobody else needs them
        return
    for k, ours in zip(target.taps, fused_BTKH.split(target.hidden_size, -1) if target.taps else (), strict=True):
        if 0 <= k < target.layers and not _same(ours, states[k]):
            raise UserError(
                f"the states after layer {k} of {type(target.model).__name__} cannot be read; "
                "no draft can be trained on it"
            )


def _effect(target: Any, ids_BT: Tensor, wide_BTH: Tensor) -> float:
    """How far the number of ``NARROWED`` that does so least moves a state by itself; 0 where none moves any."""
    effects = []
    for name in NARROWED:
        with _narrowed(target, (name,)) as narrow:
            if narrow:
                moved_BTH = target.forward(ids_BT, taps=False).hidden_BTH
                effects.append(float(_distance(moved_BTH, wide_BTH).median()))
    return min((effect for effect in effects if effect), default=0.0)


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """How far vectors [..., H] are apart, relative to their length [...]."""
    ours, theirs = ours.double(), theirs.double()
    return (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-12)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results of the same products are equal up to rounding in their type.

    In short types a token may go to another expert, but most are as near as rounding leaves them: a factor on the
    logits or a soft cap would move them all.
    """
    if ours.shape != theirs.shape:
        return False
    apart = _distance(ours, theirs)
    if theirs.dtype in (torch.float32, torch.float64):
        return bool((apart <= CLOSE).all())
    return bool((apart <= CLOSE_SHORT).all()) and float(apart.median()) <= CLOSE_ROUNDED


@contextmanager
def _narrowed(target: Any, names: Iterable[str] = tuple(NARROWED)) -> Iterator[bool]:
    """The target with these numbers made narrow, in its config and wherever a module keeps them; if there are any."""
    kept: list[tuple[Any, str, int]] = []
    for holder in [target.backbone.config, *target.backbone.modules()]:
        for name in names:
            old, value = holder.__dict__.get(name), NARROWED[name]
            if isinstance(old, int) and not isinstance(old, bool) and old > value:
                kept.append((holder, name, old))
                setattr(holder, name, value)
    target.__dict__.pop("mask_plan", None)  # it is of the numbers as they were
    try:
        yield bool(kept)
    finally:
        for holder, name, old in kept:
            setattr(holder, name, old)
        target.__dict__.pop("mask_plan", None)
