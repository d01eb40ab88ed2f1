#!/usr/bin/env bash
# The general draft of the embedded model, from nothing: general prompts, the target's own answers, stage 1.
#
#   bash runs/make_general_draft.sh OUT
#
# Reads public prompt sets from REDRAFT_DATA (default ../shared/data; see docs/dev/log.md for which and under what terms).
# Two cores need about six hours; every step resumes after a kill.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?name an output folder}
data=${REDRAFT_DATA:-../shared/data}
python=${PYTHON:-.venv/bin/python}
redraft="$python -m redraft.cli.main"

mkdir -p "$out"
"$python" runs/general_prompts.py --data "$data" --out "$out/prompts"
# Four of five prompts of the first round are answered greedily, the fifth at temperature 0.8 with a nucleus of 0.95;
# those of the later rounds greedily.
for kind in greedy sampled second third; do
  temperature=0; top_p=1
  [ "$kind" = sampled ] && temperature=0.8 top_p=0.95
  $redraft regenerate --target embedded:smollm2-135m-instruct --prompts "$out/prompts/$kind.jsonl" \
    --out "$out/$kind.jsonl" --temperature "$temperature" --top-p "$top_p" --max-new-tokens 320 --batch-size 128
done
cat "$out/greedy.jsonl" "$out/sampled.jsonl" > "$out/first.jsonl"
$redraft train --from-nothing --target embedded:smollm2-135m-instruct --responses "$out/first.jsonl" \
  --out "$out/stage1" --vocabulary 8192 --epochs 3 --batch-anchors 2048 --learning-rate 0.0015

# The same 40 answers stay held out in the later rounds, each of which goes on from the one before with more text:
#   more_text ROUND DRAFT PASSES ANSWERS...
more_text() {
  local round=$1 draft=$2 passes=$3
  shift 3
  "$python" runs/split_heldout.py --responses "$@" --heldout 40 --out "$out/round$round"
  $redraft train --target embedded:smollm2-135m-instruct --draft "$draft" --method full \
    --responses "$out/round$round/train.jsonl" --heldout-responses "$out/round$round/heldout.jsonl" \
    --out "$out/stage$round" --epochs "$passes" --batch-anchors 2048 --learning-rate 0.0025 \
    --setting evaluate_every=70 --setting patience=100
}
more_text 2 "$out/stage1/draft" 2 "$out/first.jsonl" "$out/second.jsonl"
# Features are those of the same target: what the second round computed is linked, not computed again.
mkdir -p "$out/stage3"
[ -d "$out/stage3/features" ] || cp -rl "$out/stage2/features" "$out/stage3/features"
more_text 3 "$out/stage2/merged" 1 "$out/first.jsonl" "$out/second.jsonl" "$out/third.jsonl"
"$python" runs/split_heldout.py --record "$out/stage3" --out "$out/round3"
echo "draft in $out/stage3/general-draft"
