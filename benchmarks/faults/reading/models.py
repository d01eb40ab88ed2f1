"""Readers of models: targets, adapters, drafts."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from faults.reading.base import MESSAGES, RUN, Outcome, Reader, both, files, written
from redraft.data.store import read_rows


# -- models ------------------------------------------------------------------------------------------------------------
def _target(place: Path) -> None:
    shutil.copytree(RUN / "target", place / "target")
    written("p.jsonl", MESSAGES[:1])(place)


def _sharded(place: Path) -> None:
    _target(place)
    path = place / "target" / "model.safetensors"
    state = load_file(path)
    path.unlink()
    names = sorted(state)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: state[name] for name in some}, place / "target" / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}}
    (place / "target" / "model.safetensors.index.json").write_text(json.dumps(index))


def _adapter(place: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    _target(place)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(place / "target")
    made = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape) * 0.5
    made.save_pretrained(place / "adapter")
    path = place / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "../target"}))


def _answer(name: str) -> Callable[[Path], list[str]]:
    return lambda place: [
        *("regenerate", "--target", str(place / name), "--prompts", str(place / "p.jsonl"), "--temperature", "0"),
        *("--max-new-tokens", "6", "--dtype", "float32", "--out", str(place / "r.jsonl")),
    ]


def _answers(place: Path, said: str) -> Outcome:
    return [[row.prompt_ids, row.response_ids] for row in read_rows(place / "r.jsonl")]


def _like_transformers(place: Path, found: Outcome) -> bool:
    """Whether transformers itself, asked here in a few lines, gives this answer to the target's files as they are."""
    import transformers

    try:
        folder = place / "target"
        words = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for (asked, said), conversation in zip(found, MESSAGES[:1], strict=True):
            turns = conversation["messages"][:1]
            if list(words.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)) != asked:
                return False
            ids = torch.tensor([asked])
            for token in said:
                if int(model(ids).logits[0, -1].argmax()) != token:
                    return False
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        return True
    except Exception:
        return False


def _exported(place: Path, said: str) -> Outcome:
    out = place / "out"
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    return [digest, json.loads((out / "config.json").read_text())]


def models() -> list[Reader]:
    """All of them."""
    return [
        Reader(
            "target: config",
            {"target/config.json": "json"},
            _target,
            _answer("target"),
            _answers,
            _like_transformers,
            ("r.jsonl",),
            ("target",),
            weight=4,
        ),
        Reader(
            "target: tokenizer",
            {
                "target/tokenizer.json": "json",
                "target/tokenizer_config.json": "json",
                "target/chat_template.jinja": "bytes",
            },
            _target,
            _answer("target"),
            _answers,
            _like_transformers,
            ("r.jsonl",),
            ("target", "conversation"),
            weight=2,
        ),
        Reader(
            "target: generation",
            {"target/generation_config.json": "json"},
            _target,
            _answer("target"),
            _answers,
            _like_transformers,
            ("r.jsonl",),
            ("target",),
            weight=2,
        ),
        Reader(
            "target: index of shards",
            {"target/model.safetensors.index.json": "json"},
            _sharded,
            _answer("target"),
            _answers,
            _like_transformers,
            ("r.jsonl",),
            ("target",),
            weight=1,
        ),
        Reader(
            "target: weights",
            {"target/model.safetensors": "bytes"},
            _target,
            _answer("target"),
            _answers,
            _like_transformers,
            ("r.jsonl",),
            ("target",),
            weight=1,
        ),
        Reader(
            "adapter",
            {"adapter/adapter_config.json": "json", "adapter/adapter_model.safetensors": "bytes"},
            _adapter,
            _answer("adapter"),
            _answers,
            None,
            ("r.jsonl",),
            ("adapter",),
            weight=4,
        ),
        Reader(
            "own draft",
            {"draft/redraft.json": "json", "draft/draft.safetensors": "bytes"},
            both(files("draft"), files("target")),
            lambda place: [
                *("export", "--draft", str(place / "draft"), "--target", str(place / "target"), "--format", "plain"),
                *("--out", str(place / "out")),
            ],
            _exported,
            None,
            ("out",),
            ("draft",),
            weight=3,
        ),
        Reader(
            "private part",
            {"private/redraft.json": "json", "private/private.safetensors": "bytes"},
            both(files("draft"), files("run/private")),
            lambda place: [
                *("merge", "--private", str(place / "private"), "--base-draft", str(place / "draft")),
                *("--out", str(place / "out")),
            ],
            lambda place, said: hashlib.sha256((place / "out" / "draft.safetensors").read_bytes()).hexdigest(),
            None,
            ("out",),
            ("private",),
            weight=3,
        ),
    ]
