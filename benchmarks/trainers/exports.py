"""redraft's exports of tiny drafts with every option, for vLLM and for packages that train on.

    python benchmarks/trainers/exports.py CASES

CASES gets a target and a case for each option and each of the formats ``vllm`` (for vLLM and speculators), ``plain``
(for vLLM) and ``specforge``, in the form of ``common.py``, with our own logits; what the exporter refuses is told.
``open_exports.py``, run in an environment of any of them, opens the cases and holds its logits against ours.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import common
import torch
from compare import unrolled
from safetensors.torch import load_file

from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft
from redraft.errors import UserError
from redraft.loading import read_facts
from redraft.registries import EXPORTERS

# The narrowest heads that vLLM's attention has on a CPU.
HEAD = 32
SHAPE: dict[str, Any] = {
    "hidden_size": common.WIDTH,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "target_vocab_size": common.VOCABULARY,
    "target_hidden_size": common.WIDTH,
    "draft_vocab_size": 48,
    "taps": (2, 4, 5),
    "max_position_embeddings": 4096,
    "rope_parameters": common.PLAIN,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "bare": {},
    "whole": {"draft_vocab_size": common.VOCABULARY},
    "norm-before-residual": {"norm_before_residual": True},
    "norm-before-fc": {"norm_before_fc": True},
    "fc-norm": {"fc_norm": True},
    "norm-output": {"norm_output": True},
    "no-head-norm": {"head_norm": False},
    "bias": {"attention_bias": True},
    "output-bias": {"output_bias": True},
    "fc-bias": {"fc_bias": True},
    "qk-norm": {"qk_norm": True},
    "qk-norm-bias": {"qk_norm": True, "attention_bias": True, "output_bias": False},
    "layers-2": {"num_layers": 2},
    "window": {"windows": (64,)},
    "qk-norm-window": {"qk_norm": True, "windows": (64,)},
    "own-embedding": {"own_embedding": True},
    "narrow": {"own_embedding": True, "hidden_size": 24},
    "taps-4": {"taps": (1, 3, 5, 7)},
    "wide-heads": {"head_dim": 2 * HEAD},
    "eps": {"rms_norm_eps": 1e-3},
    **{f"rope-{name}": {"rope_parameters": rope} for name, rope in common.ROPES.items()},
    "rope-yarn-scales": {"rope_parameters": common.ROPES["yarn"] | {"mscale": 0.7, "mscale_all_dim": 0.4}},
    "rope-yarn-factor": {"rope_parameters": common.ROPES["yarn"] | {"attention_factor": 0.8}},
    "rope-yarn-bounds": {"rope_parameters": common.ROPES["yarn"] | {"truncate": False}},
}


# What speculators' own unroll computes otherwise from the second step on.
SHORT: dict[str, dict[str, Any]] = {
    "short-window": {"windows": (8,)},
    "short-windows": {"num_layers": 2, "windows": (8, 8)},
    "qk-norm-short-windows": {"qk_norm": True, "num_layers": 2, "windows": (8, 8)},
}


def make(changes: dict[str, Any]) -> Eagle3Draft:
    """A seeded draft with these options."""
    config = Eagle3Config(**(SHAPE | changes))
    spread = torch.arange(common.VOCABULARY)[:: common.VOCABULARY // config.draft_vocab_size]
    draft = Eagle3Draft(config, spread[: config.draft_vocab_size])
    common.randomise(draft, 11)
    return draft.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    out = parser.parse_args().cases
    out.mkdir(parents=True, exist_ok=True)
    target = common.make_target(out, head_dim=HEAD)
    facts = read_facts(str(target), tokenizer=False)
    embedding = torch.nn.Embedding.from_pretrained(load_file(target / "model.safetensors")["model.embed_tokens.weight"])
    for option, changes in (OPTIONS | SHORT).items():
        draft = make(changes)
        ids, taps = common.inputs(draft.fc.in_features)
        for format in ("plain",) if option in SHORT else ("vllm", "plain", "specforge"):
            folder = out / f"redraft-{format}-{option}"
            shutil.rmtree(folder, ignore_errors=True)
            try:
                report = EXPORTERS.get(format)(draft, folder / "checkpoint", facts)
            except UserError as error:
                print(f"refused  {folder.name}: {error}")
                shutil.rmtree(folder, ignore_errors=True)
                continue
            about = {"trainer": "redraft", "version": format, "options": option, "taps": list(draft.taps)}
            about["notes"] = list(report.warnings)
            logits = unrolled(draft, embedding, ids, taps, common.STEPS)
            common.finish_case(folder, about, ids, taps, logits, draft.vocabulary(), embedding.weight)


if __name__ == "__main__":
    main()
