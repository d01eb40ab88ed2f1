"""The values of a config.json of other hands, each taken in its type and within its bounds.

JSON has one kind of number and Python takes true for 1: a width that is a text, a half or a truth value is told here by
its name, before anything is computed with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redraft.errors import UserError

# Beyond these no draft is: what is larger is a slip, and would be allotted before it is found out.
LARGEST = 1 << 24
LONGEST = 1 << 31


class Values:
    """A JSON object of the file at ``path``; ``inside`` is its place there where it is not the whole file."""

    def __init__(self, values: Mapping[str, Any], path: Path, inside: str = "") -> None:
        self.values, self.path, self.inside = values, path, inside

    def word(self, key: str) -> str:
        """Where the value of ``key`` stands, for a table."""
        return f"{self.path.name}: {self.inside}{key}"

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def refuse(self, key: str, wanted: str) -> UserError:
        """The error about the value of ``key``, of which ``wanted`` says what it must be."""
        found = repr(self.values.get(key))
        found = found if len(found) <= 60 else f"{found[:57]}..."
        return UserError(
            f"{self.path} is not a usable config: {self.inside}{key} is {found}, a value of the wrong kind or out of "
            f"range; {wanted} is needed"
        )

    def whole(self, key: str, least: int = 1, most: int = LARGEST) -> int | None:
        """The whole number under ``key``; none where it is absent or null. Raises ``UserError``."""
        value = self.values.get(key)
        if value is None:
            return None
        # Some writers turn every number into a float.
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise self.refuse(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, above: float = 0.0, most: float = 1e12) -> float | None:
        """The finite number under ``key``, larger than ``above``; none where there is none. Raises ``UserError``."""
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value) or not above < value <= most:
            raise self.refuse(key, f"a number above {above:g} and up to {most:g}")
        return float(value)

    def flag(self, key: str) -> bool | None:
        """True or false under ``key``, no text that says so; none where there is none. Raises ``UserError``."""
        value = self.values.get(key)
        if value not in (None, True, False) or type(value) not in (type(None), bool):
            raise UserError(
                f"{self.path} has {self.inside}{key} {value!r}; true or false is needed"
            )  # the text "false" would count as on
        return value

    def text(self, key: str) -> str | None:
        """The text under ``key``; none where there is none. Raises ``UserError``."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refuse(key, "a text")
        return value

    def part(self, key: str) -> Values | None:
        """The object under ``key``; none where there is none or it is null. Raises ``UserError``."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refuse(key, "an object")
        return Values(value, self.path, f"{self.inside}{key}.")

    def whole_list(self, key: str, least: int = 0, most: int = LARGEST) -> list[int] | None:
        """The list of whole numbers under ``key``; none where there is none. Raises ``UserError``."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(k) is int for k in value):
            raise UserError(f"{self.path} has {self.inside}{key} {str(value)[:60]!r}; a list of integers is needed")
        if not all(least <= k <= most for k in value):
            raise self.refuse(key, f"a list of numbers from {least} to {most}")
        return value
