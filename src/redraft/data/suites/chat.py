"""General chat: MT-bench (arXiv 2306.05685), MT-Bench-101 (arXiv 2402.14762) and Spec-Bench (arXiv 2401.07851)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from redraft.data.shapes import Conversation
from redraft.data.suites import SuiteDefinition, category_of
from redraft.data.turns import asked_by_user
from redraft.registries import SUITES

# Spec-Bench reports MT-bench as one of six tasks; its eight categories can still be asked for by name. The other two
# suites are reported whole: a figure of ten prompts or fewer says little.
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
OTHERS = ("translation", "summarization", "qa", "math_reasoning", "rag")
SPEC_BENCH = {category: "mt_bench" for category in MT_BENCH} | {category: category for category in OTHERS}
ABILITIES = "AR CC CM CR FR GR IC MR PI SA SC SI TS".split()


def question_row(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A line of ``question.jsonl``: ``question_id`` (or ``prompt_id``), ``category``, ``turns`` (or ``prompt``)."""
    turns = row["turns"] if "turns" in row else row["prompt"]
    id = row["question_id"] if "question_id" in row else row["prompt_id"]
    if not isinstance(turns, list):
        raise TypeError("turns must be a list")
    return {"id": f"spec_bench/{row['category']}/{id}", "messages": list(map(asked_by_user, turns))}


def mt_bench_only(conversation: Conversation) -> Conversation | None:
    """The MT-bench questions of Spec-Bench's file, called after MT-bench."""
    head, _, rest = conversation.id.partition("/")
    if head != "spec_bench":
        return conversation
    return replace(conversation, id=f"mt_bench/{rest}") if category_of(conversation.id) in MT_BENCH else None


def ability_row(row: dict[str, Any], number: int) -> dict[str, Any]:
    """``task`` (an ability), ``id`` and ``history`` of ``user`` and ``bot``; the source's own replies are not used."""
    turns = [asked_by_user(turn["user"]) for turn in row["history"]]
    return {"id": f"mtbench101/{row['task']}/{row['id']}", "messages": turns}


SUITES.register("spec-bench")(
    SuiteDefinition(
        about="480 prompts in six tasks",
        licence="Apache-2.0; news, WMT and wiki passages keep their own terms",
        home="hemingkx/Spec-Bench, data/spec_bench/question.jsonl",
        file="general/spec_bench.test",
        convert=question_row,
        groups=SPEC_BENCH,
    )
)

SUITES.register("mt-bench")(
    SuiteDefinition(
        about="80 questions of two turns in eight categories",
        licence="Apache-2.0",
        home="lm-sys/FastChat, fastchat/llm_judge/data/mt_bench/question.jsonl (also within Spec-Bench's file)",
        file="general/spec_bench.test",
        hub="HuggingFaceH4/mt_bench_prompts@train",
        convert=question_row,
        adopt=mt_bench_only,
        groups=dict.fromkeys(MT_BENCH, ""),
    )
)

SUITES.register("mtbench101")(
    SuiteDefinition(
        about="conversations of two to seven turns, by ability",
        licence="Apache-2.0",
        home="mtbench101/mt-bench-101, data/subjective/mtbench101.jsonl",
        file="general/mtbench101.test",
        convert=ability_row,
        groups=dict.fromkeys(ABILITIES, ""),
    )
)
