"""Scoring rules on answers as models write them, and the side-by-side table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pytest

from redraft.data.prompts import read_conversations
from redraft.data.suites import load_suite
from redraft.errors import UserError
from redraft.evaluate.quality import decision, final_number, kind_of, quality_table, score

DATA = Path(os.environ.get("REDRAFT_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data folder at {DATA}; name one with REDRAFT_DATA")


@dataclass(frozen=True)
class Asked:
    task: str
    reference: str | None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9 * 2 = $18 every day.\n#### 18", "18"),
        ("#### $1,234.50", "1234.5"),
        ("####18 dollars, 3 of them", "18"),
        ("#### 5\nThat is 7 more.", "5"),
        ("#### 5\nno, wait\n#### 6", "6"),
        ("There are 3 and 4, so the answer is 7.", "7"),
        ("The total is **1,000**.", "1000"),
        ("\\boxed{-18}", "-18"),
        ("it falls to -$5", "-5"),
        ("it falls to $-5.50", "-5.5"),
        ("between 10-20", "20"),
        ("- 5 apples", "5"),
        ("half: .5", "0.5"),
        ("12,345,678 people", "12345678"),
        ("1,2345", "2345"),
        ("#### none, but 4 above", "4"),
        ("####\n18", "18"),
        ("3 #### unknown", "3"),
    ],
)
def test_final_number(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


def test_numbers_are_compared_by_value_and_their_absence_is_wrong() -> None:
    assert final_number("no digits at all") is None
    assert score("final number", "The cost is $18.00.", "2*9 = 18\n#### 18") is True
    assert score("final number", "The cost is $18.01.", "#### 18") is False
    assert score("final number", "I do not know.", "#### 18") is False


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("There was no difference.\n\nAnswer: yes", "yes"),
        ("The answer is no.", "no"),
        ("**Final decision:** Maybe", "maybe"),
        ("Conclusion: yes. On reflection, the answer is: no", "no"),
        ("The abstract shows it.\nYes.", "yes"),
        ("No, it does not.", "no"),
        ("Yes", "yes"),
        ("**Maybe**: the sample is small", "maybe"),
        ("There was no difference between them.", None),
        ("No difference was found.", None),
        ("The answer is not clear; notable effects.", None),
        ("Yesterday's data say little.", None),
        ("", None),
    ],
)
def test_decision(text: str, found: str | None) -> None:
    assert decision(text) == found
    assert score("decision", text, "x\n\nAnswer: maybe") is (found == "maybe")


CODE = "def double(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    ("output", "right"),
    [
        (CODE, True),
        (f"Here you are:\n\n```python\n{CODE}```\nIt doubles.", True),
        (f"```\nimport os\n```\nand then\n```py\n{CODE}```", True),
        (f"```python\n{CODE}", True),
        ("  ```python\ndouble = lambda x: 2 * x\n  ```", True),
        ("class double:\n    pass", True),
        ("```python\ndef triple(x):\n    return 3 * x\n```", False),
        ("```python\ndef double(x)\n    return 2 * x\n```", False),
        ("def outer():\n    def double(x):\n        return 2 * x\n", False),
        ("Sure, double(x) is easy.", False),
        ("def double(x):\n    return '\\d'", True),
        ("\0", False),
        ("(" * 5000, False),
        ("", False),
    ],
)
def test_code_is_parsed(output: str, right: bool) -> None:
    assert score("parses", output, "double") is right


def test_code_is_never_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    assert score("parses", f"open({str(witness)!r}, 'w')\n{CODE}", "double") is True
    assert not witness.exists()


def test_what_cannot_be_scored_is_none_and_unknown_rules_are_named() -> None:
    assert score("", "x", "y") is None
    assert score("final number", "5", None) is None
    assert kind_of("spec-bench:qa") == kind_of("medquad") == kind_of("") == kind_of("my own") == ""
    assert kind_of("mbpp") == "parses"
    with pytest.raises(UserError, match="unknown scoring rule 'pass@1'.*decision, final number, parses"):
        score("pass@1", "x", "y")


def test_the_table_pairs_contestants_and_counts_by_task() -> None:
    prompts = [Asked("gsm8k", f"#### {i}") for i in range(10)]
    prompts += [Asked("mbpp", "f"), Asked("medquad", "text"), Asked("gsm8k", None)]
    plain = [str(i) if i < 6 else "-1" for i in range(10)] + ["def f(): 1", "x", "5"]
    worse = ["-1" if i < 3 else text for i, text in enumerate(plain)]
    table = quality_table(prompts, {"plain": plain, "same": plain, "worse": worse})
    assert set(table) == {"plain", "same", "worse"} and set(table["plain"]) == {"gsm8k", "mbpp"}
    maths = table["plain"]["gsm8k"]
    assert (maths["rule"], maths["scored"], maths["correct"], maths["score"]["value"]) == ("final number", 10, 6, 0.6)
    assert maths["score"]["low"] < 0.6 < maths["score"]["high"] and "difference" not in maths
    assert table["same"]["gsm8k"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert table["same"]["gsm8k"]["changed"] == 0
    found = table["worse"]["gsm8k"]
    assert found["correct"] == 3 and found["changed"] == 3
    assert found["difference"]["value"] == pytest.approx(-0.3)
    assert found["difference"]["low"] <= -0.5 and found["difference"]["high"] <= 0
    assert table["plain"]["mbpp"]["rule"] == "parses" and table["plain"]["mbpp"]["correct"] == 1


def test_the_difference_is_of_verdicts_not_of_totals() -> None:
    prompts = [Asked("gsm8k", "#### 1")] * 4
    table = quality_table(prompts, {"plain": ["1", "1", "2", "2"], "other": ["2", "2", "1", "1"]})
    assert table["other"]["gsm8k"]["changed"] == 4 and table["other"]["gsm8k"]["difference"]["value"] == 0


def test_nothing_to_score_gives_an_empty_table() -> None:
    assert quality_table([Asked("medquad", "x"), Asked("", None)], {"plain": ["a", "b"]}) == {}


@needs_data
@pytest.mark.parametrize("name", ["gsm8k", "humaneval", "mbpp", "pubmedqa"])
def test_the_sources_own_answers_are_right_and_those_to_other_questions_are_not(name: str) -> None:
    items = load_suite(name, DATA).items
    source = load_suite(name, DATA).source
    answers = {c.id: c.messages[-1]["content"] for c in read_conversations(source)}
    own = [score(kind_of(i.task), answers[i.id], i.reference) for i in items]
    other = [score(kind_of(i.task), answers[j.id], i.reference) for i, j in zip(items, items[1:], strict=False)]
    assert all(own)
    # three possible decisions agree often by chance, the rest hardly ever
    assert sum(map(bool, other)) < len(items) * (0.6 if name == "pubmedqa" else 0.02)
