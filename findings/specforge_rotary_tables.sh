#!/usr/bin/env bash
# SpecForge 0.2.0: a draft opened by its own `AutoDraftModel.from_pretrained` rotates by memory that nobody set.
#
# The draft's rotary module computes its table of angles when it is made and keeps it as buffers that are not part of
# the file. transformers 5 makes a model without numbers first and then reads the file into it, so what a module
# computed when it was made is lost; its own rotary modules are filled in anew, those of others are not. SpecForge 0.2.0
# requires transformers 5.8.1 and opens drafts in this way. Going on with a training run is not touched, since only the
# tensors are taken over from the opened model.
#
# Seen on 2026-11-28 (torch 2.13.0, transformers 5.8.1, CPU; random weights, head width 64, 4,096 positions):
#   made from the config: frequencies from 1 down, table of 4,116 positions within -1 and 1
#   opened from its file: other frequencies and another table, with all tensors of the file right and nothing reported
# Exits 0 while that is so, 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.8.1 numpy==2.4.6
"$work/venv/bin/pip" install --quiet --no-compile --no-deps specforge==0.2.0
cd "$work"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 TORCHDYNAMO_DISABLE=1 venv/bin/python - <<'EOS'
import logging
import sys
import warnings
from importlib.metadata import version

import torch
import transformers

warnings.simplefilter("ignore")
from specforge.modeling.auto import AutoDraftModel
from transformers import LlamaConfig

print("specforge", version("specforge"), "transformers", transformers.__version__, "torch", torch.__version__)
transformers.logging.disable_progress_bar()
said = []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logging.getLogger("transformers").addHandler(Listener())
torch.manual_seed(0)
config = LlamaConfig(
    architectures=["LlamaForCausalLMEagle3"], vocab_size=1000, draft_vocab_size=1000, hidden_size=256,
    intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=4096, pad_token_id=0,
    tie_word_embeddings=False,
)
made = AutoDraftModel.from_config(config)
made.save_pretrained("draft")
opened = AutoDraftModel.from_pretrained("draft", dtype=torch.float32)
tensors = opened.state_dict()
same = all(torch.equal(tensor, tensors[name]) for name, tensor in made.state_dict().items())
of_made, of_opened = (model.midlayer.self_attn.rotary_emb for model in (made, opened))
print("tensors of the file right:", same)
print("frequencies made  ", of_made.inv_freq[:3].tolist())
print("frequencies opened", of_opened.inv_freq[:3].tolist())
lost = not any(torch.equal(getattr(of_made, name), getattr(of_opened, name)) for name in ("inv_freq", "cos_cached"))
spoken = any("cos_cached" in text or "inv_freq" in text for text in said)
as_seen = same and lost and not spoken
print("as seen on 2026-11-28" if as_seen else "CHANGED since 2026-11-28")
sys.exit(0 if as_seen else 1)
EOS
