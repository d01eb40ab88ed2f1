"""The page docs/serve/options.md: which option of a draft each format holds, found by asking the exporters.

Options, tiny drafts and their target are those of :mod:`redraft.drafts.formats.matrix`, which a test holds against
every reader. Nothing is written, and no model is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from redraft.drafts.formats.matrix import OPTIONS, facts, made
from redraft.errors import UserError
from redraft.registries import FAMILIES

COLUMNS = {
    "eagle3": ("vllm", "plain", "sglang", "gguf", "tensorrt-llm", "specforge"),
    "eagle1": ("vllm", "sglang"),
}
READERS = {
    "vllm": "vLLM",
    "plain": "vLLM",
    "sglang": "SGLang",
    "gguf": "llama.cpp",
    "tensorrt-llm": "TensorRT-LLM",
    "specforge": "SpecForge",
}
TITLES = {"eagle3": "EAGLE-3", "eagle1": "EAGLE-1"}
YES, NO = "yes", "–"


def answers(family: str) -> dict[str, dict[str, str]]:
    """Of each option and format why the format does not hold a draft with the option; empty where it does."""
    target, writers = facts(), FAMILIES.get(family).writers
    missing = set(writers) - set(COLUMNS[family])
    assert not missing, f"{family} has formats that the page does not show: {missing}"
    return {
        option: {name: reason(writers[name], made(family, changes), target) for name in COLUMNS[family]}
        for option, changes in OPTIONS[family].items()
    }


def reason(writer: Any, draft: Any, target: Any) -> str:
    """Why this writer refuses the draft, without what would help; empty where it does not."""
    try:
        writer.check(draft, target)
    except UserError as error:
        text = str(error).partition(": ")[2] or str(error)
        parts = (text.rpartition(";")[0] or text).split("; ")
        # Beside what is taken otherwise the tensors that follow from it need not be told.
        told = [part for part in parts if not part.startswith("there is no place for") and " has shape " not in part]
        return "; ".join(told or parts[:1])
    return ""


def table(family: str, found: dict[str, dict[str, str]]) -> Iterator[str]:
    """The section of a family."""
    names = COLUMNS[family]
    yield from ("", f"## {TITLES[family]}", "")
    yield f"| option | {' | '.join(f'`{name}` ({READERS[name]})' for name in names)} |"
    yield "| --- |" + " --- |" * len(names)
    for option, reasons in found.items():
        yield f"| {option} | {' | '.join(NO if reasons[name] else YES for name in names)} |"
    yield from ("", "Why not:", "")
    for name in names:
        for option, reasons in found.items():
            if reasons[name]:
                yield f"- `{name}`, {option}: {reasons[name]}"


def options_page(written: str) -> str:
    """The page; ``written`` is the comment that says where it comes from."""
    lines = [
        "# Which options each format holds",
        "",
        written,
        "",
        "A draft has the options that it was trained with. What an engine would compute otherwise is refused at",
        "export, by the name of the option; nothing is dropped. This table is what the exporters say of a tiny draft",
        "with each option, and with pairs that meet in one key of a file. What the options are is told under",
        "[formats](../formats.md#tensors-of-an-eagle3-draft). A bias that is zero throughout is left out, or filled",
        "in, as the engine needs it; here none is zero.",
    ]
    for family in COLUMNS:
        lines += table(family, answers(family))
    lines += [
        "",
        "A **standalone** draft has no options of this kind: `hf` writes the whole model, `gguf` one of Llama's shape",
        "([what is refused](../formats.md#what-is-refused-and-why)).",
    ]
    return "\n".join(lines) + "\n"
