#!/usr/bin/env bash
# SpecForge 0.2.0: `norm_output` is another switch than the engines' one of that name, and its default is the opposite.
#
# In vLLM, SGLang and speculators `norm_output: true` in a draft's config means that the next draft step takes the state
# behind the final norm (EAGLE-3.1); logits are always of the state behind it. SpecForge 0.2.0 reads the same key as "is
# there a norm before the head": true, its default, is ordinary EAGLE-3, false trains a draft whose head reads the state
# without a norm, and what is handed on is the state before the norm either way. So a draft that was trained with
# `true`, as its example config for EAGLE-3.1 has it, is served otherwise than it was trained, and one that is served
# with `true` and continued here is trained otherwise than it is served. Its own main branch took over the engines'
# meaning in September 2026; a file does not tell which of the two wrote it.
#
# Seen on 2026-11-28 (torch 2.13.0, transformers 5.8.1, CPU; random weights), with the key absent, true and false:
#   logits of one state: absent and true agree, behind the norm; false is the head on the state itself
#   state handed on:     the same for all three
# Exits 0 while that is so, 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.8.1 numpy==2.4.6
"$work/venv/bin/pip" install --quiet --no-compile --no-deps specforge==0.2.0
cd "$work"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 TORCHDYNAMO_DISABLE=1 venv/bin/python - <<'EOS'
import sys
import warnings
from importlib.metadata import version

import torch
import transformers

warnings.simplefilter("ignore")
from specforge.modeling.auto import AutoDraftModel
from transformers import LlamaConfig

print("specforge", version("specforge"), "transformers", transformers.__version__, "torch", torch.__version__)


@torch.no_grad()
def drafted(**options):
    """Logits of a state, the head on that state with and without the norm, and what a step hands on."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLMEagle3"], vocab_size=100, draft_vocab_size=100, hidden_size=32,
        intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0, tie_word_embeddings=False,
        **options,
    )
    torch.manual_seed(0)
    model = AutoDraftModel.from_config(config)
    model.norm.weight.uniform_(0.5, 2.0)
    state, mask = torch.randn(1, 4, 32), torch.zeros(1, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1) > 0, -1e9)
    handed = model.backbone(
        input_embeds=torch.randn(1, 4, 32), hidden_states=state, cache_hidden=[[], []], attention_mask=mask,
        position_ids=torch.arange(4)[None],
    )
    return model.compute_logits(state), model.lm_head(model.norm(state)), model.lm_head(state), handed


absent, true, false = drafted(), drafted(norm_output=True), drafted(norm_output=False)
print("absent and true agree:", torch.equal(absent[0], true[0]), "- behind the norm:", torch.equal(true[0], true[1]))
print("false is without a norm:", torch.equal(false[0], false[2]))
handed = torch.equal(absent[3], true[3]) and torch.equal(absent[3], false[3])
print("the same is handed on:", handed)
logits = torch.equal(absent[0], true[0]) and torch.equal(true[0], true[1]) and torch.equal(false[0], false[2])
as_seen = logits and handed
print("as seen on 2026-11-28" if as_seen else "CHANGED since 2026-11-28")
sys.exit(0 if as_seen else 1)
EOS
