#!/usr/bin/env bash
# safetensors 0.8.0: save_file leaves files that only their owner can read, and puts a new file in the place of a link.
#
# 0.8.0 writes a file under a temporary name and renames it. The temporary file's own mode, 600, comes with it, whatever
# the umask and whatever the mode of the file that stood there; and a symbolic link at the given path is replaced
# instead of followed, so the file that it points to keeps its old tensors. 0.7.0 wrote through the link and
# kept to umask and mode. Nothing is logged. A server under another account then cannot read what a trainer saved.
# (The mode is known to the maintainers and not mended in this release.)
#
# Seen on 2026-11-27 with umask 022 (no torch needed):
#   0.7.0: new file 644, file that was 664: 664, link kept, its target holds the new tensors
#   0.8.0: new file 600, file that was 664: 600, link gone, its target holds the old tensors
# Exits 0 while that is so, 1 once it is not. POSIX only.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
cat > "$work/save.py" <<'EOF'
import os
import sys
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

os.umask(0o022)
folder = Path(sys.argv[1])
folder.mkdir()
new, shared, link, target = (folder / name for name in ("new", "shared", "link", "target"))
save_file({"x": np.ones(2)}, new)
shared.write_bytes(b"")
shared.chmod(0o664)
save_file({"x": np.ones(2)}, shared)
save_file({"x": np.zeros(2)}, target)
link.symlink_to(target)
save_file({"x": np.ones(2)}, link)
found = (
    f"{new.stat().st_mode & 0o777:o}",
    f"{shared.stat().st_mode & 0o777:o}",
    link.is_symlink(),
    load_file(target)["x"].tolist() == [1.0, 1.0],
)
version = safetensors.__version__
print(f"safetensors {version}: new {found[0]}, was 664 {found[1]}, link kept {found[2]}, target written {found[3]}")
wanted = {"0.7.0": ("644", "664", True, True), "0.8.0": ("600", "600", False, False)}[version]
sys.exit(0 if found == wanted else 1)
EOF
status=0
for version in 0.7.0 0.8.0; do
    "$work/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 "safetensors==$version"
    "$work/venv/bin/python" "$work/save.py" "$work/$version" || status=1
done
if [ "$status" = 0 ]; then echo "as seen on 2026-11-27"; else echo "CHANGED since 2026-11-27"; fi
exit "$status"
