"""Opening targets and tokenizers: a folder, a hub id, a PEFT adapter, or an embedded model.

``places`` finds the files, ``checkpoint`` reads a model strictly, ``quantised`` knows what quantised checkpoints
compute, ``adapters`` merges PEFT adapters, ``tokenizers`` reads and compares tokenizers, ``targets`` puts these
together, and ``parts`` reads facts and head without the model.
"""

from redraft.loading.parts import open_facts, open_head, read_facts
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
from redraft.loading.targets import load_target, load_tokenizer
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
    "one_line",
    "open_facts",
    "open_head",
    "quiet",
    "read_facts",
    "tokenizer_hash",
]
