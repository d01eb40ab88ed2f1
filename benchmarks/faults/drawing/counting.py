"""Counts of draws against the exact distribution: chi-square and G tests, contingency tables, Holm's correction.

A test compares counts within strata (contexts): the number of draws that came into a context is given, what they say
next is tested. That a token was accepted, corrected or a bonus decides which draws come into a stratum and must tell
nothing of the token after it.

Shape legend: N draws, L limit, S strata, C cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from faults.drawing.drawn import ACCEPTED, BONUS, CORRECTION, Draws
from faults.drawing.world import END, PROMPTS, V

# Cells with fewer expected draws are pooled.
LEAST = 5.0


@dataclass(frozen=True)
class Tested:
    """One test: its name, its statistic, degrees of freedom and p, and how many draws entered it."""

    test: str
    p: float
    statistic: float
    freedom: int
    counted: int


def chi_square_tail(statistic: float, freedom: int) -> float:
    """The chance of a chi-square statistic at least this large."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def pooled(seen_SC: Tensor, expected_SC: Tensor) -> tuple[Tensor, Tensor, int]:
    """Seen and expected counts of cells [C] with at least ``LEAST`` expected draws, and degrees of freedom.

    Small cells of a stratum become one; where that is small too, it joins the stratum's smallest other cell. Strata of
    fewer than two cells then say nothing and are left out.
    """
    large_SC = expected_SC >= LEAST
    rest = [torch.where(large_SC, 0.0, counts).sum(1) for counts in (seen_SC, expected_SC)]
    alone_S = rest[1] >= LEAST
    joins_S = ~alone_S & (rest[1] > 0) & large_SC.any(1)
    smallest_S = torch.where(large_SC, expected_SC, torch.inf).argmin(1)
    rows = torch.arange(len(smallest_S))
    kept_S = large_SC.sum(1) + alone_S.long() >= 2
    found = []
    for counts, small_S in zip((seen_SC, expected_SC), rest, strict=True):
        cells_SC = counts.clone()
        cells_SC[rows, smallest_S] += torch.where(joins_S, small_S, 0.0)
        found.append(torch.cat([cells_SC[large_SC & kept_S[:, None]], small_S[alone_S & kept_S]]))
    return found[0], found[1], len(found[0]) - int(kept_S.sum())


def compared(name: str, seen_SC: Tensor, probs_SC: Tensor, g_test: bool = False) -> Iterator[Tested]:
    """The test of counts in strata against the exact probabilities in them; nothing where there are too few draws.

    ``g_test`` adds the G test of the same cells with Williams' correction. One draw of what has no probability at all
    is a p of 0.
    """
    seen_SC, counted = seen_SC.double(), int(seen_SC.sum())
    if bool((seen_SC[probs_SC == 0] > 0).any()):
        yield Tested(name, 0.0, float("inf"), 0, counted)
        return
    seen, expected, freedom = pooled(seen_SC, seen_SC.sum(1, keepdim=True) * probs_SC)
    if freedom < 1:
        return
    statistic = float(((seen - expected) ** 2 / expected).sum())
    yield Tested(name, chi_square_tail(statistic, freedom), statistic, freedom, counted)
    if g_test:
        statistic = 2 * float((torch.special.xlogy(seen, seen / expected)).sum())
        statistic /= 1 + float((1 / expected).sum() - 1 / expected.sum()) / (6 * freedom)
        yield Tested(f"{name}, G", chi_square_tail(max(statistic, 0.0), freedom), statistic, freedom, counted)


def independent(name: str, one_N: Tensor, other_N: Tensor) -> Iterator[Tested]:
    """The contingency test of two rows' tokens; rare tokens are taken together until every cell is large enough."""
    count, sides = len(one_N), []
    for side_N in (one_N, other_N):
        often_V = torch.bincount(side_N, minlength=V + 1)
        # Rare ones become one class, and the smallest class must meet the other side's smallest often enough.
        common_V = often_V >= max(count * 0.05, (LEAST * count) ** 0.5)
        sides.append(torch.where(common_V, common_V.cumsum(0), 0)[side_N])
    table = torch.zeros(V + 2, V + 2, dtype=torch.float64)
    table.index_put_((sides[0], sides[1]), torch.ones(count, dtype=torch.float64), accumulate=True)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    while min(table.shape) > 1:
        expected = table.sum(1, keepdim=True) * table.sum(0) / count
        if float(expected.min()) >= LEAST:
            break
        table = merged(table)
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    if freedom:
        statistic = float(((table - expected) ** 2 / expected).sum())
        yield Tested(name, chi_square_tail(statistic, freedom), statistic, freedom, count)


