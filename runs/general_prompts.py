"""Short general prompts, first turns only, from public sets: the prompts of stage 1.

Writes ``greedy.jsonl`` and ``sampled.jsonl`` (every fifth prompt) to the output folder.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

# (set, how many prompts are taken): general chat first, a little code, maths and medicine, as public drafts have.
SETS = (
    ("general/alpaca_9k.train", 4200),
    ("general/dolly_3k.train", 2000),
    ("general/mtbench101.train", 900),
    ("code/gpteacher_code.train", 500),
    ("math/gsm8k.train", 300),
    ("medical/medquad.train", 300),
)
LONGEST = 560  # characters: about 130 tokens, so that prompts cost less than their answers
TAKE = 2700


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--take", type=int, default=TAKE, help="prompts in all")
    options = parser.parse_args()
    order = random.Random(0)
    prompts: list[dict] = []
    for name, count in SETS:
        with gzip.open(options.data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        order.shuffle(rows)
        prompts += [{"id": row["id"], "messages": row["messages"][:1]} for row in rows[:count]]
    order.shuffle(prompts)
    short = [p for p in prompts if len(p["messages"][0]["content"]) <= LONGEST][: options.take]
    options.out.mkdir(parents=True, exist_ok=True)
    for kind, part in (
        ("greedy", [p for i, p in enumerate(short) if i % 5]),
        ("sampled", short[::5]),
    ):
        text = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in part)
        (options.out / f"{kind}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
