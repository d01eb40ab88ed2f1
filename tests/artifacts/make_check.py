"""Makes tests/artifacts/check: a trained tiny target, the base that it was tuned from, and drafts made for each.

Everything is learnt from a toy language of twelve letters: each follows from the one before it and the one three places
back, by a table, so that a draft has to look back and its angles, layers and norms all matter. The target was tuned
on a table of which a part of the entries is another. Minutes on one core.

    python tests/artifacts/make_check.py tests/artifacts/check

``target`` and ``base`` are checkpoints in float16. Of the drafts ``aligned`` and ``short`` read the target, ``short``
with one draft step in training where the others have four; ``stale`` reads the base. ``prompts.jsonl`` are questions
that none of them has seen.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from redraft.data.generate import Request, generate
from redraft.data.store import Row
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.drafts.files import save_draft
from redraft.features import FeatureStore
from redraft.loading import load_target
from redraft.settings.sampler import Sampler
from redraft.settings.training import TrainConfig
from redraft.target import Target
from redraft.training.trainer import Trainer

MODELS = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "tiny_models.py")))
LETTERS, FIRST, BACK = 12, 38, 3  # the ids of A to L, which no merge of the tokenizer touches
ASKED, ANSWERED, NOISE = 8, 48, 0.08
TAPS = (2, 3, 5)
EPOCHS, SPREAD = 16.0, 0.8
VOCABULARY = [2, 4, *range(34, 64)]
# The beginning of every text is a letter of its own: it shows where a template or an engine writes it twice.
TEMPLATE = "{{ bos_token }}" + MODELS.CHATML


def tokenizer() -> Any:
    found = MODELS.build_tokenizer()
    found.bos_token, found.chat_template = "<unk>", TEMPLATE
    return found


def table(seed: int, old: Tensor | None = None, changed: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    new = torch.randint(LETTERS, (LETTERS, LETTERS), generator=generator)
    return new if old is None else torch.where(torch.rand(new.shape, generator=generator) < changed, new, old)


def letters(rule: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Texts [count, length] in which a letter now and then comes from nowhere."""
    text = torch.randint(LETTERS, (count, BACK), generator=generator)
    while text.shape[1] < length:
        any_letter = torch.randint(LETTERS, (count,), generator=generator)
        stray = torch.rand(count, generator=generator) < NOISE
        text = torch.cat([text, torch.where(stray, any_letter, rule[text[:, -1], text[:, -BACK]])[:, None]], 1)
    return text + FIRST


def framed(text: Tensor) -> tuple[Tensor, int]:
    """The texts as a question of ``ASKED`` letters and its answer, and where the answer begins."""
    tok = tokenizer()
    parts = [tok.encode(part, add_special_tokens=False) for part in ("<unk><|im_start|>user\n", "<|im_end|>\n")]
    parts[1] += tok.encode("<|im_start|>assistant\n", add_special_tokens=False)
    before, between = (torch.tensor(part).expand(len(text), -1) for part in parts)
    whole = torch.cat([before, text[:, :ASKED], between, text[:, ASKED:]], 1)
    return whole, whole.shape[1] - text.shape[1] + ASKED


def learn(model: Any, rule: Tensor, steps: int, rate: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        ids, start = framed(letters(rule, 32, ASKED + ANSWERED, generator))
        logits = model(ids).logits[:, start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, start:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"loss {loss.item():.3f}", flush=True)


def save(model: Any, folder: Path) -> Target:
    model.half().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    model.float()
    return load_target(str(folder), torch.float32, "cpu")


def prompts(count: int, seed: int) -> list[list[int]]:
    asked = letters(table(1), count, ASKED, torch.Generator().manual_seed(seed))
    return framed(asked)[0].tolist()


def write_prompts(path: Path, count: int, seed: int) -> None:
    """Questions as the drafts were trained on, for tests."""
    asked = (letters(table(1), count, ASKED, torch.Generator().manual_seed(seed)) - FIRST).tolist()
    texts = ["".join(chr(ord("A") + letter) for letter in line) for line in asked]
    lines = [{"id": f"p{i:02}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def answers(target: Target, count: int, seed: int) -> list[Row]:
    asked = [Request(f"{seed}/{i}", ids, Sampler()) for i, ids in enumerate(prompts(count, seed))]
    done = generate(target, asked, ANSWERED)
    return [
        Row(one.request.key, list(one.request.prompt_ids), one.response_ids, 0.0, 0, 1.0, 0, one.finish_reason, "")
        for one in done
    ]


def spread_norms(draft: Eagle3Draft) -> None:
    """Weights of norms far from one, as large models have them: a norm that is left out is missed."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in draft.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(torch.randn(weight.shape, generator=generator).mul(SPREAD).exp())


def draft_for(target: Target, unroll: int) -> tuple[Eagle3Draft, float]:
    target.tap(TAPS)
    rows, heldout = answers(target, 400, 5), answers(target, 24, 6)
    draft = fresh_draft(target, VOCABULARY, seed=1).requires_grad_(True)
    spread_norms(draft)
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder) / "features", {"target": target.content_hash()})
        store.build(target, [*rows, *heldout])
        how = {"epochs": EPOCHS, "batch_anchors": 512, "learning_rate": 3e-3, "gamma": 4, "evaluate_every": 100}
        config = TrainConfig(**how, unroll=unroll, patience=0)
        trainer = Trainer(draft, target, store, rows, heldout, config, Path(folder) / "run")
        result = trainer.run(None)
    print(f"unroll {unroll}: tau {result.start_tau:.2f} -> {result.best_tau:.2f} in {result.seconds:.0f} s", flush=True)
    return trainer.draft, result.best_tau


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder / "prompts.jsonl", 16, 11)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6, "initializer_range": 0.05}
    shape |= {"bos_token_id": 0, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    model = MODELS.build_model("llama", 0, **shape)
    old = table(1)
    learn(model, old, 500, 4e-3, 1)
    base = save(model, folder / "base")
    learn(model, table(2, old, 0.4), 300, 2e-3, 2)
    target = save(model, folder / "target")
    for name, teacher, unroll in (("aligned", target, 4), ("stale", base, 4), ("short", target, 1)):
        draft, tau = draft_for(teacher, unroll)
        meta = {
            "method": "scratch",
            "target": {"name": f"tiny-{teacher.name.rsplit('/')[-1]}", "hash": teacher.content_hash()},
            "heldout": {"tau": {"value": tau, "low": tau, "high": tau}, "gamma": 4},
        }
        save_draft(folder / name, draft.half(), meta)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
