#!/usr/bin/env bash
# nemo-automodel 0.7.0: a warm start refuses another vocabulary map, and takes the embedding of the old target.
#
# `recipe_args.draft_weights_path` loads a trained draft into a run on another, fine-tuned target. If the run counted
# another map than the draft was trained with, it stops and says so: a head must not get other ids than its own. If the
# map is the same, all tensors of the draft are loaded, its embedding among them, over the one that was just copied from
# the fine-tuned target; and embeddings are frozen unless the recipe says otherwise. Engines that take the embedding from
# the target (SGLang does) then serve another draft than was trained.
#
# Seen on 2026-11-28 (torch 2.13.0, CPU; random weights), by the functions that the recipe calls in this order:
#   another map:  ValueError "... was trained with a different draft-vocab mapping ..."
#   the same map: embedding before loading the target's, behind it the old target's
# Exits 0 while that is so, 1 once it is not. (The package is installed without its requirements, which name a GPU build;
# those that are imported here follow.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.18.0 numpy==2.4.6 datasets==5.2.0 \
    torchao==0.18.0 torchdata==0.11.0 peft==0.21.2 pillow==13.0.0 pyyaml omegaconf scipy
"$work/venv/bin/pip" install --quiet --no-compile --no-deps nemo-automodel==0.7.0
cd "$work"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 venv/bin/python -W ignore - 2> stderr.txt <<'EOF' || { tail -3 stderr.txt; exit 1; }
import copy
import sys
from importlib.metadata import version

import torch
import transformers
from nemo_automodel.components.speculative.eagle.registry import resolve_eagle3_draft_spec
from nemo_automodel.recipes.llm.train_eagle3 import _load_draft_weights
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

print("nemo-automodel", version("nemo-automodel"), "transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
VOCABULARY, DRAFT_VOCABULARY, WIDTH = 1000, 100, 64
config = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=128,
)
base = LlamaForCausalLM(config)
tuned = copy.deepcopy(base)
with torch.no_grad():
    for weight in tuned.parameters():
        weight += 0.01 * torch.randn_like(weight)


def draft_for(target, ids):
    """A new draft as the recipe makes it."""
    own = {
        "architectures": ["LlamaEagle3DraftModel"], "draft_vocab_size": DRAFT_VOCABULARY, "target_hidden_size": WIDTH,
        "tie_word_embeddings": False, "attn_implementation": "eager", "fc_norm": False, "norm_output": False,
        "parallel_drafting": False,
    }
    made = resolve_eagle3_draft_spec(["LlamaForCausalLM"]).draft_cls(LlamaConfig.from_dict(config.to_dict() | own))
    made = made.float()
    made.copy_embeddings_from_target(target.get_input_embeddings())
    made.set_vocab_mapping(ids)
    return made


lowest, highest = torch.arange(DRAFT_VOCABULARY), torch.arange(VOCABULARY - DRAFT_VOCABULARY, VOCABULARY)
old = draft_for(base, lowest)
save_file({name: x.contiguous() for name, x in old.state_dict().items()}, "model.safetensors", {"format": "pt"})

NAME, message = "model.embed_tokens.weight", ""
try:
    _load_draft_weights(draft_for(tuned, highest), "model.safetensors")
except ValueError as error:
    message = str(error)
print("another map:", message[:120] or "taken")
warm = draft_for(tuned, lowest)
before = torch.equal(warm.state_dict()[NAME], tuned.model.embed_tokens.weight)
_load_draft_weights(warm, "model.safetensors")
after = torch.equal(warm.state_dict()[NAME], base.model.embed_tokens.weight)
print("the same map: embedding before loading is the target's:", before, "; behind it the old target's:", after)
as_seen = "different draft-vocab mapping" in message and before and after
print("as seen on 2026-11-28" if as_seen else "CHANGED since 2026-11-28")
sys.exit(0 if as_seen else 1)
EOF
