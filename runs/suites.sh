#!/usr/bin/env bash
# Every suite with the embedded model and its general draft, as a chain and as a tree: acceptance by task, one page.
#
#   REDRAFT_DATA=folder bash runs/suites.sh OUT
#
# REDRAFT_DATA is described in docs/suites.md. Two cores need about ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?name an output folder}
python=${PYTHON:-.venv/bin/python}
redraft="$python -m redraft.cli.main"
limit=${LIMIT:-4}
tokens=${TOKENS:-64}
suites=()
for name in gsm8k humaneval mbpp pubmedqa medquad mt-bench mtbench101 spec-bench reasoning-gym; do
  suites+=(--suite "$name")
done

mkdir -p "$out"
for shape in chain:5 tree:5x8x40; do
  $redraft bench --target embedded:smollm2-135m-instruct --draft general=src/redraft/assets/general-draft \
    "${suites[@]}" --limit "$limit" --max-new-tokens "$tokens" --shape "$shape" --out "$out/suites-${shape%%:*}.json"
done
$redraft report "$out/suites-chain.json" "$out/suites-tree.json" --out "$out/suites.html"
"$python" - "$out" <<'PY'
import json
import sys

chain, tree = (json.load(open(f"{sys.argv[1]}/suites-{s}.json"))["drafts"]["general"]["by_task"] for s in ("chain", "tree"))
lower = [task for task in chain if tree[task]["tau_pooled"]["value"] < chain[task]["tau_pooled"]["value"]]
for task, found in chain.items():
    print(f"{task:28} chain {found['tau_pooled']['value']:.2f}  tree {tree[task]['tau_pooled']['value']:.2f}")
print("the tree accepts less on: " + ", ".join(lower) if lower else "the tree accepts at least as much on every task")
PY
