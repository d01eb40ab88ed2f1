#!/usr/bin/env bash
# transformers 5.24.0 with compressed-tensors 0.20.0: unpacking at load hides that a scale is missing.
#
# A compressed-tensors FP8 checkpoint keeps, for every linear layer, 8-bit codes and a `weight_scale`; a weight is code
# times scale. Opened as it stands, a checkpoint that lost one scale is reported: the scale is among the missing keys.
# Opened with `CompressedTensorsConfig(dequantize=True)` it is not: the bare codes (up to 448) become that layer's
# weights, and the loading report says that nothing is missing and nothing unexpected.
#
# Seen on 2026-11-27 (torch 2.13.0, CPU; random weights), relative distance of the logits from the unquantised model:
#   complete,  dequantize=True:  0.06, nothing reported
#   one lost,  dequantize=True:  1.17, nothing reported, that layer's largest weight 448 (0.36 in the model)
#   one lost,  as it stands:     reported as missing
# Exits 0 while that is so, 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.0 \
    safetensors==0.8.0 numpy==2.4.6
cd "$work"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import json
import sys
import warnings
from pathlib import Path

import compressed_tensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__, "compressed-tensors", compressed_tensors.__version__)
warnings.filterwarnings("ignore", message="You passed `quantization_config`")
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1,
    )
).eval()
tokens = torch.randint(3, 64, (1, 16))
model.save_pretrained("checkpoint")
weights = {
    "num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False,
}
config = json.loads(Path("checkpoint/config.json").read_text())
config["quantization_config"] = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
    "config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"],
}
Path("checkpoint/config.json").write_text(json.dumps(config))
packed = load_file("checkpoint/model.safetensors")
for name in [name for name in packed if name.endswith("proj.weight")]:
    scale = packed[name].abs().amax(dim=1, keepdim=True) / 448
    packed[name] = (packed[name] / scale).to(torch.float8_e4m3fn)
    packed[f"{name}_scale"] = scale
LOST = "model.layers.1.mlp.up_proj.weight_scale"


@torch.no_grad()
def opened(title, tensors, **options):
    """Relative distance of the logits, the largest weight of the layer in question, missing and unexpected keys."""
    save_file(tensors, "checkpoint/model.safetensors", {"format": "pt"})
    other, report = AutoModelForCausalLM.from_pretrained("checkpoint", output_loading_info=True, **options)
    own = model(tokens).logits
    distance = ((other(tokens).logits.float() - own).norm() / own.norm()).item()
    largest = other.model.layers[1].mlp.up_proj.weight.abs().max().item()
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    print(f"{title}: distance {distance:.2f}, largest {largest:.2f}, missing {missing}, unexpected {unexpected}")
    return distance, largest, missing, unexpected


partial = {name: value for name, value in packed.items() if name != LOST}
whole = opened("complete, dequantize", packed, quantization_config=CompressedTensorsConfig(dequantize=True))
silent = opened("one lost, dequantize", partial, quantization_config=CompressedTensorsConfig(dequantize=True))
told = opened("one lost, as it stands", partial)
as_seen = (
    whole[0] < 0.2
    and not (whole[2] or whole[3] or silent[2] or silent[3])
    and silent[0] > 0.5
    and silent[1] == 448
    and told[2] == [LOST]
)
print("as seen on 2026-11-27" if as_seen else "CHANGED since 2026-11-27")
sys.exit(0 if as_seen else 1)
EOF
