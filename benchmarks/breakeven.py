"""From which acceptance on does a standalone drafter pay, and what would it bring at which size of target?

Shapes with random weights: time does not depend on what the numbers are. For every target a plain step, drafter steps
and the verification of gamma + 1 tokens are timed in turn (:func:`redraft.decode.auto.measure_costs`), for a drafter
of the paper's shape (4 layers of width 1024, arXiv 2403.00858), for one sized by share and, where asked for, for one
made of layers of the target. A round of gamma tokens that costs k plain steps pays as soon as block efficiency is above
k: that is the break-even, and measured. What it would bring at a given block efficiency is a projection, and marked as
one.

    python benchmarks/breakeven.py --tau paper=2.3@3 --out benchmarks/results/breakeven.json

``--tau`` is NAME=VALUE@GAMMA, repeatable: block efficiency measured elsewhere, with another target, at that gamma; it
says nothing of another gamma, and nothing is projected there.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from redraft import provenance
from redraft.artifact import atomic_write_json
from redraft.decode.auto import measure_costs
from redraft.drafts.standalone import StandaloneDraft
from redraft.drafts.standalone.shapes import fresh_standalone, shape_for
from redraft.errors import UserError
from redraft.progress import progress_bar
from redraft.settings.shapes import ChainShape
from redraft.target import Target

# Layers, width, inner width, heads, key heads, vocabulary, tied: public models' shapes.
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "smollm2-135m": (30, 576, 1536, 9, 3, 49152, True),
    "smollm2-360m": (32, 960, 2560, 15, 5, 49152, True),
    "smollm2-1.7b": (24, 2048, 8192, 32, 32, 49152, True),
    "llama2-7b": (32, 4096, 11008, 32, 32, 32000, False),
    "llama3-8b": (32, 4096, 14336, 32, 8, 128256, False),
}
GAMMAS = (1, 3, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="smollm2-135m,smollm2-360m,smollm2-1.7b")
    parser.add_argument(
        "--drafters",
        default="goel,1/8",
        help="sizes, as `redraft distill --size` takes them, or layers:4 for so many layers of the target itself",
    )
    parser.add_argument("--tau", action="append", default=[], help="NAME=VALUE@GAMMA; repeatable")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--length", type=int, default=128, help="tokens of the text that is gone on from")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    taus = [known(text) for text in options.tau]
    names, sizes = options.targets.split(","), options.drafters.split(",")
    cells, done = [], 0
    with progress_bar("shapes", len(names) * len(sizes)) as progress:
        for name in names:
            target = random_target(name, options.dtype, options.device)
            for size in sizes:
                cells += measure(name, target, size, taus, options)
                done += 1
                progress.update(done)
            del target
    atomic_write_json(
        options.out,
        {
            "schema": "redraft.breakeven/1",
            "provenance": provenance.collect(seed=0, device=options.device),
            "setup": {
                "weights": "random",
                "dtype": options.dtype,
                "text": f"{options.length} tokens",
                "batch": 1,
                "repeats": options.repeats,
                "acceptance": [{"name": name, "block_efficiency": tau, "gamma": gamma} for name, tau, gamma in taus],
                "note": "costs are measured; speed-ups take acceptance measured with another target: projections",
            },
            "cells": cells,
        },
    )
    print(table(cells, taus))


def known(text: str) -> tuple[str, float, int]:
    """(name, block efficiency, gamma) of ``paper=2.3@3``. Raises ``UserError``."""
    found = re.fullmatch(r"(.+)=(\d+(?:\.\d+)?)@(\d+)", text)
    if not found or not 1 <= float(found[2]) <= int(found[3]) + 1:
        raise UserError(f"--tau {text} is not NAME=VALUE@GAMMA with a value from 1 to GAMMA + 1")
    return found[1], float(found[2]), int(found[3])


def random_target(name: str, dtype: str, device: str) -> Target:
    """A Llama of a public shape with random weights, made where it will be used."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, inner, heads, key_heads, vocabulary, tied = SHAPES[name]
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    inverse = LlamaForCausalLM(LlamaConfig(**config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 8}))
    model = model.to_empty(device=device)
    model.model.rotary_emb = inverse.model.rotary_emb.to(device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02, generator=generator) if parameter.dim() > 1 else parameter.fill_(1.0)
    return Target(model, name=name)


def spread_layers(target: Any, count: int) -> list[int]:
    """``count`` layers of the target, evenly spread, the first and the last among them."""
    if not 1 <= count <= target.layers:
        raise UserError(f"cannot take {count} of the target's {target.layers} layers")
    if count == 1:
        return [0]
    return [round(i * (target.layers - 1) / (count - 1)) for i in range(count)]


def drafter(target: Target, size: str) -> StandaloneDraft:
    """A drafter of a size, or of layers of the target. Raises ``UserError``."""
    if found := re.fullmatch(r"layers:(\d+)", size):
        return fresh_standalone(target, layers=spread_layers(target, int(found[1])))
    return fresh_standalone(target, shape_for(target, size), embeddings="random")


def measure(
    name: str, target: Target, size: str, taus: list[tuple[str, float, int]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Costs of one pair at every gamma; nothing where the drafter is no smaller than the target."""
    draft = drafter(target, size).to(target.dtype)
    if draft.parameters_per_token >= target.parameters_per_token:
        return []
    text = torch.randint(0, target.vocab_size, (options.length,), generator=torch.Generator().manual_seed(1)).tolist()
    costs = measure_costs(target, draft, text, GAMMAS, repeats=options.repeats)
    found = []
    for gamma in GAMMAS:
        cost = costs.of(ChainShape(gamma))
        round_cost = cost.seconds / costs.plain
        found.append(
            {
                "target": name,
                "drafter": size,
                "parameters_per_token": {"draft": draft.parameters_per_token, "target": target.parameters_per_token},
                "gamma": gamma,
                "plain_step_s": costs.plain,
                "draft_step_over_plain": cost.draft / gamma / costs.plain,
                "verify_over_plain": cost.verify / costs.plain,
                "break_even": round_cost,
                "projected_speedup": {label: tau / round_cost for label, tau, at in taus if at == gamma},
            }
        )
    return found


def table(cells: list[dict[str, Any]], taus: list[tuple[str, float, int]]) -> str:
    """The result as Markdown."""
    labels = "".join(f" projected at {label} ({tau:.2f}) |" for label, tau, _ in taus)
    lines = [
        f"| target | drafter | gamma | plain step, ms | draft step | verification | break-even |{labels}",
        f"| --- | --- | --- | --- | --- | --- | --- |{' --- |' * len(taus)}",
    ]
    for cell in cells:
        sizes = cell["parameters_per_token"]
        found = cell["projected_speedup"]
        speeds = "".join(f" {found[label]:.2f}x |" if label in found else " |" for label, _, _ in taus)
        lines.append(
            f"| {cell['target']} | {cell['drafter']} ({sizes['draft'] / 1e6:.0f}M) | {cell['gamma']} | "
            f"{1000 * cell['plain_step_s']:.1f} | {cell['draft_step_over_plain']:.3f} | "
            f"{cell['verify_over_plain']:.2f} | {cell['break_even']:.2f} |{speeds}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
