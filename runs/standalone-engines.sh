#!/usr/bin/env bash
# A standalone drafter in redraft, transformers, vLLM and llama.cpp on the same prompts; ends with
# out/standalone-engines.json. vLLM and llama.cpp get environments of their own, made at the first call.
#
#   DRAFT   the drafter's folder (of `redraft distill`, or any causal LM with the target's tokenizer)
#   TARGET, PROMPTS, COUNT, GAMMA, NEW_TOKENS, DTYPE, OUT   what to serve and how; see runs/standalone_engines.py
set -euo pipefail
cd "$(dirname "$0")/.."

[ -n "${DRAFT:-}" ] || { echo "set DRAFT (see the head of $0)" >&2; exit 2; }
PYTHON=${PYTHON:-.venv/bin/python}
VLLM_PYTHON=${VLLM_PYTHON:-.venv-vllm/bin/python}
LLAMACPP_PYTHON=${LLAMACPP_PYTHON:-.venv-llamacpp/bin/python}

[ -x "$VLLM_PYTHON" ] || make .venv-vllm/.made
if [ ! -x "$LLAMACPP_PYTHON" ]; then
  python3 -m venv .venv-llamacpp
  .venv-llamacpp/bin/pip install --quiet 'xllamacpp==2026.10.11549'
fi

"$PYTHON" runs/standalone_engines.py --draft "$DRAFT" --target "${TARGET:-embedded:smollm2-135m-instruct}" \
  ${PROMPTS:+--prompts "$PROMPTS"} --count "${COUNT:-24}" --gamma "${GAMMA:-3}" \
  --max-new-tokens "${NEW_TOKENS:-128}" --dtype "${DTYPE:-bfloat16}" --out "${OUT:-out}/standalone-engines.json" \
  --vllm-python "$VLLM_PYTHON" --llamacpp-python "$LLAMACPP_PYTHON" "$@"
