#!/usr/bin/env bash
# speculators 0.9.0: `--from-pretrained` with a fine-tuned verifier goes on with the first verifier as its teacher.
#
# A draft was trained for a base model; the base is fine-tuned, and training is begun again from that draft with
# `--verifier-name-or-path tuned`. The draft's config still names the base, and the argument is read for checkpoints of
# other formats alone. So embedding, final norm and head, by which hidden states become the logits that are taught, are
# those of the base, while the hidden states come from the fine-tuned model; the saved config names the base again.
# Nothing is said. With a new vocabulary map (`--draft-vocab-size`, or map files) the new ids are put over the old head:
# its rows stay as they were and from then on stand for other tokens, and the head is frozen in training.
#
# Seen on 2026-11-28 (torch 2.13.0, CPU; random weights), by the function that the training command builds its model
# with:
#   verifier in the config: base; embedding, norm and head of the teacher: base's
#   ids of the head's first rows: [0, 1, 2] -> [900, 901, 902]; the rows are the same numbers; the head is not trained
# Exits 0 while that is so, 1 once it is not. (torchvision and torchaudio, which come with the package, are taken out:
# the library does not use them here, and builds for another torch would not open.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 speculators==0.9.0 transformers==5.19.0 numpy==2.4.6
"$work/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio
cd "$work"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import argparse
import copy
import sys
from importlib.metadata import version

import torch
import transformers
from loguru import logger
from speculators.models.eagle3 import Eagle3DraftModel
from speculators.train.cli import build_draft_model
from transformers import LlamaConfig, LlamaForCausalLM

print("speculators", version("speculators"), "transformers", transformers.__version__, "torch", torch.__version__)
transformers.logging.disable_progress_bar()
logger.remove()
torch.manual_seed(0)
VOCABULARY, DRAFT_VOCABULARY = 1000, 100
config = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
    max_position_embeddings=128,
)
base = LlamaForCausalLM(config)
tuned = copy.deepcopy(base)
with torch.no_grad():
    for weight in tuned.parameters():
        weight += 0.01 * torch.randn_like(weight)
base.save_pretrained("base")
tuned.save_pretrained("tuned")


def maps(ids):
    membership = torch.zeros(VOCABULARY, dtype=torch.bool)
    membership[ids] = True
    return membership, ids - torch.arange(DRAFT_VOCABULARY)


lowest, highest = torch.arange(DRAFT_VOCABULARY), torch.arange(VOCABULARY - DRAFT_VOCABULARY, VOCABULARY)
layer = copy.deepcopy(config)
layer.num_hidden_layers = 1
t2d, d2t = maps(lowest)
draft = Eagle3DraftModel.from_training_args(
    layer, t2d=t2d, d2t=d2t, draft_vocab_size=DRAFT_VOCABULARY, verifier_name_or_path="base",
    norm_before_residual=False, ttt_steps=3, target_layer_ids=[2, 4, 5],
)
with torch.no_grad():
    draft.lm_head.weight += 0.001  # so that its rows can be told from the base's
draft.save_pretrained("draft")

arguments = argparse.Namespace(
    from_pretrained="draft", speculator_type="eagle3", verifier_name_or_path="tuned",
    draft_attn_impl="simple_flex_attention", trust_remote_code=False,
)
warm = build_draft_model(arguments, Eagle3DraftModel, *maps(highest), DRAFT_VOCABULARY)


def whose(found, of_base, of_tuned):
    return "base" if torch.equal(found, of_base) else "tuned" if torch.equal(found, of_tuned) else "neither"


teacher = {
    "embedding": whose(warm.embed_tokens.weight, base.model.embed_tokens.weight, tuned.model.embed_tokens.weight),
    "norm": whose(warm.verifier_norm.weight, base.model.norm.weight, tuned.model.norm.weight),
    "head": whose(warm.verifier_lm_head.weight, base.lm_head.weight[highest], tuned.lm_head.weight[highest]),
}
named = warm.config.speculators_config.verifier.name_or_path
print("verifier asked for: tuned; in the config:", named, "; the teacher's parts are of", teacher)
ids, kept = (torch.arange(DRAFT_VOCABULARY) + warm.d2t)[:3].tolist(), torch.equal(warm.lm_head.weight, draft.lm_head.weight)
trained = warm.lm_head.weight.requires_grad
print("ids of the head's first rows: [0, 1, 2] ->", ids, "; same rows:", kept, "; head is trained:", trained)
as_seen = named == "base" and set(teacher.values()) == {"base"} and ids == [900, 901, 902] and kept and not trained
print("as seen on 2026-11-28" if as_seen else "CHANGED since 2026-11-28")
sys.exit(0 if as_seen else 1)
EOF
