"""Builders of tiny random models and of a tiny tokenizer. Nothing here is fetched.

The tests load it with ``runpy``, since test files cannot import each other.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>", "<pad>")
MERGES = tuple("th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le".split())
VOCAB_SIZE = 128
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """128 tokens: 4 special ones, line break and printable ASCII, and a few merged pairs; ChatML template."""
    characters = ["\n"] + [chr(code) for code in range(32, 127)]
    words = [*SPECIAL, *characters, *MERGES][:VOCAB_SIZE]
    merges = [(pair[0], pair[1]) for pair in words if len(pair) == 2]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def build_model(architecture: str = "llama", seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A random float32 causal LM: 6 layers of width 32, 4 heads on 2 key heads, 128 tokens, context 512."""
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "tie_word_embeddings": False,
        # wide enough that the layers change the stream: the usual 0.02 leaves every logit near the embedding's
        "initializer_range": 0.2,
    }
    if architecture == "qwen3":
        shape["head_dim"] = 8
    config = AutoConfig.for_model(architecture, **(shape | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
