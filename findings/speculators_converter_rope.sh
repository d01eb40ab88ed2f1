#!/usr/bin/env bash
# speculators 0.5.0 and 0.6.0: the converter of EAGLE-3 drafts leaves out `rope_scaling`, so that other angles are used.
#
# `convert_model` reads another program's draft and writes one in the package's own format. In these releases the base
# of the angles (`rope_theta`) is taken over and their kind is not: a draft with Llama 3's angles, as those of all Llama
# 3.1 targets are, is written with plain ones, and nothing is said. The loaders of drafts then compute the plain ones.
# 0.7.0 and later take the kind over.
#
# Seen on 2026-11-28 (torch 2.13.0, CPU; a tiny draft of kind llama3), kind of angles in the converted config:
#   0.5.0, 0.6.0: default
#   0.7.0, 0.9.0: llama3
# Exits 0 while that is so, 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.6.2 numpy==2.4.6 pydantic \
    pydantic-settings loguru datasets==4.8.4 typer rich psutil openai hs-connectors==0.9.0
cat > "$work/probe.py" <<'EOS'
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch

warnings.simplefilter("ignore")
from loguru import logger

logger.remove()
from safetensors.torch import save_file
from speculators.convert.eagle.eagle3_converter import Eagle3Converter
from transformers import LlamaConfig

torch.manual_seed(0)
WIDTH, INNER, ROWS, KEPT = 32, 48, 96, 40
shapes = {
    "fc": (WIDTH, 3 * WIDTH), "norm": (WIDTH,), "lm_head": (KEPT, WIDTH),
    **{f"midlayer.{name}": (WIDTH,) for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")},
    **{f"midlayer.self_attn.{name}_proj": (WIDTH, 2 * WIDTH) for name in "qkv"},
    "midlayer.self_attn.o_proj": (WIDTH, WIDTH),
    **{f"midlayer.mlp.{name}_proj": (INNER, WIDTH) for name in ("gate", "up")},
    "midlayer.mlp.down_proj": (WIDTH, INNER),
}
state = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
state["d2t"], state["t2d"] = torch.zeros(KEPT, dtype=torch.long), torch.arange(ROWS) < KEPT
scaling = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
config = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": WIDTH, "vocab_size": ROWS,
    "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "draft_vocab_size": KEPT, "rope_theta": 500000.0, "rope_scaling": scaling, "max_position_embeddings": 131072,
}
with tempfile.TemporaryDirectory() as place:
    draft, target, out = (Path(place) / name for name in ("draft", "target", "out"))
    draft.mkdir()
    save_file(state, draft / "model.safetensors")
    (draft / "config.json").write_text(json.dumps(config))
    LlamaConfig(vocab_size=ROWS, hidden_size=WIDTH, num_hidden_layers=8).save_pretrained(target)
    Eagle3Converter().convert(draft, out, str(target), validate=False)
    layer = json.loads((out / "config.json").read_text())["transformer_layer_config"]
found = layer.get("rope_parameters") or {"rope_type": "default"}
print(sys.argv[1], found)
wanted = "default" if sys.argv[1] in ("0.5.0", "0.6.0") else "llama3"
sys.exit(0 if found["rope_type"] == wanted else 9)
EOS
cd "$work"
export CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1
for release in 0.5.0 0.6.0 0.7.0 0.9.0; do
    venv/bin/pip install --quiet --no-compile --no-deps "speculators==$release"
    venv/bin/python probe.py "$release" || status=$?
    if [ "${status:-0}" = 9 ]; then echo "CHANGED since 2026-11-28"; fi
    if [ "${status:-0}" != 0 ]; then exit 1; fi
done
echo "as seen on 2026-11-28"
