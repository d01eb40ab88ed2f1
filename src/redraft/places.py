"""What surrounds a run: where redraft keeps files of its own, which packages are installed, and what may be told of a
command line. Known without loading any package."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from importlib import metadata
from pathlib import Path

# Those that can move a figure.
PACKAGES = ("redraft", "torch", "transformers", "safetensors", "numpy", "tokenizers", "peft", "gguf", "reasoning-gym")


def at_home(place: str | Path) -> Path:
    """The path with the user's folder in place of ``~``; as it is where there is no such user, or none is known."""
    return Path(os.path.expanduser(place))


def cache_folder() -> Path:
    """Where unpacked models are kept: ``REDRAFT_CACHE``, or ``~/.cache/redraft``; without a home, that of this user
    among temporary files."""
    place = at_home(os.environ.get("REDRAFT_CACHE") or "~/.cache/redraft")
    return Path(tempfile.gettempdir(), f"redraft-{os.getuid()}") if place.parts[:1] == ("~",) else place


def installed() -> dict[str, str]:
    """Versions of Python and of the packages; those that are not installed are absent."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# -- what may be secret ------------------------------------------------------------------------------------------------
# Passwords and queries of addresses, and the values of options and variables that hold keys.
NAMES_OF_SECRETS = r"[\w-]*(?:api[-_]?key|(?:auth|access|hf)[-_]?token|password|secret)"
SECRETS = (
    (re.compile(r"(://)\S*@"), r"\1***@"),
    (re.compile(r"(://[^\s?#]+)[?#]\S*"), r"\1?***"),
)
# What is a key wherever it stands: behind "Bearer", or of the look that well-known services give their keys.
BEARER = re.compile(r"(\bbearer\s+)[^\s'\"]+", re.IGNORECASE)
LOOKS = re.compile(r"\b(?:sk-|hf_|ghp_|github_pat_|glpat-)[\w-]{16,}")
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
LEAST_SECRET = 8  # characters; a shorter value is a word such as "none", which any text may hold
OPTION = re.compile(rf"(--?{NAMES_OF_SECRETS}(?:=|\s+)|\b{NAMES_OF_SECRETS}=)(?:'[^']*'|\"[^\"]*\"|\S+)", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """The text with ``***`` for what of a command line or an address may be secret."""
    for pattern, shown in SECRETS:
        text = pattern.sub(shown, text)
    return without_keys(text)


def without_keys(text: str) -> str:
    """The text with ``***`` for the values of options and variables that hold keys, for the keys of this environment,
    and for what looks like a key."""
    text = LOOKS.sub("***", BEARER.sub(r"\1***", OPTION.sub(r"\1***", text)))
    values = {v for name, v in os.environ.items() if SECRET_NAME.search(name) and len(v.strip()) >= LEAST_SECRET}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value.strip(), "***")
    return text
