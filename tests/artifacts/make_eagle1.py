"""Makes tests/artifacts/eagle1: a tiny Eagle1 draft, a private part of it, and what both must say.

Run once, when the family was young (schema 1); kept to show what is in the files, which must keep loading as they are.

    python tests/artifacts/make_eagle1.py tests/artifacts/eagle1
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from redraft.artifact import atomic_write_json, tensors_hash
from redraft.drafts.base import is_private
from redraft.drafts.eagle1 import Eagle1Config, Eagle1Draft
from redraft.drafts.files import save_draft, save_private
from redraft.drafts.groups import attach_private

CONFIG = Eagle1Config(
    hidden_size=8,
    intermediate_size=12,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    target_vocab_size=20,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    max_position_embeddings=32,
    fc_bias=True,
)


def answer(draft: Eagle1Draft) -> list[list[float]]:
    """Logits [4, 20] of one step over a fixed input and head that need no random numbers, each position alone."""

    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return values.expand_as(query)

    head = torch.linspace(-3, 3, 20 * 8).reshape(20, 8).sin()
    draft.bind(SimpleNamespace(head=lambda states: states @ head.T, scale_logits=lambda logits: logits))
    states = torch.linspace(-1, 1, 4 * 8).reshape(4, 8).sin()
    embeds = torch.linspace(-2, 2, 4 * 8).reshape(4, 8).cos()
    with torch.no_grad():
        return draft.logits(draft(embeds, draft.fuse(states), torch.arange(4), [attend])).tolist()


def main(folder: Path) -> None:
    torch.manual_seed(0)
    draft = Eagle1Draft(CONFIG)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    meta = {"method": None, "target": {"name": "tiny", "hash": "0" * 16}, "tokenizer_hash": "1" * 16}
    save_draft(folder / "draft", draft, meta)
    split = attach_private(draft, 4)
    torch.nn.init.normal_(split.midlayer.mlp.private.down_proj.weight)
    torch.nn.init.normal_(split.fc.weight, std=0.3)
    names = [name for name in split.state_dict() if is_private(name)] + ["fc.weight", "fc.bias"]
    save_private(folder / "private", split, names, tensors_hash(draft.state_dict()), meta | {"method": "eda+fc"})
    atomic_write_json(folder / "expected.json", {"draft": answer(draft), "private": answer(split)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
