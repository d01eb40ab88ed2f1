"""Tables of a draft that are longer or shorter than the target's: padded to round sizes, or grown by a few tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from redraft.errors import UserError

MAPS = ("d2t", "t2d")

# By so many rows a table of a vocabulary may differ from another of the same tokenizer: tables are padded to round
# sizes, and a few special tokens are added. In small vocabularies it is an eighth at most.
PADDING = 512
SHARE = 8


def padded(rows: int, target_rows: int) -> bool:
    """Whether tables of so many rows may be of one tokenizer."""
    difference = abs(rows - target_rows)
    return difference < PADDING and SHARE * difference <= target_rows


def fit_rows(
    state: dict[str, Tensor], draft_rows: int, rows: int, target_rows: int, where: Path, notes: list[str]
) -> int:
    """Bring ``t2d``, the embedding and a head over all ``rows`` of the draft's table to the target's number of rows.

    ``draft_rows`` is the draft vocabulary; the one that comes of it is given back: a head that is longer than the
    target's loses the rows of padding, one that is shorter is a reduced vocabulary. The state is changed in place.
    Raises ``UserError`` where ids that are left out are among those that the draft says.
    """
    more = rows > target_rows
    for name in ("t2d", "embed_tokens.weight"):
        table = state.get(name)
        if table is None or len(table) != rows:
            continue
        if more and name == "t2d" and bool(table[target_rows:].any()):
            raise UserError(f"{where}: t2d marks ids beyond the target's vocabulary of {target_rows}")
        state[name] = (
            table[:target_rows] if more else torch.cat([table, table.new_zeros(target_rows - rows, *table.shape[1:])])
        )
    change = "rows of padding were left out" if more else "rows were added, for ids that the draft does not know"
    notes.append(
        f"the draft's vocabulary has {rows} rows and the target's {target_rows}; {abs(rows - target_rows)} {change}"
    )
    if draft_rows != rows:
        return draft_rows
    for name in MAPS:
        if name in state and not bool((state[name][: min(rows, target_rows)] == (name == "t2d")).all()):
            raise UserError(f"{where}: {name} maps a full vocabulary, and not onto itself; delete it, or mend the head")
        state.pop(name, None)
    head = state.get("lm_head.weight")
    if more and head is not None:
        state["lm_head.weight"] = head[:target_rows]
    if not more:
        state["d2t"] = torch.zeros(rows, dtype=torch.int64)
        state["t2d"] = torch.arange(target_rows) < rows
    return min(rows, target_rows)
