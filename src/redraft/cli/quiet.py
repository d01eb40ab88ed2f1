"""Libraries that talk to a user about themselves are silenced before they are loaded.

What matters of their warnings is raised by redraft as an error of its own where it happens. Variables that the user
has set stay as they are, and ``redraft --debug`` silences nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

VARIABLES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
    "DATASETS_VERBOSITY": "error",
    # Any value silences the tokenizers' warning about forks; this one keeps them as fast as they are.
    "TOKENIZERS_PARALLELISM": "true",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def quiet_libraries() -> None:
    """Call it before anything heavy is imported. ``python -W`` and ``PYTHONWARNINGS`` win over it."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # What libraries log without a handler of their own goes through this one (matplotlib's font cache, for one).
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.ERROR)
    for name in ("torch", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
