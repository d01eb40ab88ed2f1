"""What a draft loses where engines compute another function of its file than its trainer did.

    python served.py modelopt --out ../results/trainers-served-modelopt.json
    python served.py angelslim --out ../results/trainers-served-angelslim.json

Run inside that trainer's own environment, without redraft. A small target is trained on made-up sums in words, byte by
byte; the trainer's own forward and loss train a draft for it; then the greedy chain of three draft tokens is walked
over the target's own greedy answers to prompts that neither has seen: once with the function that was trained, once
with each of those that engines make of the file. The chain is exact, since up to the first wrong token the accepted
ones are the answer's. tau is tokens per round, the bonus token counted; intervals are over prompts (bootstrap, 95%).

nvidia-modelopt: the state's norm, twice in training and once in engines; yarn angles in the export of a draft trained
with plain ones. AngelSlim: base 10000 in training, the config's ``rope_theta`` in engines.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

GAMMA = 3
BATCH, LENGTH = 8, 128  # of training
SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
NAMES = "Anna Ben Carla David Emma Felix Greta Hugo Ida Jonas Klara Leo Mia Noah Olga Paul".split()
THINGS = "apples books coins cards stamps shells pens cups".split()

Logits = Callable[[Tensor], Tensor]
"""Logits [3, S, D] of the draft's steps at every anchor, of tokens [S]."""


def sentence(draw: random.Random) -> str:
    name, other = draw.sample(NAMES, 2)
    first, second, thing = draw.randint(2, 60), draw.randint(2, 39), draw.choice(THINGS)
    kind = draw.randrange(3)
    if kind == 0:
        return f"{name} has {first} {thing} and buys {second} more. Now {name} has {first + second} {thing}. "
    if kind == 1:
        rest = first + second
        return f"{name} has {rest} {thing} and gives {second} to {other}. {name} keeps {first} {thing}. "
    return f"{other} owns {first} {thing}, {name} owns {second}. Together they own {first + second} {thing}. "


def texts(count: int, length: int, seed: int) -> Tensor:
    """Tokens [``count``, ``length``]."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        text = ""
        while len(text) < length:
            text += sentence(draw)
        rows.append(list(text[:length].encode()))
    return torch.tensor(rows)


def fit(parameters: Any, loss: Callable[[Tensor], Tensor], steps: int, batch: int, length: int, rate: float) -> float:
    """Train on new texts at every step; the last loss, smoothed."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.1)
    smooth = 0.0
    for step in range(steps):
        found = loss(texts(batch, length, 1000 + step))
        optimiser.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step()
        schedule.step()
        smooth = float(found) if not step else 0.98 * smooth + 0.02 * float(found)
        if step % 100 == 0:
            print(f"  step {step} loss {smooth:.3f}", flush=True)
    return smooth


def trained_target(folder: Path, steps: int) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.train()
    fit(model.parameters(), lambda ids: model(input_ids=ids, labels=ids).loss, steps, BATCH, LENGTH, 3e-3)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def answers(model: nn.Module, prompts: int, asked: int, length: int) -> Tensor:
    """Greedy answers [``prompts``, asked + length] of the target, each behind its prompt."""
    ids = texts(prompts, asked, 7)
    cache = None
    fed = ids
    for _ in range(length):
        outputs = model(input_ids=fed, past_key_values=cache, use_cache=True)
        cache, fed = outputs.past_key_values, outputs.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, fed], 1)
    return ids


def rounds(row: Tensor, logits: Logits, asked: int) -> tuple[int, int]:
    """Tokens and rounds of the greedy chain over one answer [S]; the first token, of prefill, counts in neither."""
    right = logits(row).argmax(-1)  # [3, S']: step j at anchor t guesses token t + 2 + j
    place, tokens, count = asked - 1, 0, 0  # the anchor is the last token whose state is known
    while place + 2 + GAMMA <= len(row):
        accepted = 0
        while accepted < GAMMA and int(right[accepted, place]) == int(row[place + 2 + accepted]):
            accepted += 1
        place, tokens, count = place + accepted + 1, tokens + accepted + 1, count + 1
    return tokens, count


