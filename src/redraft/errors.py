"""The one exception that a user's mistake raises.

The command line prints ``UserError`` as one line and exits with code 2; everything else is a defect of ours, exit
code 1, whose traceback goes to a file (``cli/failures.py``).
"""

import unicodedata


def printable(text: str) -> str:
    """The text as one line that acts on nothing: line breaks, controls and marks that turn the writing round are
    spelled out, for a name may hold anything, and a terminal does what it is sent."""
    return text if text.isprintable() else "".join(map(_seen, text))


def _seen(character: str) -> str:
    blank = unicodedata.category(character) == "Zs"  # any of the blanks that languages write
    return character if blank or character.isprintable() else ascii(character)[1:-1]


class UserError(Exception):
    """Bad input. The message is one line that says what is wrong, where, and how to mend it.

    It is one line also where a name that it tells of is not: a file or a tensor may be called anything.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
