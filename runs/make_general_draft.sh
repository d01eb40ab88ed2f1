#!/usr/bin/env bash
# The general draft of the embedded model, from nothing: general prompts, the target's own answers, stage 1.
#
#   bash runs/make_general_draft.sh OUT
#
# Reads public prompt sets from REDRAFT_DATA (default ../shared/data; see docs/log.md for which and under what terms).
# Two cores need about four hours; every step resumes after a kill.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?name an output folder}
data=${REDRAFT_DATA:-../shared/data}
python=${PYTHON:-.venv/bin/python}
redraft="$python -m redraft.cli.main"

mkdir -p "$out"
"$python" runs/general_prompts.py --data "$data" --out "$out/prompts"
# Four of five prompts of the first round are answered greedily, the fifth at temperature 0.8 with a nucleus of 0.95;
# those of the second round greedily.
for kind in greedy sampled more; do
  temperature=0; top_p=1
  [ "$kind" = sampled ] && temperature=0.8 top_p=0.95
  $redraft regenerate --target embedded:smollm2-135m-instruct --prompts "$out/prompts/$kind.jsonl" \
    --out "$out/$kind.jsonl" --temperature "$temperature" --top-p "$top_p" --max-new-tokens 320 --batch-size 128
done
cat "$out/greedy.jsonl" "$out/sampled.jsonl" > "$out/first.jsonl"
$redraft train --from-nothing --target embedded:smollm2-135m-instruct --responses "$out/first.jsonl" \
  --out "$out/stage1" --vocabulary 8192 --epochs 3 --batch-anchors 2048 --learning-rate 0.0015
# The same 40 answers stay held out in the second round, which goes on from the first with more text.
"$python" runs/split_heldout.py --responses "$out/first.jsonl" "$out/more.jsonl" --heldout 40 --out "$out"
$redraft train --target embedded:smollm2-135m-instruct --draft "$out/stage1/draft" --method full \
  --responses "$out/train.jsonl" --heldout-responses "$out/heldout.jsonl" --out "$out/stage2" \
  --epochs 2 --batch-anchors 2048 --learning-rate 0.0025 --setting evaluate_every=70 --setting patience=100
"$python" runs/split_heldout.py --record "$out/stage2" --out "$out"
echo "draft in $out/stage2/general-draft"