def tau(rows: Tensor, logits: Logits, asked: int) -> dict[str, float]:
    pairs = torch.tensor([rounds(row, logits, asked) for row in rows], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = pairs[torch.randint(len(pairs), (2000, len(pairs)), generator=generator)].sum(1)
    low, high = torch.quantile(drawn[:, 0] / drawn[:, 1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    total = pairs.sum(0)
    return {"value": float(total[0] / total[1]), "low": low, "high": high, "rounds": int(total[1])}


def with_angles(config: dict[str, Any], rope: dict[str, Any]) -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(LlamaConfig(**(config | {"rope_parameters": rope})))


def of_modelopt(target: Path, steps: int) -> dict[str, Logits]:
    """The package's draft, and the functions of it."""
    import make_modelopt as maker

    maker.SIZES.update({key: SHAPE[key] for key in maker.SIZES})
    model = maker.converted(target, {"seeded": False})
    model.train()
    fit(model.eagle_module.parameters(), lambda ids: model(input_ids=ids).loss, steps, BATCH, LENGTH, 1e-3)
    model.eval()
    module = model.eagle_module
    twice, plain = module.layers[0].input_layernorm, module.rotary_emb
    yarn = with_angles(SHAPE, {"rope_theta": 10000.0, **model.eagle_export_rope_scaling})

    def function(norm: nn.Module, rotary: nn.Module) -> Logits:
        def logits(row: Tensor) -> Tensor:
            module.layers[0].input_layernorm, module.rotary_emb = norm, rotary
            return maker.steps(model, row, len(row) - GAMMA)

        return logits

    once = maker.SecondCallOnly(twice)
    functions = {
        "as trained: norm twice, plain angles": function(twice, plain),
        "engines, eagle_export_rope_scaling {}: norm once, plain angles": function(once, plain),
        "norm twice, yarn angles": function(twice, yarn),
        "engines, default export: norm once, yarn angles": function(once, yarn),
    }
    return functions


def of_angelslim(target: Path, steps: int) -> dict[str, Logits]:
    import make_angelslim as maker

    small = {key: SHAPE[key] for key in ("hidden_size", "intermediate_size", "head_dim", "vocab_size")}
    small["draft_vocab_size"] = SHAPE["vocab_size"]
    trainer, _ = maker.prepared(target, maker.CONFIG | small | {"rope_theta": 1000000}, target.parent)
    draft = trainer.draft_model

    def loss(ids: Tensor) -> Tensor:
        ones = torch.ones_like(ids)
        return trainer.compute_loss(draft, {"input_ids": ids, "attention_mask": ones, "loss_mask": ones})

    kept = [parameter for name, parameter in draft.named_parameters() if "embed" not in name]
    fit(kept, loss, steps, BATCH, LENGTH, 1e-3)

    def function(theta: float) -> Logits:
        def logits(row: Tensor) -> Tensor:
            draft.midlayer.self_attn.rotary_emb = maker.FromConfig(
                LlamaConfig(**(SHAPE | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}))
            )
            with torch.no_grad():
                return maker.steps(trainer, row, len(row) - GAMMA)

        return logits

    functions = {
        "as trained: base 10000": function(10000.0),
        "engines: rope_theta 1000000 of the config": function(1000000.0),
    }
    return functions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=("modelopt", "angelslim"))
    parser.add_argument("--target-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=500, help="of the draft")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--asked", type=int, default=48, help="prompt length")
    parser.add_argument("--length", type=int, default=120, help="answer length")
    parser.add_argument("--target", type=Path, help="folder of the target; made where it is not there")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.target or Path(scratch) / "target"
        if not folder.exists():
            trained_target(folder, options.target_steps)
        torch.manual_seed(1)
        build = of_modelopt if options.trainer == "modelopt" else of_angelslim
        functions = build(folder, options.steps)
        rows = answers(LlamaForCausalLM.from_pretrained(folder), options.prompts, options.asked, options.length)
    found = {}
    for name, logits in functions.items():
        found[name] = tau(rows, logits, options.asked)
        print(
            f"{name:60} tau {found[name]['value']:.3f} [{found[name]['low']:.3f}, {found[name]['high']:.3f}]",
            flush=True,
        )
    result = {
        "schema": "redraft.trainers-served/1",
        "trainer": options.trainer,
        "setup": {
            "target": f"Llama of 8 layers, width 96, bytes; {options.target_steps} steps on made-up sums in words",
            "draft": f"{options.steps} steps of {BATCH} texts of {LENGTH} bytes by the package's own forward and loss",
            "sampler": f"greedy, chain of {GAMMA}",
            "prompts": options.prompts,
            "answer_tokens": options.length,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
        "tau": found,
        "seconds": round(time.monotonic() - began),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
