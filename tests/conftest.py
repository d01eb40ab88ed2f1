"""Tiny random models and a tiny tokenizer that the tests share. Nothing here is fetched."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from redraft.cli import main
from redraft.target import Target

ARCHITECTURES = ("llama", "qwen2", "qwen3")
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


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices gain nothing from threads, and threads fight over the cores of small machines."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_target() -> Callable[..., Target]:
    """``tiny_target(architecture="llama", seed=0, taps=None, **config)`` -> a fresh random float32 Target."""

    def make(architecture: str = "llama", seed: int = 0, taps: tuple[int, ...] | None = None, **config: Any) -> Target:
        model = build_model(architecture, seed, **config)
        return Target(model, build_tokenizer(), name=f"tiny-{architecture}", taps=taps)

    return make


@pytest.fixture
def redraft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``redraft("report x.json")`` -> (exit code, standard output, standard error)."""

    def run(command: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["redraft", *command.split()])
        try:
            main.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
