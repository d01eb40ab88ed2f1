"""Copy cases into the tests, without what these do not look at.

Of a target the config, the embedding and the head stay. The embedding that a case was computed with goes, since it is
the draft's or the target's, and of a draft that is refused all numbers go.

python benchmarks/trainers/keep.py CASES NAME [NAME ..]
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

KEPT = Path(__file__).parents[2] / "tests" / "artifacts" / "trainers"
LENT = ("model.embed_tokens.weight", "lm_head.weight")


def main() -> None:
    made, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        shutil.copytree(made / name, KEPT / name, dirs_exist_ok=True)
        golden, case = KEPT / name / "golden.safetensors", json.loads((made / name / "case.json").read_text())
        if "refused" in case:
            golden.unlink(missing_ok=True)
        else:
            save_file({key: tensor for key, tensor in load_file(golden).items() if key != "embedding"}, golden)
        target = case["target"]
        (KEPT / target).mkdir(parents=True, exist_ok=True)
        shutil.copy(made / target / "config.json", KEPT / target)
        tensors = load_file(made / target / "model.safetensors")
        save_file({name: tensors[name] for name in LENT if name in tensors}, KEPT / target / "model.safetensors")
    for path in KEPT.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    main()
