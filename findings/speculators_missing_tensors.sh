#!/usr/bin/env bash
# speculators 0.9.0: an EAGLE-3 draft without `embed_tokens` opens with a table of zeros, one without `d2t` with no map.
#
# A draft file may leave out the embedding, since it is the verifier's; other programs write such files. On opening,
# speculators fills it in from the verifier where the table holds NaN, its mark for tensors that were never loaded.
# But a tensor that the file lacks has been made anew from uninitialised memory by then, so the mark is gone and what
# the memory held is kept: on Linux zeros for a large table, anything for a small one. The map `d2t` (draft id to
# verifier id) is uninitialised memory as well where the file lacks it. Both names are on the list of tensors that may
# be missing, so the loading report has neither, and nothing else is said. A missing `fc.weight` is reported.
#
# Seen on 2026-11-27 (torch 2.13.0, CPU; random weights; vocabulary 32,000, width 512):
#   complete:             embedding and map are the ones saved
#   without embed_tokens: embedding all zeros (the verifier's has deviation 0.02), nothing reported
#   without d2t:          another map, nothing reported
#   without fc:           reported
# Exits 0 while that is so, 1 once it is not. (torchvision and torchaudio, which come with the package, are taken out:
# the library does not use them here, and builds for another torch would not open.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 speculators==0.9.0 transformers==5.19.0 numpy==2.4.6
"$work/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio
cd "$work"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import copy
import logging
import sys
from importlib.metadata import version

import torch
import transformers
from loguru import logger
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel
from speculators.models.eagle3 import Eagle3DraftModel
from transformers import LlamaConfig, LlamaForCausalLM

print("speculators", version("speculators"), "transformers", transformers.__version__, "torch", torch.__version__)
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
VOCABULARY, DRAFT_VOCABULARY = 32_000, 8_000
config = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=512, intermediate_size=64, num_hidden_layers=8, num_attention_heads=8,
    max_position_embeddings=128,
)
verifier = LlamaForCausalLM(config)
verifier.save_pretrained("verifier")
kept = torch.arange(1, 2 * DRAFT_VOCABULARY, 2)
t2d = torch.zeros(VOCABULARY, dtype=torch.bool)
t2d[kept] = True
d2t = kept - torch.arange(DRAFT_VOCABULARY)
layer = copy.deepcopy(config)
layer.num_hidden_layers = 1
said = []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logger.remove()
logger.add(lambda message: said.append(str(message)), level="WARNING", format="{message}")
logging.getLogger("transformers").addHandler(Listener())
draft = Eagle3DraftModel.from_training_args(
    layer, t2d=t2d, d2t=d2t, draft_vocab_size=DRAFT_VOCABULARY, verifier_name_or_path="verifier",
    norm_before_residual=False, ttt_steps=3, target_layer_ids=[2, 4, 5],
)
draft.save_pretrained("draft")
tensors = load_file("draft/model.safetensors")


def opened(lost):
    """(embedding is the verifier's, largest of the embedding, map is the one saved, the lost name was spoken of)."""
    save_file({name: x for name, x in tensors.items() if name != lost}, "draft/model.safetensors", {"format": "pt"})
    said.clear()
    other = SpeculatorModel.from_pretrained("draft")
    table = other.embed_tokens.weight
    found = (
        torch.equal(table, verifier.model.embed_tokens.weight),
        table.abs().max().item(),
        torch.equal(other.d2t, d2t),
        lost is not None and any(lost in text for text in said),
    )
    print(f"without {lost}: embedding right {found[0]}, largest {found[1]:.3f}, map right {found[2]}, said {found[3]}")
    return found


whole, no_table, no_map, no_fc = (opened(lost) for lost in (None, "embed_tokens.weight", "d2t", "fc.weight"))
as_seen = (
    whole[0]
    and whole[2]
    and not no_table[0]
    and not no_table[3]
    and not no_map[2]
    and not no_map[3]
    and no_fc[3]
)
print("as seen on 2026-11-27" if as_seen else "CHANGED since 2026-11-27")
sys.exit(0 if as_seen else 1)
EOF
