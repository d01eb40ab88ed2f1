"""Makes tests/artifacts/schema1: a tiny draft, a private part of it, and what both must say.

Run once, when schema 1 was young; kept to show what is in the files. A later schema gets a script and a folder of
its own, and these files must keep loading as they are.

    python tests/artifacts/make_schema1.py tests/artifacts/schema1
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from redraft.artifact import atomic_write_json, tensors_hash
from redraft.drafts.base import is_private
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft
from redraft.drafts.files import save_draft, save_private
from redraft.drafts.groups import attach_private

CONFIG = Eagle3Config(
    hidden_size=8,
    intermediate_size=12,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    target_hidden_size=8,
    target_vocab_size=20,
    draft_vocab_size=6,
    taps=(1, 2, 3),
    rms_norm_eps=1e-5,
    rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    max_position_embeddings=32,
    norm_before_fc=True,
)


def answer(draft: Eagle3Draft) -> list[list[float]]:
    """Logits [4, 6] of one step over a fixed input that needs no random numbers, every position seeing itself only."""

    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return values.expand_as(query)

    taps = torch.linspace(-1, 1, 4 * 24).reshape(4, 24).sin()
    embeds = torch.linspace(-2, 2, 4 * 8).reshape(4, 8).cos()
    with torch.no_grad():
        return draft.logits(draft(embeds, draft.fuse(taps), torch.arange(4), [attend])).tolist()


def main(folder: Path) -> None:
    torch.manual_seed(0)
    draft = Eagle3Draft(CONFIG, torch.tensor([0, 3, 4, 9, 15, 19]))
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    meta = {"method": None, "target": {"name": "tiny", "hash": "0" * 16}, "tokenizer_hash": "1" * 16}
    save_draft(folder / "draft", draft, meta)
    split = attach_private(draft, 4)
    torch.nn.init.normal_(split.midlayer.mlp.private.down_proj.weight)
    torch.nn.init.normal_(split.fc.weight, std=0.3)
    names = [name for name in split.state_dict() if is_private(name)] + ["fc.weight"]
    save_private(folder / "private", split, names, tensors_hash(draft.state_dict()), meta | {"method": "eda+fc"})
    atomic_write_json(folder / "expected.json", {"draft": answer(draft), "private": answer(split)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
