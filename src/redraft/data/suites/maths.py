"""Maths word problems: GSM8K (arXiv 2110.14168) and the embedded templates of GSM-Symbolic (arXiv 2410.05229)."""

from __future__ import annotations

import re
from typing import Any

from redraft.data.embedded import maths_conversations
from redraft.data.shapes import Conversation
from redraft.data.suites import SuiteDefinition
from redraft.data.turns import exchange
from redraft.registries import SUITES

POOL, POOL_SEED = 200, 2
CALCULATOR = re.compile(r"<<[^<>]*>>")


def gsm8k_row(row: dict[str, Any], number: int) -> dict[str, Any]:
    """``question`` and ``answer``, whose calculator marks are no part of the text."""
    answer = CALCULATOR.sub("", row["answer"])
    return {"id": f"gsm8k/test/{number - 1}", "messages": exchange(row["question"], answer)}


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
