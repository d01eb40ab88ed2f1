"""The embedded domain: maths word problems with worked solutions from the package ``reasoning-gym``."""

from __future__ import annotations

from collections.abc import Collection

from redraft.data.prompts import Conversation
from redraft.errors import UserError


def maths_conversations(count: int, seed: int, exclude: Collection[str] = ()) -> list[Conversation]:
    """``count`` different ``gsm_symbolic`` problems: the question, and its worked solution as the reference answer.

    Questions in ``exclude`` are left out, so that sets for training and for measuring stay apart whatever their
    seeds. Raises ``UserError`` when the package is missing or runs out of different questions.
    """
    try:
        from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import GSMSymbolicDataset, GSMSymbolicDatasetConfig
    except ImportError:
        raise UserError("the maths problems need reasoning-gym: pip install 'redraft[quickstart]'") from None
    seen, found = set(exclude), []
    problems = GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=seed, size=4 * count + 64))
    for index in range(len(problems)):
        problem = problems[index]
        question = problem["question"]
        if question in seen:
            continue
        seen.add(question)
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": problem["metadata"]["answer_cot"]},
        ]
        found.append(Conversation(f"gsm_symbolic/{seed}/{index}", turns))
        if len(found) == count:
            return found
    raise UserError(f"only {len(found)} different maths problems for seed {seed}; ask for fewer than {count}")
