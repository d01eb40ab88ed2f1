#!/usr/bin/env bash
# SpecForge 0.2.0: training on stored features puts a newly counted vocabulary map over the head of a loaded draft.
#
# A draft with a reduced vocabulary is given as `model.draft_checkpoint_path`; its map is loaded with it. Where the run
# trains on stored features and names no `model.vocab_mapping_path`, the map is counted anew from these features and
# copied over the loaded one. The rows of the head stay where they were, so each of them now speaks for another token
# wherever the two maps differ, and the draft has to learn its head again. Nothing is said of it. (A run that names the
# old map's file keeps it.) The embedding, on the other hand, is replaced with the target's, as it should be.
#
# Seen on 2026-11-28 (torch 2.13.0, CPU; random weights), by the functions that a training run calls in this order:
#   loaded: ids of the head's first rows [0, 1, 2]; then: [900, 901, 902], over the same rows
#   embedding of the loaded draft: the target's
# Exits 0 while that is so, 1 once it is not. (The package is installed without its requirements, which name a GPU build
# and a server; those that are imported here follow.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.19.0 numpy==2.4.6 accelerate==1.15.0 \
    datasets==5.2.0 pydantic==2.14.4 psutil requests tqdm pyyaml
"$work/venv/bin/pip" install --quiet --no-compile --no-deps specforge==0.2.0
cd "$work"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'EOF'
import copy
import json
import os
import sys
from importlib.metadata import version
from types import SimpleNamespace

import torch
import transformers
from specforge.application.composition import resolve_run
from specforge.config.schema import Config
from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig
from specforge.training import assembly
from transformers import LlamaConfig, LlamaForCausalLM

print("specforge", version("specforge"), "transformers", transformers.__version__, "torch", torch.__version__)
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
VOCABULARY, DRAFT_VOCABULARY, WIDTH = 1000, 100, 64
shape = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
}
base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, tie_word_embeddings=False, **shape))
tuned = copy.deepcopy(base)
with torch.no_grad():
    for weight in tuned.parameters():
        weight += 0.01 * torch.randn_like(weight)
tuned.save_pretrained("tuned")

os.makedirs("draft")
about = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "draft_vocab_size": DRAFT_VOCABULARY,
    "num_hidden_layers": 1, "hidden_act": "silu", "tie_word_embeddings": False, "pad_token_id": 0,
}
with open("draft/config.json", "w") as file:
    json.dump(shape | about, file)
draft = AutoDraftModel.from_config(AutoDraftModelConfig.from_file("draft/config.json"), torch_dtype=torch.float32)
rows = torch.arange(DRAFT_VOCABULARY)
with torch.no_grad():
    draft.d2t.zero_()
    draft.t2d.zero_()
    draft.t2d[rows] = True  # the lowest ids
    draft.embed_tokens.weight.copy_(base.model.embed_tokens.weight)
draft.save_pretrained("draft")

# Stored features of an answer that is made of the highest ids.
os.makedirs("features")
ids = torch.arange(VOCABULARY - DRAFT_VOCABULARY, VOCABULARY).repeat(1, 2)
states = {"hidden_state": torch.randn(1, ids.shape[1], WIDTH), "aux_hidden_state": torch.randn(1, ids.shape[1], 3 * WIDTH)}
torch.save({"input_ids": ids, "loss_mask": torch.ones_like(ids), **states}, "features/data_0.ckpt")

run = resolve_run(
    Config(
        model={"target_model_path": "tuned", "draft_checkpoint_path": "draft", "torch_dtype": "float32"},
        data={"hidden_states_path": "features", "cache_dir": "cache", "max_length": 256},
        training={"strategy": "eagle3", "attention_backend": "sdpa"},
    )
)
_, loaded = assembly._load_draft(run.config, run.algorithm)
before = (rows + loaded.d2t)[:3].tolist()
embedding = torch.equal(loaded.embed_tokens.weight, tuned.model.embed_tokens.weight)
sizes = {"draft_vocab_size": DRAFT_VOCABULARY, "target_vocab_size": VOCABULARY}
assembly._ensure_offline_vocab_mapping(run.config, SimpleNamespace(draft_model=loaded, **sizes), run.algorithm)
after, kept = (rows + loaded.d2t)[:3].tolist(), torch.equal(loaded.lm_head.weight, draft.lm_head.weight)
print("ids of the head's first rows:", before, "->", after, "; same rows:", kept, "; embedding is the target's:", embedding)
as_seen = before == [0, 1, 2] and after == [900, 901, 902] and kept and embedding
print("as seen on 2026-11-28" if as_seen else "CHANGED since 2026-11-28")
sys.exit(0 if as_seen else 1)
EOF
