"""Python functions to be written: HumanEval (arXiv 2107.03374) and MBPP (arXiv 2108.07732).

The reference of an item is the *name* of the function asked for: generated code is never run here.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from redraft.data.shapes import Conversation
from redraft.data.suites import SuiteDefinition, last_answer
from redraft.data.turns import exchange
from redraft.registries import SUITES

FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)


def code_blocks(text: str) -> list[str]:
    """The fenced blocks of an answer, also one that is not closed; the whole text where nothing is fenced."""
    return [match[2] for match in FENCE.finditer(text)] or [text]


def defined_names(code: str) -> list[str] | None:
    """Functions, classes and variables at the top level of Python code, in order; None when it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doubtful escapes in code that is not ours
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names


def asked_function(conversation: Conversation) -> str | None:
    """The last name that the reference solution defines and the prompt calls or declares: helpers come before it."""
    question = conversation.messages[0]["content"]
    blocks = code_blocks(last_answer(conversation) or "")
    names = [name for block in blocks for name in defined_names(block) or []]
    return next((name for name in names[::-1] if re.search(rf"\b{re.escape(name)}\s*\(", question)), None)


def humaneval_row(row: dict[str, Any], number: int) -> dict[str, Any]:
    """``task_id``, ``prompt`` (imports, signature, docstring) and ``canonical_solution`` (the body)."""
    prompt = row["prompt"].strip()
    task = "Complete the following Python function. Return the whole function in one code block."
    question = f"{task}\n\n```python\n{prompt}\n```"
    answer = f"```python\n{prompt}\n{row['canonical_solution'].strip(chr(10))}\n```"
    return {"id": row["task_id"].lower(), "messages": exchange(question, answer)}


def mbpp_row(row: dict[str, Any], number: int) -> dict[str, Any]:
    """``task_id``, ``text`` (``prompt`` in the sanitised set), ``test_list`` and ``code``."""
    task = (row["text"] if "text" in row else row["prompt"]).strip()
    question = f"You are an expert Python programmer, and here is your task: {task} Your code should pass these tests:"
    question = "\n".join([question, "", *row["test_list"]])
    answer = "```python\n" + row["code"].replace("\r\n", "\n").strip() + "\n```"
    return {"id": f"mbpp/{row['task_id']}", "messages": exchange(question, answer)}


SUITES.register("humaneval")(
    SuiteDefinition(
        about="Python functions to be completed from signature and docstring",
        licence="MIT",
        home="openai/human-eval, data/HumanEval.jsonl.gz",
        file="code/humaneval.test",
        hub="openai/openai_humaneval@test",
        scoring="parses",
        convert=humaneval_row,
        reference=asked_function,
    )
)

SUITES.register("mbpp")(
    SuiteDefinition(
        about="short Python functions from a sentence and three tests, official test split",
        licence="CC BY 4.0",
        home="google-research/google-research, mbpp/mbpp.jsonl (the test split: task ids 11 to 510)",
        file="code/mbpp.test",
        hub="google-research-datasets/mbpp:full@test",
        scoring="parses",
        convert=mbpp_row,
        reference=asked_function,
    )
)
