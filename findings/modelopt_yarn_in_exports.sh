#!/usr/bin/env bash
# nvidia-modelopt 0.47: a draft trained with plain rotary angles is exported with yarn ones, factor 32.
#
# The recipe and the default of `eagle_export_rope_scaling` put {"rope_type": "yarn", "factor": 32.0,
# "original_max_position_embeddings": 2048} into the config of every draft whose training angles are plain, to reach
# longer texts. Engines then turn queries and keys otherwise than in training at every position, the first ones too:
# yarn scales cosines and sines by 0.1 ln(32) + 1 = 1.347, so the attention's logits grow by 1.81. It is a choice of the
# package, not an accident, but the file does not say that it was not trained so. `eagle_export_rope_scaling={}` turns it
# off. What it costs is to be measured draft by draft.
#
# Seen on 2026-11-28 (torch 2.13.0, CPU; random weights):
#   trained: type default, attention scaling 1; exported: yarn, factor 32, attention scaling 1.347
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
import json
import sys
from importlib.metadata import version

import modelopt.torch.speculative as mtsp
import torch
import transformers
from modelopt.torch.speculative.config import eagle3_default_config
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

print("nvidia-modelopt", version("nvidia-modelopt"), "transformers", transformers.__version__, "torch", torch.__version__)
transformers.logging.set_verbosity_error()
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=4096,
)
model = LlamaForCausalLM(config)
shape = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
architecture = copy.deepcopy(eagle3_default_config | shape)
mtsp.convert(model, [("eagle", {"eagle_architecture_config": architecture, "eagle_use_torch_compile": False})])
with torch.no_grad():
    model.eval()(input_ids=torch.randint(0, 64, (1, 12)))
trained = model.eagle_module.rotary_emb
model.get_exporter().export("draft")
written = json.load(open("draft/config.json"))
rope = written["rope_scaling"] | {"rope_theta": written["rope_theta"]}
served = LlamaRotaryEmbedding(LlamaConfig(**(config.to_dict() | {"rope_parameters": rope})))
print("trained:", trained.rope_type, trained.attention_scaling, "exported:", rope, round(served.attention_scaling, 3))
as_seen = trained.rope_type == "default" and rope["rope_type"] == "yarn" and rope["factor"] == 32.0
as_seen = as_seen and abs(served.attention_scaling - 1.3466) < 1e-3 and trained.attention_scaling == 1.0
print("as seen on 2026-11-28" if as_seen else "CHANGED since 2026-11-28")
sys.exit(0 if as_seen else 1)
EOF
