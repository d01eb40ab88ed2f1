"""Plain text to pretrain a drafter on, from public sets of questions and answers: JSON lines with a field ``text``.

    python runs/plain_text.py --data REDRAFT_DATA --out out/drafter-text.jsonl

Question and answer follow each other as they would in a document, without any chat template. Test sets are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from redraft.artifact import atomic_write_text
from redraft.data.prompts import read_conversations

SETS = (
    "general/alpaca_9k.train",
    "general/dolly_3k.train",
    "general/mtbench101.train",
    "general/oasst_100.train",
    "code/gpteacher_code.train",
    "code/codealpaca_2k.train",
    "math/gsm8k.train",
    "medical/medquad.train",
    "medical/chatdoctor5k.train",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = []
    for name in SETS:
        for conversation in read_conversations(options.data / f"{name}.jsonl.gz"):
            text = "\n\n".join(message["content"].strip() for message in conversation.messages)
            lines.append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    atomic_write_text(options.out, "".join(lines))
    print(f"{len(lines):,} documents, {sum(map(len, lines)) / 1e6:.1f} million characters")


if __name__ == "__main__":
    main()
