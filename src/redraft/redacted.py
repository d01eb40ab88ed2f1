"""Command lines and addresses without what may be secret in them. Nothing heavy is imported here."""

from __future__ import annotations

import re

# Passwords and queries of addresses, and the values of options and variables that hold keys.
NAMES_OF_SECRETS = r"[\w-]*(?:api[-_]?key|(?:auth|access|hf)[-_]?token|password|secret)"
SECRETS = (
    (re.compile(r"(://)\S*@"), r"\1***@"),
    (re.compile(r"(://[^\s?#]+)[?#]\S*"), r"\1?***"),
)
OPTION = re.compile(rf"(--?{NAMES_OF_SECRETS}(?:=|\s+)|\b{NAMES_OF_SECRETS}=)(?:'[^']*'|\"[^\"]*\"|\S+)", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """The text with ``***`` for what of a command line or an address may be secret."""
    for pattern, shown in SECRETS:
        text = pattern.sub(shown, text)
    return without_keys(text)


def without_keys(text: str) -> str:
    """The text with ``***`` for the values of options and variables that hold keys."""
    return OPTION.sub(r"\1***", text)