def merged(table: Tensor) -> Tensor:
    """The table with the two smallest classes of its longer side as one."""
    if table.shape[1] > table.shape[0]:
        return merged(table.T).T
    table = table[table.sum(1).argsort()]
    return torch.cat([table[:2].sum(0, keepdim=True), table[2:]])


# -- a decoder's draws -------------------------------------------------------------------------------------------------
def contexts(draws: Draws, place: int) -> Tensor:
    """The number [N] of each draw's context before its token at ``place``: prompt, then the tokens so far."""
    number_N = draws.prompts.clone()
    for before in range(place):
        number_N = number_N * V + draws.tokens[:, before]
    return number_N


def counts(draws: Draws, place: int, which_N: Tensor) -> Tensor:
    """Counts [S, V] of the tokens at ``place`` by context, of the draws that got there and are among ``which``."""
    token_N = draws.tokens[:, place]
    chosen_N = which_N & (token_N < V)
    cells = (contexts(draws, place) * V + token_N)[chosen_N]
    return torch.bincount(cells, minlength=len(PROMPTS) * V ** (place + 1)).view(-1, V)


def over_places(name: str, draws: Draws, probs: Sequence[Tensor], which_NL: Tensor) -> Iterator[Tested]:
    """One test of all tokens that ``which`` [N, L] marks, each against the probabilities of its context.

    Most contexts come up a few times only, so counts are added up over all contexts that end in the same token. Their
    covariance is known exactly, so that the quadratic form of what is seen beyond the expected has a chi-square
    distribution, though the contexts' probabilities differ.
    """
    limit = draws.tokens.shape[1]
    seen_SV = torch.cat([counts(draws, place, which_NL[:, place]) for place in range(limit)]).double()
    exact_SV = torch.cat([probs[place].flatten(0, 1) for place in range(limit)])
    if bool((seen_SV[exact_SV == 0] > 0).any()):
        yield Tested(name, 0.0, float("inf"), 0, int(seen_SV.sum()))
        return
    # The context of no token is a group of its own.
    last_S = torch.cat(
        [
            torch.arange(len(PROMPTS) * V**place) % V if place else torch.tensor([V] * len(PROMPTS))
            for place in range(limit)
        ]
    )
    statistic, freedom = 0.0, 0
    for last in range(V + 1):
        group_S = (last_S == last) & (seen_SV.sum(1) > 0)
        found, free = quadratic(seen_SV[group_S], exact_SV[group_S])
        statistic, freedom = statistic + found, freedom + free
    if freedom:
        yield Tested(name, chi_square_tail(statistic, freedom), statistic, freedom, int(seen_SV.sum()))


def quadratic(seen_SV: Tensor, exact_SV: Tensor) -> tuple[float, int]:
    """The quadratic form of the counts of all strata together, and its degrees of freedom; small cells are pooled."""
    each_S1 = seen_SV.sum(1, keepdim=True)
    expected_V = (each_S1 * exact_SV).sum(0)
    large_V = expected_V >= LEAST
    # Rows of the map are cells: every large token, and the others as one where they are large together.
    cells = [row for row, large in zip(torch.eye(V, dtype=torch.float64), large_V.tolist(), strict=True) if large]
    if float(expected_V[~large_V].sum()) >= LEAST:
        cells.append((~large_V).double())
    if len(cells) < 2:
        return 0.0, 0
    map_CV = torch.stack(cells)
    beyond_C = map_CV @ (seen_SV.sum(0) - expected_V)
    covariance_CC = map_CV @ (expected_V.diag() - (each_S1 * exact_SV).T @ exact_SV) @ map_CV.T
    values, vectors = torch.linalg.eigh(covariance_CC)
    whole_C = values > values.max() * 1e-9
    along_C = (vectors.T @ beyond_C)[whole_C]
    return float((along_C**2 / values[whole_C]).sum()), int(whole_C.sum())


