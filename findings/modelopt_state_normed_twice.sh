#!/usr/bin/env bash
# nvidia-modelopt 0.47: an EAGLE-3 draft is trained with its state normed twice, and exported for engines that do it once.
#
# EAGLE-3's first layer reads the normed embedding beside the normed state, hidden_norm(state). In this package a hook in
# front of the attention makes that pair, and the decoder layer's own first norm is to be passed over; but it is
# replaced by a new norm, under the same name, that still runs: the attention reads hidden_norm(input_layernorm(state)).
# The exported file has both weights and says nothing of it, and vLLM, SGLang and TensorRT-LLM compute
# hidden_norm(state). While input_layernorm is near one this is small; its weights are trained for the embedding.
#
# Seen on 2026-11-28 (torch 2.13.0, CPU; random weights, norms around one):
#   what the attention reads is hidden_norm(input_layernorm(state)) exactly, and is 1.3 away from hidden_norm(state)
# Exits 0 while that is so, 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 "transformers==5.14.1" numpy==2.4.6 omegaconf==2.3.0 \
    "pulp<4" scipy nvidia-ml-py ninja psutil pandas requests accelerate
"$work/venv/bin/pip" install --quiet --no-compile --no-deps nvidia-modelopt==0.47.0
cd "$work"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import copy
import sys
from importlib.metadata import version

import modelopt.torch.speculative as mtsp
import torch
import transformers
from modelopt.torch.speculative.config import eagle3_default_config
from transformers import LlamaConfig, LlamaForCausalLM

print("nvidia-modelopt", version("nvidia-modelopt"), "transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
)
model = LlamaForCausalLM(config)
shape = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
architecture = copy.deepcopy(eagle3_default_config | shape)
mtsp.convert(model, [("eagle", {"eagle_architecture_config": architecture, "eagle_use_torch_compile": False})])
layer = model.eagle_module.layers[0]
with torch.no_grad():
    for norm in (layer.input_layernorm, layer.hidden_norm):
        norm.weight.copy_(1 + 0.3 * torch.randn(32))
seen = {}
layer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(state=args[0]), with_kwargs=True)
layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.update(read=args[0]))
with torch.no_grad():
    model.eval()(input_ids=torch.randint(0, 64, (1, 12)))
    read = seen["read"][..., 32:]  # the embedding comes first
    once = layer.hidden_norm(seen["state"])
    twice = layer.hidden_norm(layer.input_layernorm(seen["state"]))
near, far = float((read - twice).abs().max()), float((read - once).abs().max())
print(f"the attention reads hidden_norm(input_layernorm(state)) to {near:.1g}; hidden_norm(state) is {far:.2f} away")
as_seen = near < 1e-5 and far > 0.1
print("as seen on 2026-11-28" if as_seen else "CHANGED since 2026-11-28")
sys.exit(0 if as_seen else 1)
EOF
