"""Makes tests/artifacts/coarse: a tiny draft and a private part that tells its matrices in two bits a weight.

Run once, when such parts were young; kept to show what is in the files, which must keep loading as they are.

    python tests/artifacts/make_coarse.py tests/artifacts/coarse
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch

from redraft.artifact import atomic_write_json, tensors_hash
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.drafts.files import save_draft, save_private
from redraft.drafts.scaling import coarse_change

sys.path.insert(0, str(Path(__file__).parent))
from make_schema1 import CONFIG, answer

__all__ = ["CONFIG", "answer"]
METHOD = "full"


def main(folder: Path) -> None:
    torch.manual_seed(0)
    draft = Eagle3Draft(CONFIG, torch.tensor([0, 3, 4, 9, 15, 19]))
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    draft = draft.to(torch.bfloat16)
    trained = copy.deepcopy(draft).float()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    meta = {"method": None, "target": {"name": "tiny", "hash": "0" * 16}, "tokenizer_hash": "1" * 16}
    save_draft(folder / "draft", draft, meta)
    names = [name for name, _ in trained.named_parameters()]
    rounded, parts = coarse_change(trained, draft, names, 2)
    base = draft.state_dict()
    save_private(folder / "private", rounded, names, tensors_hash(base), meta | {"method": METHOD}, base, parts)
    atomic_write_json(folder / "expected.json", {"draft": answer(draft.float()), "private": answer(rounded.float())})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
