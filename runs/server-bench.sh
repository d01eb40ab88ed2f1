#!/usr/bin/env bash
# The embedded target served by vLLM on the CPU: plain, with the stale draft, with the aligned draft, measured over
# HTTP at batch 1 and under load; ends with out/server-bench.json and out/server-bench.html. Servers run one at a time
# (two on the same cores would time each other); redraft starts each one, waits for it and stops it, on any exit.
#
#   PYTHON       interpreter with redraft              VLLM_PYTHON  interpreter with vLLM (`make engines-check` makes it)
#   OUT          output folder                         TOKENS       drafted tokens a round (3)
#   COUNT        prompts (24)                          NEW_TOKENS   longest answer (128)
#   CONCURRENCY  levels (1,4,8)                        THREADS      cores for vLLM (all)
#   TARGET, ADAPTER, STALE, ALIGNED, PROMPTS           what to serve; by default as in runs/embedded.env. Exports in $OUT/vllm
#                                                      are used where they are there; remove it to make them anew
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
VLLM_PYTHON=${VLLM_PYTHON:-.venv-vllm/bin/python}
OUT=${OUT:-out}
TOKENS=${TOKENS:-3}
COUNT=${COUNT:-24}
NEW_TOKENS=${NEW_TOKENS:-128}
CONCURRENCY=${CONCURRENCY:-1,4,8}

# shellcheck source=runs/vllm-server.sh
. runs/vllm-server.sh
prepare_vllm

levels=()
for level in ${CONCURRENCY//,/ }; do levels+=(--concurrency "$level"); done

"$PYTHON" -m redraft.cli.main bench --target "$OUT/vllm/target" --prompts "$PROMPTS" --limit "$COUNT" \
  --max-new-tokens "$NEW_TOKENS" "${levels[@]}" --out "$OUT/server-bench.json" \
  --server "plain=$(vllm_command)" \
  --server "stale=$(vllm_command stale)" \
  --server "aligned=$(vllm_command aligned)" &
bench=$!
# the shell hands a signal on, so that redraft can stop its server
trap 'kill -TERM "$bench" 2>/dev/null; wait "$bench"; exit 143' TERM INT
wait "$bench"
"$PYTHON" -m redraft.cli.main report "$OUT/server-bench.json" --out "$OUT/server-bench.html"
