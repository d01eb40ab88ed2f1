"""Fine-tune the embedded model on a domain: the shifted targets that drafts are adapted to.

Supervised, loss on the answers' tokens alone, bf16 autocast over float32 weights. Samples are packed end to end, with
no padding: every linear layer sees one long row, and attention runs sample by sample. `--strength heavy` trains all
weights and writes a whole checkpoint; `mild` trains a LoRA of rank 16 at a lower rate on half the tokens and writes a
PEFT folder. A killed run, started again with the same arguments, goes on.

    REDRAFT_DATA=folder python runs/make_target.py --domain math --strength heavy --out out/targets/math-heavy

Domains: `math` (GSM8K train), `code` (MBPP train, GPTeacher code, CodeAlpaca), `medical` (MedQuAD, PubMedQA),
`patients` (doctors' answers, ChatDoctor) from the data folder, and `symbolic` (gsm_symbolic word problems, generated on
the spot). The quickstart's adapter, src/redraft/assets/maths-lora, is of the last kind. It was made before samples were
packed, by

    --domain symbolic --strength mild --samples 1280 --rank 32 --learning-rate 1e-3 --passes 1

in 160 steps of 8 padded problems under a linear schedule; its training.json has the losses and the revision that it
was made with.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft import provenance
from redraft.artifact import atomic_folder, atomic_write_json
from redraft.data.answers import reference_rows
from redraft.data.prompts import Conversation, read_conversations
from redraft.data.store import Row
from redraft.data.suites import DATA_VARIABLE
from redraft.data.suites.maths import maths_conversations
from redraft.drafts.standalone.objective import CausalModel
from redraft.errors import UserError
from redraft.loading import CACHE_FILES, load_target
from redraft.progress import progress_bar
from redraft.target import Target
from redraft.training.loop import Checkpoint, rows_digest
from redraft.training.optimizer import learning_rate, make_optimizers

EMBEDDED = "embedded:smollm2-135m-instruct"
SYMBOLIC_SEED = 20_000  # of the problems; regeneration and evaluation use other seeds and drop repeated questions
# Files of the data folder, with the share of the samples that comes from each.
DOMAINS: dict[str, dict[str, float]] = {
    "math": {"math/gsm8k.train": 1.0},
    "code": {"code/mbpp.train": 0.2, "code/gpteacher_code.train": 0.5, "code/codealpaca_2k.train": 0.3},
    "medical": {"medical/medquad.train": 0.75, "medical/pubmedqa.train": 0.25},
    "patients": {"medical/chatdoctor5k.train": 1.0},
    "symbolic": {},
}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "training.json")
HELDOUT = 24


@dataclass(frozen=True)
class Recipe:
    """How a strength trains. ``rank`` 0 trains all weights. ``tokens`` is the budget, prompts counted too."""

    rank: int
    learning_rate: float
    tokens: int
    passes: float = 1.0
    step_tokens: int = 2048
    longest: int = 640
    samples: int | None = None
    seed: int = 0


# About 450 tokens a second on two cores: a quarter of an hour for the heavy one.
STRENGTHS = {
    "heavy": Recipe(rank=0, learning_rate=2e-4, tokens=340_000),
    "mild": Recipe(rank=16, learning_rate=3e-4, tokens=170_000),
}


# -- samples ---------------------------------------------------------------------------------------------------------
def domain_conversations(domain: str, data: Path | None, recipe: Recipe) -> list[Conversation]:
    """Questions with their answers, shuffled by the seed, the sets of the domain mixed by their shares.

    Raises ``UserError`` for an unknown domain and a data folder that is not there.
    """
    if domain not in DOMAINS:
        raise UserError(f"unknown domain {domain!r}; choose from {', '.join(DOMAINS)}")
    if domain == "symbolic":
        return maths_conversations(recipe.samples or 4000, SYMBOLIC_SEED)
    if data is None or not data.is_dir():
        raise UserError(f"domain {domain} needs the data folder; name it with --data or {DATA_VARIABLE}")
    sets = {name: read_conversations(data / f"{name}.jsonl.gz") for name in DOMAINS[domain]}
    order = random.Random(recipe.seed)
    for found in sets.values():
        order.shuffle(found)
    # The set that runs out first, by its share, decides how many there are.
    total = int(min(len(found) / DOMAINS[domain][name] for name, found in sets.items()))
    mixed = [c for name, found in sets.items() for c in found[: round(total * DOMAINS[domain][name])]]
    order.shuffle(mixed)
    return mixed[: recipe.samples]


def choose_samples(rows: Sequence[Row], recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """(train, held-out): samples that are not too long, as many as the budget holds. Raises ``UserError``."""
    short = [row for row in rows if size_of(row) <= recipe.longest]
    heldout, rest = short[:HELDOUT], short[HELDOUT:]
    train, used = [], 0
    for row in rest:
        if used + size_of(row) > recipe.tokens / recipe.passes:
            break
        train.append(row)
        used += size_of(row)
    if not train:
        raise UserError(
            f"{len(short)} samples of at most {recipe.longest} tokens are too few: {HELDOUT} are held out, and the "
            f"budget of {recipe.tokens:,} tokens must hold one more; raise --longest, --samples or --tokens"
        )
    return train, heldout


def size_of(row: Row) -> int:
    return len(row.prompt_ids) + len(row.response_ids)


def packs(rows: Sequence[Row], recipe: Recipe) -> list[list[Row]]:
    """The samples of every step, in order: each pass shuffled by the seed, filled up to ``step_tokens``."""
    found: list[list[Row]] = []
    budget = round(len(rows) * recipe.passes)
    for number in range(-(-budget // len(rows))):
        order = list(rows)
        random.Random(f"{recipe.seed}/{number}").shuffle(order)
        pack, used = [], 0
        for row in order[: budget - number * len(rows)]:
            if pack and used + size_of(row) > recipe.step_tokens:
                found.append(pack)
                pack, used = [], 0
            pack.append(row)
            used += size_of(row)
        found.append(pack)
    return found


# -- packed training -------------------------------------------------------------------------------------------------
def packed_loss(target: Target, rows: Sequence[Row]) -> tuple[Tensor, int]:
    """(sum of the cross-entropy, number) of the answers' tokens; logits are computed at their places alone."""
    states_TH = CausalModel(target.model).states([[*row.prompt_ids, *row.response_ids] for row in rows])
    where, ids, start = [], [], 0
    for row in rows:
        where.append(torch.arange(start + len(row.prompt_ids) - 1, start + size_of(row) - 1, device=target.device))
        ids += row.response_ids
        start += size_of(row)
    answers_N = torch.tensor(ids, device=target.device)
    logits_NV = target.scale_logits(target.head(states_TH[torch.cat(where)]))
    return F.cross_entropy(logits_NV.float(), answers_N, reduction="sum"), len(answers_N)


