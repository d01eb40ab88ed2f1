"""Where redraft keeps files of its own, and which packages are installed: known without loading any of them."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

# Those that can move a figure.
PACKAGES = ("redraft", "torch", "transformers", "safetensors", "numpy", "tokenizers", "peft", "gguf", "reasoning-gym")


def cache_folder() -> Path:
    """Where unpacked models are kept: ``REDRAFT_CACHE``, or ``~/.cache/redraft``."""
    return Path(os.environ.get("REDRAFT_CACHE") or Path.home() / ".cache" / "redraft").expanduser()


def installed() -> dict[str, str]:
    """Versions of Python and of the packages; those that are not installed are absent."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
