"""Makes tests/artifacts/run: a whole run directory of ``redraft adapt``, with the tiny target, draft and prompts of it.

Run once, before the house was rebuilt; kept to show what is in the files, which must keep loading as they are and
give the same figures.

    python tests/artifacts/make_run.py tests/artifacts/run
"""

from __future__ import annotations

import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.files import save_draft
from redraft.loading import tokenizer_hash
from redraft.target import Target

WORDS = "one two three four five six seven eight nine ten apples pears boxes cost each are there how many".split()

# Names as they stand in a command that is given in the artifact's own folder.
SETTINGS = {
    "target": "target",
    "draft": "draft",
    "prompts": "prompts.jsonl",
    "out": "run",
    "dtype": "float32",
    "max-new-tokens": "16",
    "bench-tokens": "12",
    "bench-prompts": "3",
    "heldout-prompts": "4",
    "batch-size": "4",
    "rank": "4",
    "gamma": "3",
    "budget": "75%",
    "train": ["epochs=24", "batch_anchors=64", "evaluate_every=8"],
}


def command() -> list[str]:
    """The command behind the run directory; given again, it goes on with it."""
    words = [sys.executable, "-m", "redraft.cli.main", "adapt"]
    for name, value in SETTINGS.items():
        for each in [value] if isinstance(value, str) else value:
            words += [f"--{name}", each]
    return words


def main(folder: Path) -> None:
    builders = runpy.run_path(str(Path(__file__).parents[1] / "tiny_models.py"))
    model = builders["build_model"]("llama", 0, hidden_size=16, intermediate_size=24)
    target = Target(model, builders["build_tokenizer"](), name="tiny-llama", taps=(1, 3, 5))
    target.save(folder / "target")
    known = {"target": {"name": "tiny", "hash": target.content_hash()}}
    save_draft(
        folder / "draft",
        fresh_draft(target, range(0, 120), seed=1),
        known | {"tokenizer_hash": tokenizer_hash(target.tokenizer)},
    )
    order = random.Random(0)
    prompts = [{"role": "user", "content": f"{' '.join(order.choices(WORDS, k=5))} {i}"} for i in range(20)]
    lines = [json.dumps({"id": f"p{i}", "messages": [prompt]}) for i, prompt in enumerate(prompts)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    subprocess.run(command(), cwd=folder, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