def joint(probs: Sequence[Tensor], limit: int) -> Tensor:
    """Probabilities [P, (V + 1) ** limit] of whole answers, whose tokens after the end are V."""
    alive, done = (
        torch.ones(len(PROMPTS), 1, dtype=torch.float64),
        torch.zeros(len(PROMPTS), (V + 1) ** limit, dtype=torch.float64),
    )
    codes = torch.zeros(1, dtype=torch.long)
    for place in range(limit):
        alive = (alive[..., None] * probs[place]).flatten(1)
        codes = (codes[:, None] * (V + 1) + torch.arange(V)).flatten()
        padded = codes
        for _ in range(limit - place - 1):
            padded = padded * (V + 1) + V
        ended = torch.arange(len(codes)) % V == END
        if place == limit - 1:
            ended = torch.ones_like(ended)
        done.index_add_(1, padded[ended], alive[:, ended])
        alive = alive.masked_fill(ended, 0.0)
    return done


def whole(draws: Draws, probs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Counts and probabilities [P, (V + 1) ** L] of whole answers."""
    limit = draws.tokens.shape[1]
    code_N = draws.prompts.clone()
    for place in range(limit):
        code_N = code_N * (V + 1) + draws.tokens[:, place]
    exact = joint(probs, limit)
    return torch.bincount(code_N, minlength=exact.numel()).view_as(exact), exact


def ends(seen: Tensor, exact: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The same by where the answer ended: its length, and whether the end token or the limit ended it."""
    code = torch.arange(exact.shape[1])
    digits = torch.stack([code // (V + 1) ** place % (V + 1) for place in range(limit)], 1).flip(1)
    length = (digits != V).long().sum(1)
    last = digits.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0]
    kind = length * 2 + (last == END)
    table = [torch.zeros(len(PROMPTS), 2 * limit + 2, dtype=torch.float64) for _ in range(2)]
    for found, values in zip(table, (seen.double(), exact), strict=True):
        found.index_add_(1, kind, values)
    return table[0], table[1]


def every_test(draws: Draws, probs: Sequence[Tensor]) -> Iterator[Tested]:
    """All tests of one cell's draws."""
    seen, exact = whole(draws, probs)
    limit, origins = draws.tokens.shape[1], draws.origins
    yield from compared("whole answer", seen, exact, g_test=True)
    anything = torch.ones_like(origins, dtype=torch.bool)
    place = torch.arange(limit)
    yield from over_places("first token", draws, probs, anything & (place == 0))
    yield from over_places("second token", draws, probs, anything & (place == 1))
    yield from over_places("token at the limit", draws, probs, anything & (place == limit - 1))
    before = torch.cat([torch.full_like(origins[:, :1], -1), origins[:, :-1]], 1)
    yield from over_places("after an accepted token", draws, probs, before == ACCEPTED)
    yield from over_places("after a rejection", draws, probs, before == CORRECTION)
    yield from over_places("bonus token", draws, probs, origins == BONUS)
    yield from compared("end token", *ends(seen, exact, limit))
    for apart in draws.apart:
        # Pairs of one prompt only: two prompts together are a mixture, whose rows depend on each other.
        one = ((torch.arange(len(origins)) // apart) % 2 == 0) & (draws.prompts == 0)
        one[len(one) - len(one) % (2 * apart) :] = False
        for number, at in (("first", 0), ("second", 1)):
            pair = draws.tokens[one, at], draws.tokens[one.roll(apart), at]
            yield from independent(f"rows {apart} apart, {number} token", *pair)


# -- many tests --------------------------------------------------------------------------------------------------------
def holm(ps: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Holm 1979), in their order."""
    corrected, worst = [0.0] * len(ps), 0.0
    for rank, number in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[number]))
        corrected[number] = worst
    return corrected
