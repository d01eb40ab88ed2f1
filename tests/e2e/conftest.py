"""A tiny target, a draft for it and prompts on disk, as a user would have them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

WORDS = "one two three four five six seven eight nine ten apples pears boxes cost each are there how many".split()


@pytest.fixture
def world(tiny_target, tmp_path) -> Path:
    """A folder with ``target``, ``draft`` and ``prompts.jsonl`` (40 different prompts)."""
    # Here for the reason that ``tests/conftest.py`` gives.
    from redraft.drafts.eagle3 import fresh_draft
    from redraft.drafts.files import save_draft
    from redraft.loading import tokenizer_hash

    folder = tmp_path / "world"
    target = tiny_target("llama", taps=(1, 3, 5))
    target.save(folder / "target")
    meta = {
        "target": {"name": "tiny", "hash": target.content_hash()},
        "tokenizer_hash": tokenizer_hash(target.tokenizer),
    }
    save_draft(folder / "draft", fresh_draft(target, range(0, 60), seed=1), meta)
    order = random.Random(0)
    prompts = [{"role": "user", "content": f"{' '.join(order.choices(WORDS, k=5))} {i}"} for i in range(40)]
    lines = [json.dumps({"id": f"p{i}", "messages": [prompt]}) for i, prompt in enumerate(prompts)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder
