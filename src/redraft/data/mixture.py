"""General text among the text of a domain, so that a draft keeps its speed on everything else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from redraft.data.store import Row
from redraft.errors import UserError


def mix(rows: Sequence[Row], general_rows: Sequence[Row], share: float, seed: int = 0) -> list[Row]:
    """All of ``rows``, and behind them so many general ones that these hold ``share`` of all response tokens.

    Response tokens are what training is paid for and learns from. Which general rows are taken depends on the seed
    and their keys alone: a larger share takes the same rows and more. As many are taken as come nearest to the share,
    at least one for a share above 0; both groups stay in their own order. Raises ``UserError`` for a share outside
    [0, 1), no rows, a key that is in both groups, and general rows that hold too few tokens.
    """
    if not 0 <= share < 1:
        raise UserError(f"the share of general text must be at least 0 and below 1, not {share}")
    if not rows:
        raise UserError("there are no rows to mix general text into; regenerate some first")
    if share == 0:
        return list(rows)
    twice = {row.key for row in rows} & {row.key for row in general_rows}
    if twice:
        raise UserError(f"{len(twice)} rows are in both the data and the general text, first {min(twice)}; rename ids")
    wanted = share / (1 - share) * sum(len(row.response_ids) for row in rows)
    held = sum(len(row.response_ids) for row in general_rows)
    if held < wanted:
        raise UserError(
            f"a share of {share:.3g} needs {wanted:,.0f} tokens of general responses and there are {held:,}; "
            "give more general rows or a smaller share"
        )
    ranked = sorted(general_rows, key=lambda row: hashlib.sha256(f"{seed}|{row.key}".encode()).digest())
    taken: set[str] = set()
    tokens = 0
    for row in ranked:
        size = len(row.response_ids)
        # Over by less than short by is nearer; the first row is taken whatever its size.
        if taken and tokens + size - wanted > wanted - tokens:
            break
        taken.add(row.key)
        tokens += size
    return [*rows, *(row for row in general_rows if row.key in taken)]
