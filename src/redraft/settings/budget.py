"""Budgets of selection: a share (``25%``, ``0.25``), a number of rows (``400``, ``4k``) or of tokens (``60k tokens``).

A plain whole number is rows; ``1.0`` and ``100%`` are everything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from redraft.errors import UserError

Kind = Literal["fraction", "rows", "tokens"]

_FORM = re.compile(
    r"(?P<number>\d[\d_,]*(?:\.\d+)?|\.\d+)\s*(?P<scale>[km]?)\s*(?P<unit>%|tokens?|rows?)?", re.IGNORECASE
)
_SCALES = {"": 1, "k": 1_000, "m": 1_000_000}
_EXAMPLES = "write a share (25% or 0.25), a number of rows (400) or of tokens (60k tokens)"


@dataclass(frozen=True)
class Budget:
    """What may be selected. ``amount`` is a share in (0, 1] for ``fraction``, else a whole number."""

    kind: Kind
    amount: Decimal
    text: str

    @property
    def whole(self) -> bool:
        """Whether everything is kept, whatever its score."""
        return self.kind == "fraction" and self.amount == 1

    def rows_of(self, total: int) -> int | None:
        """Rows that the budget allows of ``total``, rounded down; ``None`` for a budget of tokens."""
        if self.kind == "tokens":
            return None
        return min(total, int(self.amount if self.kind == "rows" else self.amount * total))


def parse_budget(text: str) -> Budget:
    """Read a budget. Raises ``UserError`` when it is malformed, above 100% or zero, whatever the data."""
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise UserError(f"budget {text!r} is not understood; {_EXAMPLES}")
    written, scale, unit = found["number"], found["scale"].lower(), (found["unit"] or "").lower().rstrip("s")
    amount = Decimal(written.replace("_", "").replace(",", "")) * _SCALES[scale]
    kind: Kind = "rows"
    if unit == "token":
        kind = "tokens"
    elif unit == "%":
        kind, amount = "fraction", amount / 100
    elif "." in written and not scale and not unit:
        kind = "fraction"
    if kind == "fraction" and (scale or amount > 1):
        raise UserError(f"budget {text!r} is more than everything; {_EXAMPLES}")
    if kind != "fraction" and amount != int(amount):
        raise UserError(f"budget {text!r} is not a whole number of {kind}; {_EXAMPLES}")
    if amount == 0:
        raise UserError(f"budget {text!r} selects nothing; {_EXAMPLES}")
    return Budget(kind, amount, text.strip())
