"""Pretraining throughput against a bare training loop of the same model in plain PyTorch, on the same machine.

The bare loop is what one would write first: blocks of random tokens that are in memory already, the model's own loss,
backward, clipping, AdamW; autocast as ours. Ours does all that and tokenises text, runs head and loss in portions,
checks every loss and gradient, and could be killed. Both do the same steps in turn, several times, so that the
machine's moods hit both; the middle ratio of the rounds counts.

    PYTHONPATH=src python benchmarks/pretrain.py --layers 4 --width 1024 --inner 2816 --heads 8 --steps 20 --device cuda
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from redraft import provenance
from redraft.artifact import atomic_write_json
from redraft.data.packed import PackedText, TextSource
from redraft.drafts.standalone.objective import CausalModel
from redraft.loading import load_tokenizer
from redraft.settings.training import PretrainConfig
from redraft.training.causal import text_steps
from redraft.training.loop import TrainingLoop
from redraft.training.optimizer import make_optimizers
from redraft.training.workers import SINGLE

WORDS = (
    "the of and to in that was he it with as his on be at by had not but from have are which one you were all".split()
)


def build(arguments: argparse.Namespace, vocabulary: int) -> Any:
    """The model that both train, from the same seed."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=arguments.width,
        intermediate_size=arguments.inner,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads,
        tie_word_embeddings=arguments.tied,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(arguments.device)


def bare_steps(model: Any, config: PretrainConfig, device: str) -> Iterator[None]:
    """Optimiser steps of the plain loop, without end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    autocast = config.precision == "bfloat16"
    block_BT = torch.randint(0, model.config.vocab_size, (config.batch_blocks, config.length + 1), device=device)
    model.train()
    while True:
        parts = block_BT.split(config.micro_blocks)
        for part in parts:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
                loss = model(input_ids=part, labels=part).loss * len(part) / len(block_BT)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def our_steps(model: Any, text: PackedText, config: PretrainConfig, folder: Path) -> Iterator[None]:
    """Optimiser steps of ours, without end: the reader of text included, evaluation and checkpoints not."""
    causal = CausalModel(model)
    source = partial(text_steps, causal, text, config, SINGLE)
    lm, trained = causal.model.float(), causal.trained
    loop = TrainingLoop(lm, trained, source, 10**6, lambda: 0.0, config, folder, {}, precision=config.precision)
    optimizers = make_optimizers(loop.trained, config.optimizer, config.weight_decay)
    state = loop.start(optimizers)
    with closing(loop.steps(0, {})) as steps:  # type: ignore[type-var]
        for step in steps:
            loop.advance(step, optimizers, state, None)
            yield


def timed(steps: Iterator[None], count: int, wait: Callable[[], None]) -> float:
    """Seconds of ``count`` steps."""
    wait()
    began = time.perf_counter()
    for _ in range(count):
        next(steps)
    wait()
    return time.perf_counter() - began


def write_text(path: Path, size: int) -> Path:
    """About ``size`` bytes of words in a fixed random order."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(WORDS), (size // 4,), generator=generator).tolist()
    words = [WORDS[i] for i in drawn]
    path.write_text("\n".join(" ".join(words[i : i + 15]) for i in range(0, len(words), 15)))
    return path


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of both, and the ratio."""
    tokenizer = load_tokenizer(arguments.tokenizer)
    config = PretrainConfig(
        length=arguments.length,
        batch_tokens=arguments.batch_tokens,
        micro_tokens=arguments.micro_tokens,
        precision=arguments.precision,
    )
    wait = torch.cuda.synchronize if arguments.device.startswith("cuda") else lambda: None
    tokens = config.batch_blocks * config.length * arguments.steps
    with tempfile.TemporaryDirectory(prefix="redraft-pretrain-") as place:
        folder = Path(place)
        named = arguments.text or [str(write_text(folder / "words.txt", 4_000_000))]
        text = PackedText(TextSource(named), tokenizer, config.length)
        seconds: dict[str, list[float]] = {"bare": [], "ours": []}
        bare = bare_steps(build(arguments, len(tokenizer)), config, arguments.device)
        ours = our_steps(build(arguments, len(tokenizer)), text, config, folder / "run")
        with closing(ours):  # type: ignore[type-var]
            for steps in (bare, ours):
                timed(steps, arguments.warm, wait)
            for number in range(arguments.rounds):
                pairs = [("bare", bare), ("ours", ours)]
                for name, steps in pairs if number % 2 == 0 else pairs[::-1]:
                    seconds[name].append(timed(steps, arguments.steps, wait))
    ratios = sorted(b / o for b, o in zip(seconds["bare"], seconds["ours"], strict=True))
    return {
        "schema": "redraft.bench-pretrain/1",
        "settings": {k: v for k, v in vars(arguments).items() if k != "out"},
        "tokens_per_second": {name: tokens / statistics.median(found) for name, found in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "provenance": provenance.collect(seed=0, device=arguments.device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="embedded:smollm2-135m-instruct", help="whose tokenizer and vocabulary")
    parser.add_argument("--text", nargs="*", help="text files; by default words in random order")
    for name, value in (("layers", 4), ("width", 256), ("inner", 704), ("heads", 4), ("length", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--micro-tokens", type=int, default=2048)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--least", type=float, default=0.9, help="exit with 1 below this ratio")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    record = measure(arguments)
    if arguments.out:
        atomic_write_json(arguments.out, record)
    print(json.dumps({k: record[k] for k in ("tokens_per_second", "ratio", "ratio_range")}))
    sys.exit(int(record["ratio"] < arguments.least))


if __name__ == "__main__":
    main()
