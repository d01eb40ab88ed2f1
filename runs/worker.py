"""What the engines' workers share: their arguments, their prompts, their turns and the file that they leave.

A worker runs in its engine's own environment, so this is the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = Callable[[list[int], int], dict[str, Any]]
"""(token ids of a prompt, most new tokens) -> ids, finish_reason, rounds and what else the engine counts."""


def worker_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every worker takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--target", required=True, help="checkpoint, as the engine reads it")
    parser.add_argument("--draft", default="", help="the draft, as the engine reads it; plain decoding without one")
    parser.add_argument("--prompts", required=True, help='JSONL of {"id", "prompt_ids": [...]}')
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--speculative-tokens", type=int, required=True)
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--warmup", type=int, default=2, help="prompts that are decoded before the clock runs")
    parser.add_argument("--turns", type=int, help="descriptor to tell on; every prompt then waits for a line of input")
    return parser


def read_prompts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts in the order of the file."""
    return [json.loads(line) for line in Path(options.prompts).read_text().splitlines() if line.strip()]


def work(start: Callable[[argparse.Namespace], tuple[dict[str, Any], Answer]], options: argparse.Namespace) -> None:
    """Start the engine, warm it up, answer every prompt in its turn, and leave the record whole or not at all.

    ``start`` gives what is to be said of the engine, and its answers to one prompt at a time.
    """
    prompts, began = read_prompts(options), time.perf_counter()
    record, answer = start(options)
    record["load_seconds"] = time.perf_counter() - began
    for prompt in prompts[: options.warmup]:
        answer(prompt["prompt_ids"], min(32, options.max_new_tokens))
    rows = []
    tell(options, "ready")
    for prompt in prompts:
        if options.turns is not None and not sys.stdin.readline():
            raise SystemExit("whoever gives the turns is gone")
        row = {"id": prompt["id"]} | answer(prompt["prompt_ids"], options.max_new_tokens)
        rows.append(row)
        print(f"{row['id']}: {len(row['ids'])} tokens, {row['rounds']} rounds, {row['seconds']:.2f} s", flush=True)
        tell(options, "done")
    partial = Path(options.out + ".part")
    partial.write_text(json.dumps(record | {"prompts": rows}))
    os.replace(partial, options.out)


def tell(options: argparse.Namespace, word: str) -> None:
    """Say to whoever gives the turns how far the worker is."""
    if options.turns is not None:
        os.write(options.turns, f"{word}\n".encode())
