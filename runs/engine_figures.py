"""What the answers of an engine say: counters, speeds, and how they stand beside our own chain's on the same prompts.

A row is one answer: ``id``, ``ids``, ``seconds``, ``rounds``, ``drafted``, ``accepted``, ``per_position`` (how many
rounds accepted the token at each position) and, where the engine tells, ``accepted_by_round``.

Engines end an answer in two ways. Where the limit leaves room for k tokens, one kind drafts its full length all the
same and counts what was accepted beyond the limit (vLLM); the other drafts k - 1, and no round at all for the last
token (llama.cpp, transformers). Our own chain goes on a little beyond the limit, so that its rounds can be counted
either way, and like stands beside like.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redraft.evaluate.statistics import Interval, paired_ratio, ratio_of_sums

Row = dict[str, Any]


def row(id: str, ids: list[int], seconds: float, accepted: Sequence[int], drafted: Sequence[int], gamma: int) -> Row:
    """One answer from the accepted and drafted tokens of every round."""
    per_position = [sum(count > position for count in accepted) for position in range(gamma)]
    found = {"id": id, "ids": ids, "seconds": seconds, "rounds": len(accepted), "per_position": per_position}
    return found | {"drafted": sum(drafted), "accepted": sum(accepted), "accepted_by_round": list(accepted)}


def counted(rows: Sequence[Row], limit: int, gamma: int, beyond: bool) -> list[Row]:
    """Answers that go on for ``gamma`` tokens beyond ``limit``, as an engine counts them that ends there.

    ``beyond``: it drafts its full length in the last round too.
    """
    found = []
    for each in rows:
        produced, accepted, drafted = 1, [], []
        for count in each["accepted_by_round"]:
            room = gamma if beyond else min(gamma, limit - produced - 1)
            if produced < limit and room > 0:
                accepted.append(min(count, room))
                drafted.append(room)
            produced += count + 1
        found.append(row(each["id"], each["ids"][:limit], each["seconds"], accepted, drafted, gamma))
    return found


def tau(rows: Sequence[Row]) -> Interval:
    """1 + accepted / rounds, with the bootstrap interval over prompts."""
    return ratio_of_sums([each["accepted"] + each["rounds"] for each in rows], [each["rounds"] for each in rows])


def positions(rows: Sequence[Row]) -> list[Interval]:
    """Share of all rounds that accepted the token at each position, with intervals over prompts."""
    rounds = [each["rounds"] for each in rows]
    return [
        ratio_of_sums(list(column), rounds) for column in zip(*(each["per_position"] for each in rows), strict=True)
    ]


def beside(rows: Sequence[Row], ours: Sequence[Row]) -> dict[str, Any]:
    """An engine's counters beside our own, which must be counted as the engine counts."""
    theirs, mine = tau(rows), tau(ours)
    told = all(each["per_position"] for each in rows if each["rounds"])
    by_position = {"ours": [each.to_dict() for each in positions(ours)]}
    if told:
        by_position["engine"] = [each.value for each in positions(rows)]
    found = {
        "tau_engine": theirs.value,
        "tau_ours": mine.to_dict(),
        "prompts": len(rows),
        "within_interval": mine.low <= theirs.value <= mine.high,
        "difference": theirs.value - mine.value,
        "rounds": {"engine": sum(each["rounds"] for each in rows), "ours": sum(each["rounds"] for each in ours)},
        "accepted": {"engine": sum(each["accepted"] for each in rows), "ours": sum(each["accepted"] for each in ours)},
        "proposed": {"engine": sum(each["drafted"] for each in rows), "ours": sum(each["drafted"] for each in ours)},
        "per_position": by_position,
        "same_text": sum(each["ids"] == mine["ids"] for each, mine in zip(rows, ours, strict=True)),
        "same_counts": sum(same_counts(*pair) for pair in zip(rows, ours, strict=True)),
    }
    if all("accepted_by_round" in each for each in rows):
        pairs = zip(rows, ours, strict=True)
        found["same_rounds"] = sum(a["accepted_by_round"] == b["accepted_by_round"] for a, b in pairs)
    return found


def same_counts(left: Row, right: Row) -> bool:
    """Whether two engines counted the same rounds and accepted tokens in an answer."""
    return all(left[name] == right[name] for name in ("rounds", "accepted"))


def speeds(rows: Sequence[Row], plain: Sequence[Row]) -> dict[str, Any]:
    """Tokens a second with the draft and plain in the same engine, and the speed-up, paired over prompts."""
    (tokens, seconds), base = [
        ([len(each["ids"]) for each in part], [each["seconds"] for each in part]) for part in (rows, plain)
    ]
    return {
        "tok_s": ratio_of_sums(tokens, seconds).to_dict(),
        "tok_s_plain": ratio_of_sums(*base).to_dict(),
        "speedup": paired_ratio((tokens, seconds), base).to_dict(),
        "text_as_its_own_plain": sum(a["ids"] == b["ids"] for a, b in zip(rows, plain, strict=True)),
    }
