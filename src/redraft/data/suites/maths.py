"""Maths word problems: GSM8K (arXiv 2110.14168) and the embedded templates of GSM-Symbolic (arXiv 2410.05229)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from typing import Any

from redraft.data.shapes import Conversation
from redraft.data.suites import SuiteDefinition
from redraft.data.turns import exchange
from redraft.errors import UserError
from redraft.registries import SUITES

POOL, POOL_SEED = 200, 2
# reasoning-gym draws problem i of a data set with seed + i, so data sets of neighbouring seeds share most draws;
# a stride this wide keeps ours apart.
SEED_STRIDE = 1_000_003
CALCULATOR = re.compile(r"<<[^<>]*>>")


def gsm8k_row(row: dict[str, Any], number: int) -> dict[str, Any]:
    """``question`` and ``answer``, whose calculator marks are no part of the text."""
    answer = CALCULATOR.sub("", row["answer"])
    return {"id": f"gsm8k/test/{number - 1}", "messages": exchange(row["question"], answer)}


def maths_conversations(count: int, seed: int, exclude: Collection[str] = ()) -> list[Conversation]:
    """``count`` generated problems, each a question and its worked solution. Nothing is fetched.

    ``gsm_symbolic`` of reasoning-gym fills the templates of GSM-Symbolic with names and numbers. No question comes
    twice, and none that is in ``exclude`` comes at all: give the questions of the set to be measured on when making
    the one to train on. The same arguments give the same problems, and a larger ``count`` begins with those of a
    smaller one. Raises ``UserError`` when reasoning-gym is not installed.
    """
    try:
        # A dependency's own source warns at its first import.
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            import reasoning_gym
    except ImportError as error:
        raise UserError(
            "the embedded maths problems need the package reasoning-gym: pip install redraft[quickstart]"
        ) from error
    if not 0 < count < SEED_STRIDE // 4:
        raise UserError(f"the number of maths problems must lie between 1 and {SEED_STRIDE // 4 - 1}, not {count}")
    problems = reasoning_gym.create_dataset("gsm_symbolic", size=4 * count + 1000, seed=seed * SEED_STRIDE)
    seen = set(exclude)
    found: list[Conversation] = []
    for index, item in enumerate(problems):
        question, solution = item["question"], str(item["metadata"]["answer_cot"])
        if question in seen:
            continue
        seen.add(question)
        found.append(Conversation(f"gsm_symbolic/{seed}/{index}", exchange(question, solution)))
        if len(found) == count:
            return found
    raise UserError(f"the maths templates gave {len(found)} different problems, not {count}; ask for fewer")


def embedded_problems() -> list[Conversation]:
    """A fixed pool of generated problems; the same seed as the evaluation prompts of the quickstart."""
    return maths_conversations(POOL, POOL_SEED)


SUITES.register("gsm8k")(
    SuiteDefinition(
        about="grade-school maths word problems, official test split",
        licence="MIT",
        home="openai/grade-school-math, grade_school_math/data/test.jsonl",
        file="math/gsm8k.test",
        hub="openai/gsm8k:main@test",
        scoring="final number",
        convert=gsm8k_row,
    )
)

SUITES.register("reasoning-gym")(
    SuiteDefinition(
        about=f"{POOL} generated maths word problems; needs no data",
        licence="Apache-2.0",
        home="the package reasoning-gym, generator gsm_symbolic",
        scoring="final number",
        make=embedded_problems,
    )
)
