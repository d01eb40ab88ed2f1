"""The tutorial in Python runs from top to bottom, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import redraft
from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.files import save_draft
from redraft.loading import tokenizer_hash
from redraft.target import Target

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "tutorial.py"
WORDS = "the rain in the north is on the river and the stone is in the hand of one man".split()


def test_the_tutorial_runs(tmp_path: Path, tiny_target: Callable[..., Target]) -> None:
    target = tiny_target(seed=0, taps=(1, 3, 5))
    target.save(tmp_path / "target")
    draft = fresh_draft(target, list(range(4, 100)), seed=0, intermediate=32)
    save_draft(tmp_path / "draft", draft, {"tokenizer_hash": tokenizer_hash(target.tokenizer)})
    asked = [" ".join(WORDS[i % 9 : i % 9 + 3 + i % 5] + [str(i)]) for i in range(32)]
    talks = [{"id": f"p{i}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(asked)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, talks)))
    named = {"TARGET": "target", "DRAFT": "draft", "PROMPTS": "prompts.jsonl", "OUT": "out", "ALL": "1"}
    settings = {"DTYPE": "float32", "LENGTH": "12", "PYTHONPATH": str(Path(redraft.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | named | settings,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    out = tmp_path / "out"
    texts = "eagle3 draft of", "acceptance length", "32 responses", "rows kept", "hellinger: held-out tau", "serve with"
    for said in texts:
        assert said in done.stdout, said
    assert (out / "draft-for-vllm" / "config.json").is_file() and (out / "milder" / "redraft.json").is_file()
    assert list(json.loads((out / "bench.json").read_text())["drafts"]) == ["stale", "kl", "hellinger"]
    assert "hellinger" in (out / "report.html").read_text()
    assert (out / "run" / "report.html").is_file()
