#!/usr/bin/env bash
# transformers 5.24.0: resize_token_embeddings, even to the same size, throws away a head that loading had kept.
#
# A checkpoint has an output head of its own, while its config still says `tie_word_embeddings: true` (a head that was
# fine-tuned on its own over a tied base is saved like this). from_pretrained sees that the two tables differ, warns
# that it will NOT tie them, and computes with the file's head. A later call of resize_token_embeddings ties them after
# all: the head becomes the embedding, and nothing is logged. So a script that makes room for a token, or only makes
# sure of the size, changes what the model says.
#
# Seen on 2026-11-27 (torch 2.13.0, CPU, float32; random weights):
#   after loading:                        logits equal those of the saved model
#   after resize_token_embeddings(64/64): relative distance 1.48, head and embedding are one tensor, no log record
# Exits 0 while that is so, 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
cd "$work"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import json
import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3, tie_word_embeddings=False,
    )
).eval()
tokens = torch.randint(3, 64, (1, 16))
model.save_pretrained("checkpoint")
config = Path("checkpoint/config.json")
config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))

records = []


class Listener(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())


logging.getLogger("transformers").addHandler(Listener())


@torch.no_grad()
def distance(other):
    """Relative distance of the logits from those of the model that was saved."""
    own = model(tokens).logits
    return ((other(tokens).logits - own).norm() / own.norm()).item()


opened = AutoModelForCausalLM.from_pretrained("checkpoint")
loaded, warned = distance(opened), any("NOT tie" in text for text in records)
print(f"after loading:  distance {loaded:.2e}, told that the tables are not tied: {warned}")
records.clear()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    opened.resize_token_embeddings(64)
resized = distance(opened)
one_table = opened.lm_head.weight is opened.model.embed_tokens.weight
print(f"after resizing: distance {resized:.2e}, one table: {one_table}, said: {records + [str(w) for w in caught]}")
as_seen = loaded < 1e-6 and warned and resized > 0.1 and one_table and not records and not caught
print("as seen on 2026-11-27" if as_seen else "CHANGED since 2026-11-27")
sys.exit(0 if as_seen else 1)
EOF
