"""General text mixed into a domain's: the share by tokens, the choice, the refusals."""

from __future__ import annotations

import random

import pytest

from redraft.data.store import Row
from redraft.errors import UserError
from redraft.rows import mix


def rows(name: str, count: int, longest: int = 60, seed: int = 0) -> list[Row]:
    source = random.Random(seed)
    return [
        Row(f"{name}{i}", [1, 2], [5] * source.randint(2, longest), 0.0, 0, 1.0, 0, "stop", "hash")
        for i in range(count)
    ]


def tokens(found: list[Row]) -> int:
    return sum(len(row.response_ids) for row in found)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8])
def test_the_share_is_by_tokens_and_as_near_as_rows_allow(share: float) -> None:
    domain, general = rows("d", 60), rows("g", 400, seed=1)
    mixed = mix(domain, general, share)
    assert mixed[:60] == domain
    added = mixed[60:]
    wanted = share / (1 - share) * tokens(domain)
    assert abs(tokens(added) - wanted) <= 30  # half of the longest row
    assert tokens(added) / tokens(mixed) == pytest.approx(share, abs=0.015)
    assert [row for row in general if row in added] == added and len(set(map(id, added))) == len(added)


def test_the_choice_depends_on_seed_and_keys_alone_and_grows_with_the_share() -> None:
    domain, general = rows("d", 20), rows("g", 200, seed=1)
    chosen = {row.key for row in mix(domain, general, 0.3, seed=1)[20:]}
    assert {row.key for row in mix(domain, general[::-1], 0.3, seed=1)[20:]} == chosen
    assert {row.key for row in mix(domain, general, 0.3, seed=2)[20:]} != chosen
    assert {row.key for row in mix(domain, general, 0.5, seed=1)[20:]} > chosen
    assert mix(domain, [], 0.0) == domain


def test_a_small_share_takes_one_row_and_exactly_enough_is_enough() -> None:
    domain = rows("d", 3)
    assert len(mix(domain, rows("g", 50, seed=1), 0.001)) == 4
    twin = [Row(f"g{row.id}", row.prompt_ids, row.response_ids, 0.0, 0, 1.0, 0, "stop", "hash") for row in domain]
    assert mix(domain, twin, 0.5) == domain + twin


def test_mistakes_are_one_line() -> None:
    domain, general = rows("d", 20), rows("g", 2, seed=1)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="at least 0 and below 1"):
            mix(domain, general, share)
    with pytest.raises(UserError, match="no rows"):
        mix([], general, 0.2)
    with pytest.raises(UserError, match=f"needs {tokens(domain):,} tokens .* there are {tokens(general):,}; give more"):
        mix(domain, general, 0.5)
    with pytest.raises(UserError, match="1 rows are in both the data and the general text, first d3@T0"):
        mix(domain, [*general, domain[3]], 0.2)
