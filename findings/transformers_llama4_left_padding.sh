#!/usr/bin/env bash
# transformers 5.24.0: a left-padded row of a Llama 4 batch is computed as if it stood further along.
#
# Llama 4 scales the queries of its layers without RoPE by a temperature that grows with the position, in steps of
# `floor_scale` (8192 in the public checkpoints). transformers counts that position from the cache's length, padding
# included; it does not use `position_ids`, which `generate` derives from the attention mask. So a prompt beside a
# longer one gets other logits than the same prompt alone, as soon as its padded and its real positions lie in different
# steps. Ministral 3, in the same release, takes its scale of this kind from `position_ids`. With the temperature off,
# padded and alone agree.
#
# Seen on 2026-11-27 (torch 2.13.0, CPU, float32; random weights, floor_scale 8, attn_scale 0.1), relative distances of
# the logits of 16 padded rows from those of the same rows alone:
#   with the temperature:     forward 2e-2, generate 5e-3
#   without the temperature:  forward 7e-7, generate 9e-7
# Exits 0 while that is so, 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
cd "$work"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import sys

import torch
import transformers
from transformers import Llama4ForCausalLM, Llama4TextConfig

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
PADDING, SHORT, PROMPTS = 8, 12, 16
config = Llama4TextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
    no_rope_layers=[1, 1, 1, 0], attn_temperature_tuning=True, floor_scale=8, attn_scale=0.1,
    attention_chunk_size=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)
model = Llama4ForCausalLM(config).eval()
prompts = torch.randint(3, 64, (PROMPTS, SHORT))
neighbour = torch.randint(3, 64, (1, PADDING + SHORT))
batch = torch.cat([torch.nn.functional.pad(prompts, (PADDING, 0)), neighbour])
mask = torch.ones_like(batch)
mask[:PROMPTS, :PADDING] = 0
positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)


def distance(other, own):
    return ((other - own).norm() / own.norm()).item()


@torch.no_grad()
def compare(title):
    """Relative distances, padded rows from the same rows alone: all logits of a forward, the first of `generate`."""
    padded = model(batch, attention_mask=mask, position_ids=positions).logits[:PROMPTS, PADDING:]
    forward = distance(padded, model(prompts).logits)
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    alone = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options).logits[0]
    beside = model.generate(batch, attention_mask=mask, **options).logits[0][:PROMPTS]
    generated = distance(beside, alone)
    print(f"{title}: forward {forward:.1e}, generate {generated:.1e}")
    return forward, generated


tuned = compare("with the temperature")
for layer in model.model.layers:
    layer.self_attn.attn_temperature_tuning = False
plain = compare("without the temperature")
as_seen = min(tuned) > 1e-3 and max(plain) < 1e-5
print("as seen on 2026-11-27" if as_seen else "CHANGED since 2026-11-27")
sys.exit(0 if as_seen else 1)
EOF
