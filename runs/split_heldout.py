"""Stage 1 in rounds: the held-out answers of the first round stay held out, and the result says what they show.

python runs/split_heldout.py --responses first.jsonl second.jsonl --heldout 40 --out OUT/round2
python runs/split_heldout.py --record OUT/stage2 --out OUT/round2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from redraft.adaptation.core import draft_meta, feature_store
from redraft.adaptation.models import open_draft, open_target
from redraft.adaptation.quickstart import EMBEDDED
from redraft.adaptation.runs import half, supervised_rows
from redraft.adaptation.training import NEW, heldout_record, split_rows
from redraft.artifact import atomic_write_bytes
from redraft.data.store import encode_row, read_rows
from redraft.drafts.files import save_draft
from redraft.rows import anchors
from redraft.starts.vocabulary import coverage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=Path, nargs="*", default=[])
    parser.add_argument("--heldout", type=int, default=40)
    parser.add_argument("--record", type=Path, help="folder of the round that is to be recorded")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.record:
        record(options.record, options.out)
        return
    parts = [list(read_rows(path)) for path in options.responses]
    train, heldout = split_rows(parts[0], options.heldout)
    asked = {tuple(row.prompt_ids) for row in heldout}
    train += [row for part in parts[1:] for row in part if tuple(row.prompt_ids) not in asked]
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("heldout", heldout)):
        atomic_write_bytes(options.out / f"{name}.jsonl", b"".join(map(encode_row, rows)))


def record(folder: Path, out: Path) -> None:
    """Save the trained draft with the held-out acceptance that later probes take as their reference."""
    target = open_target(EMBEDDED, "bfloat16", "cpu")
    draft = open_draft(folder / "merged", target).draft
    target.tap(draft.config.taps)
    store = feature_store(folder / "features", target, target.taps)
    train, heldout = (supervised_rows(out / f"{name}.jsonl") for name in ("train", "heldout"))
    extra = {"coverage": coverage(draft, train).share, "rows": len(train), "response_tokens": sum(map(anchors, train))}
    found = heldout_record(draft, target, heldout, store, 5, **extra)
    save_draft(folder / "general-draft", half(draft), draft_meta(target, NEW, 0, heldout=found))
    print(found)


if __name__ == "__main__":
    main()
