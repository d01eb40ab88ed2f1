"""The embedded domain: maths word problems with worked solutions, generated on the spot.

``gsm_symbolic`` of the package reasoning-gym fills the templates of GSM-Symbolic (arXiv 2410.05229) with names and
numbers. Nothing is fetched.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection

from redraft.data.shapes import Conversation
from redraft.data.turns import exchange
from redraft.errors import UserError

# reasoning-gym draws problem i of a data set with seed + i, so data sets of neighbouring seeds share most draws;
# a stride this wide keeps ours apart.
SEED_STRIDE = 1_000_003


def maths_conversations(count: int, seed: int, exclude: Collection[str] = ()) -> list[Conversation]:
    """``count`` problems, each a user turn with the question and an assistant turn with its worked solution.

    No question comes twice, and none that is in ``exclude`` comes at all: give the questions of the set to be
    measured on when making the one to train on. The same arguments give the same problems, and a larger ``count``
    begins with those of a smaller one. Raises ``UserError`` when reasoning-gym is not installed.
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
    for index in range(len(problems)):
        item = problems[index]
        question, solution = item["question"], str(item["metadata"]["answer_cot"])
        if question in seen:
            continue
        seen.add(question)
        found.append(Conversation(f"gsm_symbolic/{seed}/{index}", exchange(question, solution)))
        if len(found) == count:
            return found
    raise UserError(f"the maths templates gave {len(found)} different problems, not {count}; ask for fewer")