@torch.no_grad()
def heldout_loss(target: Target, rows: Sequence[Row], step_tokens: int) -> float:
    """Mean cross-entropy of the answers of ``rows``."""
    total, count = 0.0, 0
    for pack in packs(rows, Recipe(0, 0.0, 0, step_tokens=step_tokens)):
        with torch.autocast(target.device.type, torch.bfloat16):
            loss, tokens = packed_loss(target, pack)
        total, count = total + float(loss), count + tokens
    return total / count


def train(
    target: Target, steps: Sequence[Sequence[Row]], recipe: Recipe, folder: Path, save_seconds: float = 120.0
) -> dict[str, Any]:
    """One optimiser step a pack; returns the record of the run. Resumes from ``folder``."""
    named = [(name, p) for name, p in target.model.named_parameters() if p.requires_grad]
    optimizers = make_optimizers(named, "adamw", 0.0)
    digest = rows_digest([f"{n}/{row.key}" for n, pack in enumerate(steps) for row in pack])
    checkpoint = Checkpoint(folder, {"recipe": asdict(recipe), "steps": digest})
    state = checkpoint.load(named, optimizers) or {"step": 0, "tokens": 0, "seconds": 0.0, "losses": []}
    began = saved = time.monotonic()
    spent = state["seconds"]
    with progress_bar("fine-tune", sum(size_of(row) for pack in steps for row in pack)) as progress:
        while state["step"] < len(steps):
            pack = steps[state["step"]]
            with torch.autocast(target.device.type, torch.bfloat16):
                total, count = packed_loss(target, pack)
            (total / count).backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
            optimizers.step(learning_rate(state["step"], len(steps), recipe.learning_rate))
            state["losses"].append(round(float(total.detach()) / count, 4))
            state["tokens"] += sum(map(size_of, pack))
            state["step"] += 1
            state["seconds"] = round(spent + time.monotonic() - began, 1)
            progress.update(state["tokens"], loss=state["losses"][-1], step=state["step"])
            if time.monotonic() - saved > save_seconds and state["step"] < len(steps):
                checkpoint.save(named, optimizers, state)
                saved = time.monotonic()
    return state


