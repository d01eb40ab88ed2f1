"""Opening targets and tokenizers: a folder, a hub id, a PEFT adapter, or an embedded model.

``places`` finds the files, ``checkpoint`` reads a model strictly, ``quantised`` knows what quantised checkpoints
compute, ``adapters`` merges PEFT adapters, ``tokenizers`` reads and compares tokenizers, and ``targets`` puts these
together.
"""

from redraft.loading.places import (
    ADAPTER_FILE,
    CACHE_FILES,
    EMBEDDED,
    EMBEDDED_PREFIX,
    HUB_SECONDS,
    adapter_base,
    gguf_of,
    locate,
)
from redraft.loading.quiet import one_line, quiet
from redraft.loading.targets import load_target, load_tokenizer, notes_of, served_otherwise
from redraft.loading.tokenizers import check_tokenizers, tokenizer_hash

__all__ = [
    "ADAPTER_FILE",
    "CACHE_FILES",
    "EMBEDDED",
    "EMBEDDED_PREFIX",
    "HUB_SECONDS",
    "adapter_base",
    "check_tokenizers",
    "gguf_of",
    "load_target",
    "load_tokenizer",
    "locate",
    "notes_of",
    "one_line",
    "quiet",
    "served_otherwise",
    "tokenizer_hash",
]
