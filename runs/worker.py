"""What the engines' workers share: their arguments, their prompts and the file that they leave.

A worker runs in its engine's own environment, so this is the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
    return parser


def read_prompts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts in the order of the file."""
    return [json.loads(line) for line in Path(options.prompts).read_text().splitlines() if line.strip()]


def work(run: Callable[[argparse.Namespace], dict[str, Any]], options: argparse.Namespace) -> None:
    """Run, and leave the record whole or not at all."""
    record = run(options)
    partial = Path(options.out + ".part")
    partial.write_text(json.dumps(record))
    os.replace(partial, options.out)
