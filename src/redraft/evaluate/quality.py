"""The quality guard: what plain and speculative outputs score on the task, side by side.

Speculative decoding promises that the answers are the target's own; equal scores are what a reader can check. Rules
look at the final answer only. Code is parsed and never run: that rule is called ``parses``, and says nothing of
whether the code is right. A response that the token limit cut off counts as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from redraft.data.suites import suite_of
from redraft.data.suites.code import code_blocks, defined_names
from redraft.evaluate.figures import PLAIN
from redraft.evaluate.speed import Prompt
from redraft.evaluate.statistics import mean, paired_difference
from redraft.registries import SUITES, Registry

# (output, reference) -> whether the output is right
RULES: Registry[Callable[[str, str], bool]] = Registry("scoring rule")

MARK = "####"
# A minus is a sign where no number or word stands before it: 3-4 are two positive numbers.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]])[-−])?[$€£]?(?P<inner>(?<=[$€£])[-−])?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
)
DECISIONS = r"(yes|no|maybe)"
STATED = re.compile(rf"\b(?:answer|decision|conclusion)\W{{0,6}}(?:(?:is|would be)\W{{1,6}})?{DECISIONS}\b", re.I)
ALONE = re.compile(rf"^\W*{DECISIONS}\W*$", re.I)
LEADING = re.compile(rf"^\W*{DECISIONS}(?:\W*$|[*_\"')]*[.,;:!\n])", re.I)


def kind_of(task: str) -> str:
    """The scoring rule of a task (``gsm8k``, ``spec-bench:qa``); empty where it has none."""
    suite = suite_of(task)
    return SUITES.get(suite).scoring if suite in SUITES else ""


def score(kind: str, output: str, reference: str | None) -> bool | None:
    """Whether ``output`` is right by the rule called ``kind``; None where there is no rule or no reference.

    Raises ``UserError`` for an unknown rule.
    """
    return RULES.get(kind)(output, reference) if kind and reference is not None else None


def quality_table(prompts: Sequence[Prompt], outputs: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """{contestant: {task: {"rule", "scored", "correct", "score"}}} over the prompts that can be scored.

    ``outputs`` holds the decoded responses of each contestant in the order of ``prompts``. ``score`` is the share of
    right answers with its bootstrap interval. Contestants other than ``plain`` also get ``difference``, the paired
    difference of their score from plain decoding's, and ``changed``, on how many prompts the two verdicts differ.
    Empty where nothing can be scored.
    """
    tasks: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        if kind_of(prompt.task) and prompt.reference is not None:
            tasks.setdefault(prompt.task, []).append(index)
    verdicts = {
        name: {t: [bool(score(kind_of(t), texts[i], prompts[i].reference)) for i in tasks[t]] for t in tasks}
        for name, texts in outputs.items()
    }
    table: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in outputs if tasks}
    for name, by_task in table.items():
        for task, right in verdicts[name].items():
            by_task[task] = {"rule": kind_of(task), "scored": len(right), "correct": sum(right)}
            by_task[task]["score"] = mean(right).to_dict()
            if name != PLAIN:
                plain, ones = verdicts.get(PLAIN, verdicts[name])[task], [1] * len(right)
                by_task[task]["difference"] = paired_difference((right, ones), (plain, ones)).to_dict()
                by_task[task]["changed"] = sum(a != b for a, b in zip(right, plain, strict=True))
    return table


# -- rules -----------------------------------------------------------------------------------------------------------
def final_number(text: str) -> Decimal | None:
    """The number behind the last ``####``, or else the last number of the text; None where there is none.

    Thousands separators and currency signs are no part of it: ``$1,234.50`` is 1234.5.
    """
    _, mark, behind = text.rpartition(MARK)
    stated = NUMBER.search(behind.split("\n", 1)[0]) if mark else None
    found = stated or next(iter(reversed(list(NUMBER.finditer(text)))), None)
    if found is None:
        return None
    value = Decimal(found["digits"].replace(",", ""))
    return -value if found["sign"] or found["inner"] else value


@RULES.register("final number")
def same_final_number(output: str, reference: str) -> bool:
    """Equal final numbers; 18, 18.0 and $18.00 are equal."""
    number = final_number(output)
    return number is not None and number == final_number(reference)


def decision(text: str) -> str | None:
    """``yes``, ``no`` or ``maybe``: as stated last ("Answer: no"), alone on a line, or as the first word.

    None where the text does not commit itself; the "no" of "no difference" is none.
    """
    stated = STATED.findall(text)
    if stated:
        return stated[-1].lower()
    alone = [match[1] for match in map(ALONE.match, text.splitlines()) if match]
    if alone:
        return alone[-1].lower()
    leading = LEADING.match(text)
    return leading[1].lower() if leading else None


@RULES.register("decision")
def same_decision(output: str, reference: str) -> bool:
    """Equal decisions; no decision is not right."""
    found = decision(output)
    return found is not None and found == decision(reference)


@RULES.register("parses")
def parses(output: str, reference: str) -> bool:
    """A code block parses as Python and defines ``reference`` at its top level. Nothing is run."""
    return any(reference in (defined_names(block) or ()) for block in code_blocks(output))
