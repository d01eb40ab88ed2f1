#!/usr/bin/env bash
# Our load against that of a public load generator, guidellm: the same vLLM server, the same prompts, at concurrency 1
# and 4; prints both and ends with out/guidellm-check.json. guidellm goes into an environment of its own.
#
#   PYTHON, VLLM_PYTHON, OUT, TOKENS, COUNT, NEW_TOKENS, THREADS, TARGET, ...   as for runs/server-bench.sh
#   GUIDELLM_VENV  guidellm's environment (.venv-guidellm)      CONCURRENCY  levels (1,4)
#   DRAFT          aligned, stale, or empty for plain decoding (aligned)
#   URL            a server that runs already, instead of starting one; it must serve $OUT/vllm/target as "target"
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
VLLM_PYTHON=${VLLM_PYTHON:-.venv-vllm/bin/python}
GUIDELLM_VENV=${GUIDELLM_VENV:-.venv-guidellm}
OUT=${OUT:-out}
TOKENS=${TOKENS:-3}
COUNT=${COUNT:-24}
NEW_TOKENS=${NEW_TOKENS:-128}
CONCURRENCY=${CONCURRENCY:-1,4}
DRAFT=${DRAFT-aligned}

if [ ! -x "$GUIDELLM_VENV/bin/guidellm" ]; then
  echo "setting up $GUIDELLM_VENV"
  "$PYTHON" -m venv "$GUIDELLM_VENV"
  # the constraint keeps a CUDA torch out; guidellm needs torch to read data only
  # shellcheck disable=SC2086
  "$GUIDELLM_VENV/bin/pip" install --quiet --no-compile --prefer-binary -c constraints-cpu.txt ${PIP_ARGS:-} \
    'guidellm==0.8.1'
fi

# shellcheck source=runs/vllm-server.sh
. runs/vllm-server.sh
prepare_vllm

# exec: a signal reaches the program itself, which stops the server it started
exec "$PYTHON" runs/guidellm_check.py --guidellm "$GUIDELLM_VENV/bin/guidellm" --target "$OUT/vllm/target" \
  --prompts "$PROMPTS" --count "$COUNT" --max-new-tokens "$NEW_TOKENS" --concurrency "$CONCURRENCY" \
  --name "${DRAFT:-plain}" --server "${URL:-$(vllm_command ${DRAFT:+"$DRAFT"})}" --out "$OUT/guidellm-check.json"
