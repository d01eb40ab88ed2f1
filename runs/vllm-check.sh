#!/usr/bin/env bash
# The exported drafts served by vLLM on the CPU, beside our own engine on the same prompts; ends with
# out/vllm-check.json. `make vllm-check` sets both environments up and calls this.
#
#   PYTHON       interpreter with redraft             VLLM_PYTHON  interpreter with vLLM
#   OUT          output folder                        TOKENS       drafted tokens a round (3)
#   TARGET, ADAPTER, STALE, ALIGNED, PROMPTS          what to serve; by default the embedded maths target, the
#                                                     general draft, and the draft that the quickstart aligned
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
VLLM_PYTHON=${VLLM_PYTHON:-.venv-vllm/bin/python}
OUT=${OUT:-out}
TOKENS=${TOKENS:-3}
COUNT=${COUNT:-24}
NEW_TOKENS=${NEW_TOKENS:-128}

# shellcheck source=runs/embedded.env
[ ! -f runs/embedded.env ] || . runs/embedded.env
for name in TARGET STALE ALIGNED PROMPTS; do
  [ -n "${!name:-}" ] || { echo "set $name (see the head of $0)" >&2; exit 2; }
done

"$PYTHON" runs/vllm_prepare.py --target "$TARGET" ${ADAPTER:+--adapter "$ADAPTER"} --stale "$STALE" \
  --aligned "$ALIGNED" --prompts "$PROMPTS" --count "$COUNT" --out "$OUT/vllm" \
  --speculative-tokens "$TOKENS" --max-new-tokens "$NEW_TOKENS"

"$PYTHON" runs/vllm_check.py --target "$OUT/vllm/target" --stale "$OUT/vllm/stale" --aligned "$OUT/vllm/aligned" \
  --prompts "$OUT/vllm/prompts.jsonl" --ours "$OUT/vllm/ours.json" --out "$OUT/vllm-check.json" \
  --speculative-tokens "$TOKENS" --max-new-tokens "$NEW_TOKENS" --vllm-python "$VLLM_PYTHON"
