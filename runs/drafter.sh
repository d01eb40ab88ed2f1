#!/usr/bin/env bash
# A standalone drafter for the embedded model from nothing: text, pretraining, the target's answers, alignment; then
# the same alignment under several losses and seeds, with tables.
#
#   bash runs/drafter.sh OUT
#
# RESPONSES names answers of the target that are there already, such as those of runs/make_general_draft.sh; without it
# the target answers PROMPTS general prompts (1,200) at four temperatures (two hours on two cores). Words behind OUT go
# to runs/drafter_losses.py: --losses kl,tvdpp --seeds 0.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?name an output folder}
data=${REDRAFT_DATA:-../shared/data}
python=${PYTHON:-.venv/bin/python}

mkdir -p "$out"
[ -f "$out/text.jsonl" ] || "$python" runs/plain_text.py --data "$data" --out "$out/text.jsonl"
if [ -n "${RESPONSES:-}" ]; then
  source=(--responses "$RESPONSES")
else
  [ -f "$out/prompts/second.jsonl" ] || "$python" runs/general_prompts.py --data "$data" --out "$out/prompts" --second "$((${PROMPTS:-1200} + 40))"
  source=(--prompts "$out/prompts/second.jsonl")
fi
"$python" -m redraft.cli.main distill --config runs/drafter.yaml --text "$out/text.jsonl" "${source[@]}" --out "$out/run"
REDRAFT_DATA=$data "$python" runs/drafter_losses.py --run "$out/run" --work "$out/losses" --out "$out/drafter-losses.json" "${@:2}"
