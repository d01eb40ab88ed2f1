#!/usr/bin/env bash
# AngelSlim 0.5.0: EAGLE-3 drafts are trained with rotary base 10000, whatever `rope_theta` the config says.
#
# The training layer makes its rotary table without the config's base, so the table's own default, 10000, is taken; the
# package's configs for Qwen3 say 1000000, and that number is saved with the draft. vLLM and SGLang turn queries and keys
# by the saved one: another function than was trained, and nothing says so. The package's own decoding takes the
# saved one too. (Drafts of targets with base 10000 are not touched by this.)
#
# The wheel cannot be imported as it is: its first `import angelslim` asks for `angelslim.compressor.qat`, which is not
# in it. The script shows that, and then imports the draft's module without the packages' `__init__`.
#
# Seen on 2026-11-28 (torch 2.13.0, CPU):
#   import angelslim: No module named 'angelslim.compressor.qat'
#   rope_theta 1000000 in the config: base of the layer's table 10000, and the table equals that of rope_theta 10000
# Exits 0 while that is so, 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 "transformers==5.14.1" numpy==2.4.6 datasets accelerate \
    pillow shortuuid requests
"$work/venv/bin/pip" install --quiet --no-compile --no-deps angelslim==0.5.0
cd "$work"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import importlib.util
import sys
from importlib.metadata import version
from types import ModuleType

import torch
import transformers
from transformers import LlamaConfig

print("angelslim", version("angelslim"), "transformers", transformers.__version__, "torch", torch.__version__)
try:
    import angelslim
    missing = ""
except ModuleNotFoundError as error:
    missing = str(error)
print("import angelslim:", missing or "works")
for name in [name for name in sys.modules if name.split(".")[0] == "angelslim"]:
    del sys.modules[name]
for name in ("angelslim", "angelslim.compressor", "angelslim.compressor.speculative"):
    module = ModuleType(name)
    module.__path__ = list(importlib.util.find_spec(name).submodule_search_locations)
    sys.modules[name] = module
from angelslim.compressor.speculative.train.models.draft.llama_eagle3 import Eagle3LlamaForCausalLM  # noqa: E402


def draft(theta):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rope_theta=theta, rope_scaling=None,
    )
    config.draft_vocab_size = 32
    return Eagle3LlamaForCausalLM(config)


large, usual = draft(1_000_000), draft(10_000)
large.save_pretrained("draft")
saved = LlamaConfig.from_pretrained("draft").rope_parameters["rope_theta"]
tables = [each.midlayer.self_attn.rotary_emb.inv_freq for each in (large, usual)]
base = large.midlayer.self_attn.rotary_emb.base
print(f"saved rope_theta {saved}; base of the layer {base}; table of rope_theta 10000: {torch.equal(*tables)}")
as_seen = "angelslim.compressor.qat" in missing and saved == 1_000_000 and base == 10_000 and torch.equal(*tables)
print("as seen on 2026-11-28" if as_seen else "CHANGED since 2026-11-28")
sys.exit(0 if as_seen else 1)
EOF
