"""Copy cases into the tests, with as much of their targets as is looked at: the config and the embedding.

python benchmarks/trainers/keep.py CASES NAME [NAME ..]
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

KEPT = Path(__file__).parents[2] / "tests" / "artifacts" / "trainers"
EMBEDDING = "model.embed_tokens.weight"


def main() -> None:
    made, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        shutil.copytree(made / name, KEPT / name, dirs_exist_ok=True)
        target = json.loads((made / name / "case.json").read_text())["target"]
        (KEPT / target).mkdir(parents=True, exist_ok=True)
        shutil.copy(made / target / "config.json", KEPT / target)
        embedding = load_file(made / target / "model.safetensors")[EMBEDDING]
        save_file({EMBEDDING: embedding}, KEPT / target / "model.safetensors")
    for path in KEPT.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    main()
