"""Results that print well: as text, in colours on a terminal, and in a notebook."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.text import Text

from redraft.errors import printable

WIDTH = 140
# What a notebook puts the text into: tables keep their shape, whatever the page's own style is.
HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:1.2;font-family:monospace">{code}</pre>'


class Shown:
    """A result that shows itself as :meth:`__rich__` says, in ``print`` and at the end of a notebook's cell alike."""

    def __rich__(self) -> Any:
        """What rich prints for it: a table, a panel, a text or a group of these."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self._console().file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        return self._console().export_html(inline_styles=True, code_format=HTML)

    def show(self, console: Console) -> None:
        """Print it; lines of text are not broken, however long they are."""
        found = self.__rich__()
        for part in found.renderables if isinstance(found, Group) else [found]:
            console.print(part, soft_wrap=isinstance(part, Text))

    def _console(self) -> Console:
        console = Console(file=io.StringIO(), width=WIDTH, record=True, highlight=False)
        self.show(console)
        return console


def lines(*texts: str) -> Text:
    """Plain lines, which are not wrapped."""
    return Text("\n".join(map(printable, texts)))


def told(text: str) -> str:
    """A name or a sentence for a table: one line in which no character is markup or acts on the terminal."""
    return escape(printable(text))


def value_words(value: Any) -> str:
    """A value of a config as tables show it: ``true``, ``none``, ``2, 3, 5``, ``rope_theta 10000, factor 2``."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {value_words(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_words, value)) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
