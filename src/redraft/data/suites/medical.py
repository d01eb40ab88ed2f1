"""Medical questions: PubMedQA (arXiv 1909.06146) and MedQuAD (doi 10.1186/s12859-019-3119-4)."""

from __future__ import annotations

from typing import Any

from redraft.data.suites import SuiteDefinition
from redraft.data.turns import exchange
from redraft.registries import SUITES


def pubmedqa_row(row: dict[str, Any], number: int) -> dict[str, Any]:
    """``pubid``, ``question``, ``context`` (paragraphs and their labels), ``long_answer``, ``final_decision``."""
    context = row["context"]
    labelled = zip(context.get("labels") or [""] * len(context["contexts"]), context["contexts"], strict=False)
    abstract = "\n".join(f"{label}: {text}" if label else text for label, text in labelled)
    task = f"Question: {row['question']}\nExplain your conclusion, then answer yes, no or maybe."
    answer = f"{row['long_answer']}\n\nAnswer: {row['final_decision']}"
    return {"id": f"pubmedqa/{row['pubid']}", "messages": exchange(f"Abstract:\n{abstract}\n\n{task}", answer)}


def medquad_row(row: dict[str, Any], number: int) -> dict[str, Any] | None:
    """``question`` and ``answer``; two thirds of the published rows have no answer and are left out."""
    if not row["answer"] or not row["question"]:
        return None
    return {"id": f"medquad/{number - 1}", "messages": exchange(row["question"], row["answer"])}


SUITES.register("pubmedqa")(
    SuiteDefinition(
        about="yes, no or maybe to a question about an abstract, expert labels",
        licence="MIT",
        home="pubmedqa/pubmedqa, data/ori_pqal.json",
        file="medical/pubmedqa.test",
        hub="qiaojin/PubMedQA:pqa_labeled@train",
        scoring="decision",
        convert=pubmedqa_row,
    )
)

SUITES.register("medquad")(
    SuiteDefinition(
        about="consumer health questions, answered at length by NIH web sites",
        licence="CC BY 4.0",
        home="abachaa/MedQuAD",
        file="medical/medquad.test",
        hub="lavita/MedQuAD@train",
        convert=medquad_row,
    )
)
