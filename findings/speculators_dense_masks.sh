#!/usr/bin/env bash
# speculators 0.7.0 and 0.8.1: trained with `--draft-attn-impl eager`, later draft steps see what is yet to come.
#
# In training an EAGLE-3 draft is unrolled over its own states: step j of a position sees the first step's keys up to
# it and its own keys of the steps since. For eager attention the mask is a matrix of numbers that are added to the
# scores, 0 where a key may be seen and minus infinity where not. These releases put the columns of a further step
# there as ones on the diagonal and zeros elsewhere, as if it were a mask of true and false: so nothing is hidden of the
# further steps, and every position sees the keys of all positions, those behind it included. Drafting has no such keys.
# The default, flex attention, is right in all releases; 0.9.0 has minus infinity.
#
# Seen on 2026-11-28 (torch 2.13.0, CPU): columns of a second step for three positions, 0 is seen and -inf is not
#   0.7.0, 0.8.1: [1, 0, 0], [0, 1, 0], [0, 0, 1]
#   0.9.0:        [0, -inf, -inf], [-inf, 0, -inf], [-inf, -inf, 0]
# Exits 0 while that is so, 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.10.2 numpy==2.4.6
cat > "$work/probe.py" <<'EOS'
import importlib.util
import sys
from pathlib import Path

import torch

# The package's module by itself: importing the whole package asks for much that is not needed here.
folder = Path(sys.argv[1]) / "speculators" / "models"
names = {"speculators.models.attention": "attention.py", "speculators.models.eagle3.attention": "eagle3/attention.py"}
for name, file in names.items():
    spec = importlib.util.spec_from_file_location(name, folder / file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
first = sys.modules["speculators.models.attention"].create_float_mask(
    module.create_combined_mask_mod(torch.zeros(3, dtype=torch.long), 3), Q_LEN=3, KV_LEN=3, device="cpu"
)
columns = module.extend_dense_mask_for_draft_tokens(first, 3)[0, 0, :, 3:]
print(sys.argv[2], columns.tolist())
hidden = columns[~torch.eye(3, dtype=torch.bool)]
wanted = {"0.7.0": 0.0, "0.8.1": 0.0, "0.9.0": float("-inf")}[sys.argv[2]]
sys.exit(0 if bool((hidden == wanted).all()) else 9)
EOS
cd "$work"
for release in 0.7.0 0.8.1 0.9.0; do
    venv/bin/pip install --quiet --no-compile --no-deps --target "$release" "speculators==$release"
    CUDA_VISIBLE_DEVICES="" venv/bin/python probe.py "$release" "$release" || status=$?
    if [ "${status:-0}" = 9 ]; then echo "CHANGED since 2026-11-28"; fi
    if [ "${status:-0}" != 0 ]; then exit 1; fi
done
echo "as seen on 2026-11-28"
