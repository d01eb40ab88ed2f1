"""Exports of redraft, opened by the package that they are for: does it compute what redraft computes?

    PYTHONPATH=<unpacked package> python open_exports.py CASES speculators|specforge

CASES is what ``exports.py`` wrote. Each folder is opened by the package's own loader, speculators' ``from_pretrained``
or the warm start of SpecForge's training, and its logits over three draft steps are held against ours. "equal": within
1e-5; "told": otherwise, as the export's own notes said; "wrong": otherwise, and nothing was said. Exit status 1 where
one is wrong, or where one is equal of which it was said that it is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import torch
from safetensors.torch import load_file
from torch import Tensor

WITHIN = 1e-5


def speculators(folder: Path, ids: Tensor, taps: Tensor) -> Tensor:
    """By the package's ``from_pretrained`` and its own forward."""
    import make_speculators
    from speculators.model import SpeculatorModel

    model = SpeculatorModel.from_pretrained(str(folder / "checkpoint"), torch_dtype=torch.float32).eval()
    return make_speculators.forward(model, ids, taps)


def specforge(folder: Path, ids: Tensor, taps: Tensor) -> Tensor:
    """By the warm start of its training, then step by step as its training unrolls: own keys beside those of step 0."""
    from specforge.modeling.auto import AutoDraftModel
    from specforge.training.model_loading import load_draft_config_source, warm_start_draft_model

    config = load_draft_config_source(str(folder / "checkpoint"))
    model = AutoDraftModel.from_config(config, torch_dtype=torch.float32)
    warm_start_draft_model(
        model, str(folder / "checkpoint"), draft_config=config, strategy="eagle3", allow_missing_embedding=True
    )
    if not any("embed" in name for name in load_file(folder / "checkpoint" / "model.safetensors")):
        model.load_embedding(str(folder.parent / "target"))
    golden = load_file(folder / "golden.safetensors")
    found = torch.arange(config.draft_vocab_size) + model.d2t
    if not torch.equal(found, golden["vocabulary"]):
        raise ValueError("another vocabulary")
    length = len(taps)
    positions, cache = torch.arange(length)[None], [[], []]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    logits = []
    with torch.no_grad():
        states = model.project_hidden_states(taps[None])
        for step in range(common.STEPS):
            embeds = model.embed_input_ids(ids[1 + step : 1 + step + length][None])
            states = model.backbone(embeds, states, cache, mask, positions)
            logits.append(model.compute_logits(states)[0])
    return torch.stack(logits)


PACKAGES = {"speculators": ("vllm", speculators), "specforge": ("specforge", specforge)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("package", choices=sorted(PACKAGES))
    options = parser.parse_args()
    format, compute = PACKAGES[options.package]
    wrong, folders = 0, sorted(options.cases.glob(f"redraft-{format}-*"))
    if not folders:
        sys.exit(f"{options.cases} holds no exports for {options.package}; write them with exports.py")
    for folder in folders:
        golden = SimpleNamespace(**load_file(folder / "golden.safetensors"))
        row: dict[str, Any] = {"case": folder.name, "package": options.package}
        try:
            found = compute(folder, golden.ids, golden.taps)
            row["largest_difference"] = float((found - golden.logits).abs().max())
        except Exception as error:  # what the package makes of the file is the question here
            row |= {"largest_difference": None, "why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        notes = json.loads((folder / "case.json").read_text())["notes"]
        told = [note for note in notes if note.startswith(f"not for {options.package}")]
        equal = row["largest_difference"] is not None and row["largest_difference"] <= WITHIN
        verdict = "equal" if equal else "told" if told else "wrong"
        wrong += verdict == "wrong" or (equal and bool(told))
        print(verdict, json.dumps(row | {"told": told}), flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
