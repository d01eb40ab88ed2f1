"""Fine-tune the embedded model on worked maths solutions: the shifted target of the quickstart, as a LoRA adapter.

Supervised, loss on the solution's tokens alone, bf16 autocast over float32 weights. Writes a PEFT folder.

    python runs/make_maths_target.py --out src/redraft/assets/maths-lora
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from redraft import provenance
from redraft.artifact import atomic_write_json
from redraft.data.embedded import maths_conversations
from redraft.loading import load_target

EMBEDDED = "embedded:smollm2-135m-instruct"
TRAIN_SEED = 20_000  # of the problems; regeneration and evaluation use other seeds and drop repeated questions


def encode(tokenizer, conversation) -> tuple[list[int], int]:
    """Token ids of question and solution, and where the solution begins."""
    question, solution = conversation.messages[0], conversation.messages[1]
    prompt = list(tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False))
    answer = tokenizer(solution["content"], add_special_tokens=False).input_ids
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def batches(samples, size: int, seed: int):
    """Batches of similar length, shuffled."""
    order = random.Random(seed)
    order.shuffle(samples)
    pools = [sorted(samples[i : i + 32 * size], key=lambda s: len(s[0])) for i in range(0, len(samples), 32 * size)]
    found = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
    order.shuffle(found)
    return found


def loss_of(model, batch) -> torch.Tensor:
    """Mean cross-entropy of the solutions; logits at their positions alone."""
    longest = max(len(ids) for ids, _ in batch)
    ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    where = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, (ids, start) in enumerate(batch):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        where[row, start - 1 : len(ids) - 1] = True
    hidden = model.base_model.model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[where])
    return F.cross_entropy(logits.float(), ids_BT.roll(-1, 1)[where])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=1280)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    target = load_target(EMBEDDED, torch.float32)
    samples = [encode(target.tokenizer, c) for c in maths_conversations(options.problems, TRAIN_SEED)]
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(target.model, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    steps = batches(samples, options.batch, options.seed)
    began, losses = time.monotonic(), []
    for step, batch in enumerate(steps):
        rate = options.learning_rate * min(1.0, (step + 1) / 10) * max(0.05, 1 - step / len(steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if step % 10 == 9:
            mean = sum(losses[-10:]) / 10
            print(f"step {step + 1} of {len(steps)}  loss {mean:.3f}  {time.monotonic() - began:.0f} s", flush=True)
    model = model.to(torch.bfloat16)
    model.save_pretrained(options.out)
    settings = json.loads((options.out / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = EMBEDDED
    atomic_write_json(options.out / "adapter_config.json", settings)
    (options.out / "README.md").unlink(missing_ok=True)
    record = {
        "what": "LoRA of the embedded model, supervised on gsm_symbolic worked solutions",
        "problems": options.problems,
        "problem_seed": TRAIN_SEED,
        "losses": [round(x, 4) for x in losses],
        "seconds": round(time.monotonic() - began),
        "provenance": provenance.collect(seed=options.seed, device="cpu"),
    }
    atomic_write_json(options.out / "training.json", record)


if __name__ == "__main__":
    main()
