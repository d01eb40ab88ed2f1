#!/usr/bin/env bash
# transformers 5.24.0: tensors under another name than the model's are loaded, and the loading report says "complete".
#
# from_pretrained(..., output_loading_info=True) reports missing and unexpected tensors. Two kinds escape it:
# (1) `layers.0...` beside `model.layers.0...` in one checkpoint: both names stand for the same parameter, the one
#     without the prefix is used, and neither is reported;
# (2) experts numbered 0, 2, 3, 7 in a checkpoint of a model with four: they are stacked in that order, so what the file
#     calls expert 2 answers for expert 1, and so on. Neither the absent expert 1 nor the extra expert 7 is reported.
# A tensor of a layer that the model lacks (`model.layers.7...`) is reported, as one would expect.
#
# Seen on 2026-11-27 (torch 2.13.0, CPU, float32; random weights), relative distance of the logits from the model saved:
#   two names:      1.5, nothing missing, nothing unexpected
#   other numbers:  1.2, nothing missing, nothing unexpected
#   another layer:  0, one unexpected
# Exits 0 while that is so, 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}
tokens = torch.randint(3, 64, (1, 16))


@torch.no_grad()
def opened(title, model, change):
    """Saves `model`, changes its tensors, opens the folder; the logits' relative distance and the report's lists."""
    folder = title.replace(" ", "-")
    model.save_pretrained(folder)
    tensors = load_file(f"{folder}/model.safetensors")
    save_file(change(tensors), f"{folder}/model.safetensors", {"format": "pt"})
    other, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    own = model(tokens).logits
    distance = ((other.eval()(tokens).logits - own).norm() / own.norm()).item()
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    print(f"{title}: distance {distance:.2f}, missing {missing}, unexpected {unexpected}")
    return distance, missing, unexpected


def with_second_name(tensors):
    first = {name: value for name, value in tensors.items() if name.startswith("model.layers.0.")}
    return tensors | {name.removeprefix("model."): torch.randn_like(value) for name, value in first.items()}


def with_other_numbers(tensors):
    return {name.replace(".experts.1.", ".experts.7."): value for name, value in tensors.items()}


def with_another_layer(tensors):
    return tensors | {"model.layers.7.mlp.up_proj.weight": torch.zeros(64, 32)}


dense = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
sparse = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)).eval()
named = opened("two names", dense, with_second_name)
numbered = opened("other numbers", sparse, with_other_numbers)
layered = opened("another layer", dense, with_another_layer)
as_seen = (
    named[0] > 0.1
    and numbered[0] > 0.1
    and not any(named[1:] + numbered[1:])
    and layered[0] < 1e-6
    and layered[2] == ["model.layers.7.mlp.up_proj.weight"]
)
print("as seen on 2026-11-27" if as_seen else "CHANGED since 2026-11-27")
sys.exit(0 if as_seen else 1)
EOF
