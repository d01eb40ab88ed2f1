#!/usr/bin/env bash
# transformers 5.16.0: Gemma 2 opened without a word runs through sdpa, and its attention soft cap is left out.
#
# Gemma 2's config has `attn_logit_softcapping` (50.0 in the published models): attention scores are squeezed by a tanh
# before the softmax. The sdpa attention function of transformers does not take it. Version 5.16.0 chooses sdpa all the
# same where nothing is asked for, so that a Gemma 2 gives other logits than with eager attention, which does apply the
# cap; there is no warning. 5.24.0 chooses eager by itself, and sdpa has to be asked for.
#
# Seen on 2026-11-28 (torch 2.13.0, CPU; random weights, a cap of 2.0 so that it bites), relative distance of the logits
# of the model as it opens by itself from those under eager attention:
#   5.16.0: opens with sdpa, distance 0.09
#   5.24.0: opens with eager, distance 0.00
# Exits 0 while that is so, 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
cat > "$work/probe.py" <<'EOF'
import sys
import warnings

warnings.simplefilter("error")
import torch
import transformers
from transformers import Gemma2Config, Gemma2ForCausalLM

torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, attn_logit_softcapping=2.0, initializer_range=0.5,
)
Gemma2ForCausalLM(config).save_pretrained("checkpoint")
tokens = torch.randint(3, 64, (1, 16))


@torch.no_grad()
def opened(**options):
    model = Gemma2ForCausalLM.from_pretrained("checkpoint", **options).eval()
    return model.config._attn_implementation, model(tokens).logits.float()


name, itself = opened()
_, eager = opened(attn_implementation="eager")
distance = ((itself - eager).norm() / eager.norm()).item()
print(f"transformers {transformers.__version__}: opens with {name}, distance {distance:.2f}")
wanted = {"5.16.0": name == "sdpa" and distance > 0.05, "5.24.0": name == "eager" and distance < 1e-4}
sys.exit(0 if wanted[transformers.__version__] else 1)
EOF
cd "$work"
export CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1
as_seen=yes
for version in 5.16.0 5.24.0; do
    venv/bin/pip install --quiet --no-compile torch==2.13.0 "transformers==$version" numpy==2.4.6
    rm -rf checkpoint
    venv/bin/python probe.py || as_seen=no
done
if [ "$as_seen" = yes ]; then echo "as seen on 2026-11-28"; else echo "CHANGED since 2026-11-28"; exit 1; fi
