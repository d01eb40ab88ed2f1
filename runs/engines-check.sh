#!/usr/bin/env bash
# Exports of one target's drafts in real engines, beside our own chain on the same prompts; ends with
# out/engines-check.json. `make engines-check` sets the environments up and calls this. What was measured stays in
# $OUT/engines-check, so that a stopped check goes on where it was.
#
#   PYTHON           interpreter with redraft
#   VLLM_PYTHON      interpreter with vLLM         LLAMACPP_PYTHON   interpreter with xllamacpp
#   OUT              output folder                 TOKENS            drafted tokens a round (3)
#   COUNT            prompts (50)                  NEW_TOKENS        longest answer (48)
#   DTYPE            float32, or bfloat16          ENGINES           transformers,vllm,llamacpp
#   TARGET, BASE     the target, and the draft that a private part belongs to
#   DRAFTS           "NAME=FOLDER ..."; by default the draft that the quickstart aligned, an EAGLE-1 draft
#                    trained here on the target's own answers (a few minutes, once), and layers of the target
#   SPEEDS=1         serve plain decoding too and measure speeds: on a quiet machine alone
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-out}
COUNT=${COUNT:-50}
NEW_TOKENS=${NEW_TOKENS:-48}
TARGET=${TARGET:-src/redraft/assets/maths-lora}
BASE=${BASE:-src/redraft/assets/general-draft}
WORK=$OUT/engines-check
redraft() { "$PYTHON" -m redraft.cli.main "$@"; }

mkdir -p "$WORK"
[ -f "$WORK/evaluation.jsonl" ] || "$PYTHON" -c 'import sys; from pathlib import Path
from redraft.adaptation.quickstart import embedded_prompts
embedded_prompts(Path(sys.argv[1]), 240, int(sys.argv[2]))' "$WORK" "$COUNT"

# A draft of each of the other two families. How good they are is not asked, but one whose every token is rejected would
# show nothing.
if [ -z "${DRAFTS:-}" ]; then
  redraft regenerate --target "$TARGET" --prompts "$WORK/prompts.jsonl" --max-new-tokens 128 --out "$WORK/answers.jsonl"
  redraft train --target "$TARGET" --responses "$WORK/answers.jsonl" --from-nothing --family eagle1 --epochs 4 \
    --heldout 12 --gamma 3 --out "$WORK/eagle1-run"
  # The target's own layers but for a few: slow, and a language model that says the same often enough.
  [ -d "$WORK/layers" ] || "$PYTHON" -c 'import sys
from redraft.adaptation.models import open_target
from redraft.drafts.files import save_draft
from redraft.drafts.standalone.shapes import fresh_standalone
target = open_target(sys.argv[1], "float32", "cpu")
kept = [layer for layer in range(target.layers) if not 4 < target.layers - layer < 9]
save_draft(sys.argv[2], fresh_standalone(target, layers=kept), {})' "$TARGET" "$WORK/layers"
  DRAFTS="src/redraft/assets/maths-private $WORK/eagle1-run/draft $WORK/layers"
fi

drafts=()
for draft in $DRAFTS; do drafts+=(--draft "$draft"); done
exec "$PYTHON" runs/engines_check.py --target "$TARGET" ${BASE:+--base-draft "$BASE"} "${drafts[@]}" \
  --prompts "$WORK/evaluation.jsonl" --count "$COUNT" --gamma "${TOKENS:-3}" --max-new-tokens "$NEW_TOKENS" \
  --dtype "${DTYPE:-float32}" --engines "${ENGINES:-transformers,vllm,llamacpp}" ${THREADS:+--threads "$THREADS"} \
  --vllm-python "${VLLM_PYTHON:-.venv-vllm/bin/python}" \
  --llamacpp-python "${LLAMACPP_PYTHON:-.venv-llamacpp/bin/python}" ${SPEEDS:+--speeds} --work "$WORK" \
  --out "$OUT/engines-check.json" "$@"
