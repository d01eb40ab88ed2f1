#!/usr/bin/env bash
# transformers 5.24.0: a folder without a vocabulary opens as a tokenizer that reads any text as nothing.
#
# A model folder into which tokenizer_config.json was copied, but neither tokenizer.json nor tokenizer.model, is opened
# by AutoTokenizer without an error: for the named classes an empty vocabulary with only special tokens is made up.
# Text then becomes no ids at all (LlamaTokenizer, Qwen2Tokenizer) or an unknown token. Other classes of the same
# release refuse the same folder with a ValueError.
#
# Seen on 2026-11-27 (no torch needed), ids of "the weather is fine":
#   LlamaTokenizer           3 tokens, ids []
#   Qwen2Tokenizer           1 token,  ids []
#   GemmaTokenizer           5 tokens, ids [3]
#   PreTrainedTokenizerFast  ValueError
# Exits 0 while that is so, 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import json
import sys
import warnings
from pathlib import Path

import transformers
from transformers import AutoTokenizer

print("transformers", transformers.__version__)
TEXT = "the weather is fine"


def read(name):
    """Ids of the text by the tokenizer of a folder that has a config and no vocabulary; None where it is refused."""
    folder = Path(name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except ValueError as error:
            print(f"{name}: ValueError: {str(error).splitlines()[0]}")
            return None
    ids = tokenizer(TEXT).input_ids
    print(f"{name}: {len(tokenizer)} tokens, ids {ids}, warnings {[str(w.message) for w in caught]}")
    return ids if not caught else "warned"


found = {name: read(name) for name in ("LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast")}
as_seen = list(found.values()) == [[], [], [3], None]
print("as seen on 2026-11-27" if as_seen else "CHANGED since 2026-11-27")
sys.exit(0 if as_seen else 1)
EOF
