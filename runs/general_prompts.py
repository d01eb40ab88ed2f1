"""Short general prompts, first turns only, from public sets: the prompts of stage 1, in three rounds.

Writes ``greedy.jsonl`` and ``sampled.jsonl`` (every fifth prompt), the first round, and ``second.jsonl`` and
``third.jsonl``, which the later rounds add, to the output folder. No prompt is in two files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Sequence
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
# The later rounds draw on all of the chat sets and on more of the others.
MORE_SETS = (
    ("general/alpaca_9k.train", None),
    ("general/dolly_3k.train", None),
    ("general/mtbench101.train", None),
    ("code/gpteacher_code.train", 1500),
    ("code/codealpaca_2k.train", 400),
    ("code/mbpp.train", 200),
    ("math/gsm8k.train", 900),
    ("medical/medquad.train", 700),
    ("medical/chatdoctor5k.train", 300),
)
LONGEST = 560  # characters: about 130 tokens, so that prompts cost less than their answers
TAKE = 2700
SECOND, THIRD = 3350, 4100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--take", type=int, default=TAKE, help="prompts of the first round")
    parser.add_argument("--second", type=int, default=SECOND, help="prompts that the second round adds")
    parser.add_argument("--third", type=int, default=THIRD, help="prompts that the third round adds")
    options = parser.parse_args()
    first = shuffled(options.data, SETS, random.Random(0))[: options.take]
    asked = {text(prompt) for prompt in first}
    more = [p for p in shuffled(options.data, MORE_SETS, random.Random(1)) if text(p) not in asked]
    options.out.mkdir(parents=True, exist_ok=True)
    for kind, part in (
        ("greedy", [p for i, p in enumerate(first) if i % 5]),
        ("sampled", first[::5]),
        ("second", more[: options.second]),
        ("third", more[options.second : options.second + options.third]),
    ):
        lines = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in part)
        (options.out / f"{kind}.jsonl").write_text(lines, encoding="utf-8")


def text(prompt: dict) -> str:
    return prompt["messages"][0]["content"].strip().lower()


def shuffled(data: Path, sets: Sequence[tuple[str, int | None]], order: random.Random) -> list[dict]:
    """The short ones among so many prompts of each set, no text twice, in a random order."""
    found: dict[str, dict] = {}
    for name, count in sets:
        with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        order.shuffle(rows)
        for row in rows[:count]:
            prompt = {"id": row["id"], "messages": row["messages"][:1]}
            if len(prompt["messages"][0]["content"]) <= LONGEST:
                found.setdefault(text(prompt), prompt)
    prompts = list(found.values())
    order.shuffle(prompts)
    return prompts


if __name__ == "__main__":
    main()
