"""The one exception that a user's mistake raises.

The command line prints ``UserError`` as one line and exits with code 2; everything else is a defect of ours, exit
code 1, whose traceback goes to a file (``cli/failures.py``).
"""


class UserError(Exception):
    """Bad input. The message is one line that says what is wrong, where, and how to mend it.

    It is one line also where a name that it tells of is not: a file or a tensor may be called anything.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))
