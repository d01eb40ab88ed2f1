"""What a loss costs: matrices of positions x vocabulary kept for the backward pass, and seconds of both passes.

Autograd keeps two or three such matrices, which are the peak of memory where portions are large; a gradient in closed
form (``redraft.losses.rows``) keeps one.

    python benchmarks/losses.py --positions 2048 --vocabulary 8192 --plugin my_loss.py
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from redraft.registries import LOSSES, load_plugin


def measure(loss: Any, positions: int, vocabulary: int) -> tuple[int, float]:
    """(matrices kept, seconds of a forward and a backward pass)."""
    kept: list[int] = []
    draft_ND = torch.randn(positions, vocabulary, requires_grad=True)
    teacher_ND, weight_N = torch.randn(positions, vocabulary), torch.ones(positions)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss(draft_ND, teacher_ND, weight_N)
    began = time.perf_counter()
    loss(draft_ND, teacher_ND, weight_N)[0].backward()
    return sum(size >= positions * vocabulary for size in kept), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--plugin", action="append", default=[], help="module or file that registers more losses")
    options = parser.parse_args()
    for plugin in options.plugin:
        load_plugin(plugin)
    for name, loss in LOSSES.items():
        matrices, seconds = measure(loss, options.positions, options.vocabulary)
        print(f"{name:14} {matrices} matrices kept, {seconds:.2f} s")


if __name__ == "__main__":
    main()
