"""Top log-probabilities of stored responses, asked of a server and kept beside the response file.

The server scores prompt and response as one prompt (``prompt_logprobs`` of vLLM's ``/v1/completions``), so the
figures are exactly those of the stored tokens, whoever wrote them. They are kept as JSON lines,
``{"key": ..., "top": [[ids], [log-probabilities]]}``, with an entry for every response token after the first. The
response's own token is among them, also where it is not among the likeliest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from redraft.data.server import ServerEngine
from redraft.data.store import Failure, Row
from redraft.data.transport import Transient
from redraft.errors import UserError

# Rounding may lift the logarithm of a certain token a little above zero.
MOST_LOGPROB = 1e-2

Top = tuple[list[list[int]], list[list[float]]]
"""Token ids and log-probabilities for every response token after the first."""


def parse_top(value: Any, count: int) -> Top:
    """A stored entry ``[[ids], [log-probabilities]]`` of ``count`` positions. Raises ``ValueError``."""
    try:
        ids = [[int(i) for i in row] for row in value[0]]
        values = [[float(x) for x in row] for row in value[1]]
    except (TypeError, ValueError, IndexError, KeyError):
        raise ValueError("no lists of ids and log-probabilities") from None
    whole = len(ids) == len(values) == count and all(len(a) == len(b) > 0 for a, b in zip(ids, values, strict=True))
    if not whole or not all(math.isfinite(x) for row in values for x in row) or any(i < 0 for r in ids for i in r):
        raise ValueError(f"not {count} positions of ids with finite log-probabilities")
    return ids, values


class TopEngine(ServerEngine):
    """Asks for the ``count`` likeliest tokens at every response token."""

    def __init__(self, url: str, model: str | None, count: int, concurrency: int = 32, **options: Any) -> None:
        super().__init__(url, model, concurrency, **options)
        self.count = count

    def tops(self, rows: Sequence[Row]) -> Iterator[tuple[str, Top] | Failure]:
        """Each row's key and figures, or a failure, as the server finishes them.

        Figures of an id beyond the vocabulary are no answer. Raises ``UserError`` when the server gives no
        log-probabilities, cannot be reached or stops answering.
        """
        yield from self.ask([(row.key, row) for row in rows], lambda row: (row.key, self._figures(row)))

    def _figures(self, row: Row) -> Top:
        body = {
            "model": self.model,
            "prompt": [*row.prompt_ids, *row.response_ids],
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self.count,
        }
        found = read_tops(self._connection.json("POST", "/v1/completions", body), row, self.url)
        highest, size = max(map(max, found[0])), self.vocab_size
        if size is not None and highest >= size:
            raise Transient(f"log-probabilities of token id {highest}, and the target's vocabulary has {size}")
        return found


def read_tops(value: dict[str, Any], row: Row, url: str) -> Top:
    """The figures in a server's answer. Raises ``UserError`` where it has none, ``Transient`` where they do not fit."""
    try:
        found = value["choices"][0].get("prompt_logprobs")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Transient("an answer without choices") from None
    if found is None:
        raise UserError(
            f"the server at {url} gives no log-probabilities of a prompt; use one that does (vLLM), or train on its "
            "answers alone with --teacher tokens"
        )
    begin, end = len(row.prompt_ids) + 1, len(row.prompt_ids) + len(row.response_ids)
    try:
        entries = [{int(i): float(entry["logprob"]) for i, entry in place.items()} for place in found[begin:end]]
        if any(i < 0 or x > MOST_LOGPROB for entry in entries for i, x in entry.items()):
            raise ValueError
    except (TypeError, ValueError, OverflowError, AttributeError, KeyError):
        raise Transient("log-probabilities in no known form") from None
    # JSON has no infinity: a token that cannot be comes as the least number there is, or not at all.
    likely = [{i: x for i, x in entry.items() if math.isfinite(x)} for entry in entries]
    if len(likely) != len(row.response_ids) - 1 or not all(likely):
        raise Transient(f"log-probabilities of {len(likely)} tokens where {len(row.response_ids) - 1} were asked for")
    return [list(entry) for entry in likely], [list(entry.values()) for entry in likely]


def read_top_file(path: Path, rows: Sequence[Row]) -> dict[str, Top]:
    """The figures stored for ``rows``; a torn last line is left out. Raises ``UserError`` for any other damage."""
    counts = {row.key: len(row.response_ids) - 1 for row in rows}
    found: dict[str, Top] = {}
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if value["key"] in counts:
                found[value["key"]] = parse_top(value["top"], counts[value["key"]])
        except (ValueError, KeyError, TypeError) as error:
            if not line.endswith("\n"):
                break
            raise UserError(f"{path}:{number}: {error}; delete the file and run the same command again") from None
    return found


def ask_tops(
    engine: TopEngine, rows: Sequence[Row], path: Path, progress: Callable[..., None] | None = None
) -> dict[str, Top]:
    """The figures of every row, asked for where ``path`` does not have them yet; a stopped run goes on.

    Raises ``UserError`` when any row has none in the end; what came is kept.
    """
    wanted = [row for row in rows if len(row.response_ids) > 1]
    size = engine.vocab_size
    found = read_top_file(path, wanted)
    # figures of ids that the target does not have are asked for again
    found = {key: top for key, top in found.items() if size is None or max(map(max, top[0])) < size}
    kept = "".join(json.dumps({"key": key, "top": top}) + "\n" for key, top in found.items())
    failures: list[Failure] = []
    with open(path, "w") as file:
        file.write(kept)
        missing = [row for row in wanted if row.key not in found]
        for outcome in engine.tops(missing) if missing else ():
            if isinstance(outcome, Failure):
                failures.append(outcome)
                continue
            found[outcome[0]] = outcome[1]
            file.write(json.dumps({"key": outcome[0], "top": outcome[1]}) + "\n")
            file.flush()
            if progress:
                progress(len(found))
    if failures:
        raise UserError(
            f"{len(failures)} of {len(wanted)} responses got no log-probabilities, first {failures[0].key}: "
            f"{failures[0].reason}; the same command asks again"
        )
    return found
