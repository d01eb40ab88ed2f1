"""Opening targets and tokenizers: a folder, a hub id, a PEFT adapter, or an embedded model.

``places`` finds the files, ``checkpoint`` reads a model strictly, ``quantised`` knows what quantised checkpoints
compute, ``adapters`` merges PEFT adapters, and ``targets`` puts these together: the whole target, or its facts and head
without the model, and its tokenizer.
"""

from redraft.loading.checkpoint import config_at
from redraft.loading.places import ADAPTER_FILE, CACHE_FILES, adapter_base, gguf_of, locate, one_line, quiet
from redraft.loading.targets import check_tokenizers, load_target, load_tokenizer, read_facts, tokenizer_hash

__all__ = ["ADAPTER_FILE", "CACHE_FILES", "adapter_base", "config_at", "gguf_of", "locate", "one_line", "quiet"]
__all__ += ["check_tokenizers", "load_target", "load_tokenizer", "read_facts", "tokenizer_hash"]
