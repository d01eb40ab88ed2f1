"""Settings that several commands have: the target, its machine, the draft, and what their texts may be."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from redraft.registries import EXPORTERS, SUITES
from redraft.settings.base import AUTO, DtypeName, Settings, check, known_name, one_of, setting
from redraft.settings.budget import parse_budget
from redraft.settings.methods import METHODS
from redraft.settings.scorers import check_scorer
from redraft.settings.shapes import parse_shape
from redraft.settings.texts import check_address, parse_start


def _rows(value: Any) -> Any:
    return str(value) if type(value) is int else value  # a number of rows, as YAML reads it


def _suite(text: str) -> None:
    known_name("suite", text.partition("=")[0].partition(":")[0].strip(), SUITES.names())


MethodName = Annotated[str, one_of("method", lambda: METHODS)]
StartName = Annotated[str, check(parse_start)]
ScorerName = Annotated[str, check(check_scorer)]
BudgetText = Annotated[str, BeforeValidator(_rows), check(parse_budget)]
ShapeText = Annotated[str, check(lambda text: text == AUTO or parse_shape(text))]
Address = Annotated[str, check(check_address)]
FormatName = Annotated[str, one_of("export format", EXPORTERS.names)]
SuiteName = Annotated[str, check(_suite)]

PROMPT_FORMS = "JSONL, ShareGPT, Alpaca, text lines, or datasets:NAME"
NO_SERVER = "--server-model names the target on a server; give --server too, or leave it out"


class OnTarget(Settings):
    """Settings of a command that opens the target."""

    target: str = setting(..., "fine-tuned target: folder, hub id, or folder of a PEFT adapter", reads="model")
    adapter: str | None = setting(None, "PEFT adapter to merge into --target", reads="model")
    template_arg: dict[str, Any] = setting(
        {}, "argument of the target's chat template, such as enable_thinking=false; repeatable"
    )
    dtype: DtypeName = setting(
        AUTO, "data type of the target: bfloat16, float32, or auto, the one this machine is faster in"
    )
    device: str = setting("cpu", "torch device: cpu, cuda, cuda:1 or another")
    seed: int = setting(0, "seed of everything random")