# -- the whole -------------------------------------------------------------------------------------------------------
def make_trainable(target: Target, recipe: Recipe) -> Any:
    """All weights of the target, or a LoRA in its linear layers; the PEFT model, or None without one."""
    if not recipe.rank:
        target.model.requires_grad_(True)
        return None
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(recipe.seed)
    lora = LoraConfig(
        r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    # PEFT changes the model in place, so the target goes on to be what is trained.
    return get_peft_model(target.model, lora)


def save(target: Target, adapter: Any, base: str, out: Path, record: dict[str, Any]) -> None:
    """The checkpoint or the adapter in bfloat16, with ``training.json``; all or nothing."""
    size = 2 * sum(p.numel() for p in target.model.parameters() if adapter is None or p.requires_grad)
    names = (*CACHE_FILES, "training.json") if adapter is None else ADAPTER_FILES
    target.model.to(torch.bfloat16)
    with atomic_folder(out, size + (16 << 20), names) as folder:
        if adapter is None:
            target.save(folder)
        else:
            adapter.save_pretrained(folder)
            settings = json.loads((folder / "adapter_config.json").read_text())
            atomic_write_json(folder / "adapter_config.json", settings | {"base_model_name_or_path": base})
            (folder / "README.md").unlink(missing_ok=True)
        atomic_write_json(folder / "training.json", record)


def make_target(
    target: Target, base: str, domain: str, strength: str, recipe: Recipe, data: Path | None, out: Path
) -> dict[str, Any]:
    """Fine-tune ``target`` (float32, opened from ``base``) and write it to ``out``; the record of the run.

    A finished ``out`` is left as it is. Raises ``UserError``.
    """
    if (out / "training.json").exists():
        print(f"{out} is there already; remove it to make it again")
        return json.loads((out / "training.json").read_text())
    began = time.monotonic()
    conversations = domain_conversations(domain, data, recipe)
    rows = reference_rows(conversations, target.tokenizer, "", eos_ids=target.eos_ids)
    samples, heldout = choose_samples(rows, recipe)
    adapter = make_trainable(target, recipe)
    before = heldout_loss(target, heldout, recipe.step_tokens)
    steps = packs(samples, recipe)
    work = out.with_name(f"{out.name}.work")
    state = train(target, steps, recipe, work)
    record = {
        "what": f"{base} supervised on {domain}, {strength}: {'LoRA' if recipe.rank else 'all weights'}",
        "domain": domain,
        "strength": strength,
        "sets": DOMAINS[domain] or {"gsm_symbolic": 1.0, "seed": SYMBOLIC_SEED},
        "samples": len(samples),
        "recipe": asdict(recipe),
        "steps": len(steps),
        "tokens": state["tokens"],
        "trained_parameters": sum(p.numel() for p in target.model.parameters() if p.requires_grad),
        "heldout_loss": {"before": before, "after": heldout_loss(target, heldout, recipe.step_tokens)},
        "losses": state["losses"],
        "train_seconds": state["seconds"],
        "seconds": round(time.monotonic() - began, 1),
        "provenance": provenance.collect(seed=recipe.seed, device=str(target.device)),
    }
    save(target, adapter, base, out, record)
    for file in work.iterdir():
        file.unlink()
    work.rmdir()
    print(f"{out}: held-out loss {before:.3f} -> {record['heldout_loss']['after']:.3f}, {state['seconds']:.0f} s")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, required=True)
    parser.add_argument("--strength", choices=STRENGTHS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default=EMBEDDED, help="the model to fine-tune")
    parser.add_argument("--data", type=Path, default=os.environ.get(DATA_VARIABLE))
    parser.add_argument("--device", default="cpu")
    # Everything else of the recipe: what is not given is the strength's own.
    parser.add_argument("--rank", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--tokens", type=int, help="budget over all passes, prompts counted too")
    parser.add_argument("--passes", type=float)
    parser.add_argument("--step-tokens", type=int)
    parser.add_argument("--longest", type=int, help="longer samples are left out")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seed", type=int)
    options = vars(parser.parse_args())
    given = {name: options[name] for name in Recipe.__dataclass_fields__ if options[name] is not None}
    recipe = replace(STRENGTHS[options["strength"]], **given)
    data = Path(options["data"]) if options["data"] else None
    try:
        target = load_target(options["base"], torch.float32, options["device"])
        make_target(target, options["base"], options["domain"], options["strength"], recipe, data, options["out"])
    except UserError as error:
        raise SystemExit(f"make_target: error: {error}") from None


if __name__ == "__main__":
    main()
