"""Where two greedy texts of the same prompt diverge, and whether the target could tell the two tokens apart there.

Verification gives the target several tokens at once, plain decoding one. In float32 that makes no difference to an
argmax; in bfloat16 the two round differently, and where the two best logits nearly tie the texts may part without
any mistake in the rule. Nothing here takes that for granted: at the first difference both tokens' logits are computed
again, in the engine's arithmetic and, from the same weights, in float32, and the gap is held against the rounding
that was measured on the same text.

Shape legend: R response positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from redraft.target import Target

# Positions whose logits are held at once: 64 of a vocabulary of 150,000 in float32 are 38 MB.
CHUNK = 64


@dataclass(frozen=True)
class Divergence:
    """The first difference of a text from plain decoding's. Gaps and noise are in units of logits.

    ``position`` counts response tokens from 0; ``plain`` and ``other`` are the tokens there, None behind an end.
    ``gap`` is between the target's two best logits there in float32, ``gap_low`` the same in the engine's arithmetic.
    ``behind`` is how far the lower of the two tokens lies below the best logit in float32. ``noise`` is how much the
    engine's arithmetic moved the difference of the two best logits, at most, over the positions of the plain text.
    """

    position: int
    plain: int | None
    other: int | None
    gap: float
    gap_low: float
    behind: float
    noise: float

    @property
    def near_tie(self) -> bool:
        """Whether rounding of the size seen on this very text can exchange the two tokens."""
        return self.plain is not None and self.other is not None and self.behind <= self.noise


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first position at which two texts differ, None if they are equal.

    Where the shorter one begins the longer one that is the shorter one's length.
    """
    pairs = enumerate(zip_longest(one, other))
    return next((position for position, (a, b) in pairs if a != b), None)


def top_two(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [R, 2] of the two best logits, the best first, and the gap between them [R], in float32."""
    best = logits_RV.float().topk(2, dim=-1)
    return best.indices, best.values[..., 0] - best.values[..., 1]


@torch.inference_mode()
def plain_text(prompt_ids: Sequence[int], ids: Sequence[int], target: Target) -> list[int]:
    """What plain greedy decoding writes in the arithmetic of ``target``, as far as a text of its own can tell.

    ``ids`` themselves where each is the target's best after those before it; else they end at the first that is not,
    and that best stands in its place. One teacher-forced pass.
    """
    states_RH = _states(target, prompt_ids, ids)
    for start in range(0, len(states_RH), CHUNK):
        best = target.logits(states_RH[start : start + CHUNK]).argmax(-1).tolist()
        wrong = first_difference(best, ids[start : start + CHUNK])
        if wrong is not None:
            return [*ids[: start + wrong], best[wrong]]
    return list(ids)


def explain(
    prompt_ids: Sequence[int], plain_ids: Sequence[int], other_ids: Sequence[int], exact: Target, low: Target
) -> Divergence | None:
    """The first difference of ``other_ids`` from ``plain_ids``, or None when the texts are the same.

    ``low`` is the target that decoded, ``exact`` the same weights in float32. One teacher-forced pass of each over
    the plain text.
    """
    position = first_difference(plain_ids, other_ids)
    if position is None:
        return None
    states_exact, states_low = (_states(target, prompt_ids, plain_ids) for target in (exact, low))
    noise = 0.0
    for start in range(0, len(states_exact), CHUNK):
        part = slice(start, start + CHUNK)
        logits, rounded = exact.logits(states_exact[part]).float(), low.logits(states_low[part]).float()
        ids, gaps = top_two(logits)
        moved = rounded.gather(-1, ids)
        noise = max(noise, float((moved[:, 0] - moved[:, 1] - gaps).abs().max()))
    # A text that begins the other has no token to compare: its last state stands in, and it is no near-tie.
    row = min(position, len(states_exact) - 1)
    logits, rounded = exact.logits(states_exact[row]).float(), low.logits(states_low[row]).float()
    plain, other = (ids[position] if position < len(ids) else None for ids in (plain_ids, other_ids))
    tokens = [token for token in (plain, other) if token is not None]
    return Divergence(
        position=position,
        plain=plain,
        other=other,
        gap=float(top_two(logits[None])[1]),
        gap_low=float(top_two(rounded[None])[1]),
        behind=float(logits.max() - logits[tokens].min()),
        noise=noise,
    )


@torch.inference_mode()
def _states(target: Target, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Tensor:
    """Final-norm states [R, H] from which each response token is chosen."""
    ids = torch.tensor([[*prompt_ids, *response_ids][:-1]], device=target.device)
    return target.forward(ids, taps=False).hidden_BTH[0, len(prompt_ids) - 1 :]


def summary(found: Iterable[Divergence | None]) -> dict[str, Any]:
    """What a result file says of a draft: prompts, identical texts, near-ties among the others, and every gap.

    ``first_divergence_gap`` lists the float32 gap between the two best logits at each first difference.
    """
    parted = list(found)
    differing = [item for item in parted if item is not None]
    return {
        "prompts": len(parted),
        "identical": len(parted) - len(differing),
        "near_ties": sum(item.near_tie for item in differing),
        "first_divergence_gap": [item.gap for item in differing],
    }
