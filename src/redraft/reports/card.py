"""The model card of a draft: a README.md as model hubs read it, from what is known of the draft and nothing else.

A figure that nobody measured is called so, and a licence that nobody stated is left to be filled in. Names of models
and files are data: they stand in code spans and quoted YAML, so that no character of theirs is markup.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from redraft.files import atomic_write_text
from redraft.inputs import MOST_YAML, load_yaml
from redraft.reports import format as form
from redraft.reports import sections
from redraft.reports.load import BenchResult, Costs, Guard, parse

CARD_FILE = "README.md"
LICENCE_FIELDS = ("license", "license_name", "license_link")
# What loads the files of a format, as hubs list libraries; a format that is not here is called by its own name.
LIBRARIES = {"plain": "vllm", "hf": "transformers", "gguf": "llama.cpp", "merged": "redraft", "private": "redraft"}
UNKNOWN, UNMEASURED = "unknown: fill in", "Not measured."
REPLACED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What is known of a draft. Anything may be missing; the card then says that it is unknown.

    ``format`` is what the folder holds: the name of an exporter, or ``merged`` or ``private``. ``made_for`` is the
    model that the draft was trained for, where that is another. ``serve`` are the commands that load it or, of a format
    that ``trains``, go on training it. ``hub_ids`` are those of the names that a hub knows. ``licences`` holds, for
    "target" and "base draft", the licence fields of its own card. ``bench`` is a benchmark's result, ``ledger`` a run's
    costs, ``guard`` the held-out tau of old and new draft.
    """

    family: str
    format: str
    target: str | None = None
    target_hash: str | None = None
    made_for: str | None = None
    made_for_hash: str | None = None
    base_draft: str | None = None
    hub_ids: frozenset[str] = frozenset()
    method: str | None = None
    parameters: int | None = None
    serve: Sequence[str] = ()
    trains: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    licences: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    bench: Mapping[str, Any] | None = None
    guard: Mapping[str, Any] | None = None
    ledger: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Write the card into ``folder``, over an older one. Raises ``UserError`` when the disk cannot hold it."""
    path = folder / CARD_FILE
    atomic_write_text(path, model_card(facts))
    return path


def model_card(facts: CardFacts) -> str:
    """The whole card, front matter first."""
    parts = [
        front_matter(facts),
        f"# A speculative-decoding draft ({code(facts.family)})",
        "This model proposes tokens to a larger one, its target, which checks them; it is of no use by itself. "
        "It was written by redraft.",
        _identity(facts),
        _section("How to go on training it" if facts.trains else "How to serve it", _serving(facts)),
        _section("Acceptance", _acceptance(facts)),
        _section("Data", _listed(facts.data) or "Unknown: fill in."),
        _section("Training", _listed(facts.settings) or "No training is on record."),
        _section("Costs", _costs(facts.ledger)),
        _section("Licence", _licence_text(facts)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# -- names are data --------------------------------------------------------------------------------------------------
def clean(text: Any) -> str:
    """One line of visible characters: controls, line breaks and marks that turn the writing round are replaced."""
    return "".join(REPLACED if unicodedata.category(c)[0] in "CZ" and c != " " else c for c in str(text))


def code(text: Any) -> str:
    """A name as a code span, in which no character is markup."""
    name = clean(text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", name)), default=0))
    pad = " " if name.startswith("`") or name.endswith("`") or not name.strip() else ""
    return f"{ticks}{pad}{name}{pad}{ticks}"


def cell(text: Any) -> str:
    """A name in a table, where a bar would end the cell."""
    return code(text).replace("|", "\\|")


def block(lines: Sequence[str]) -> str:
    """Shell lines in a fence that none of them can close."""
    text = "\n".join(map(clean, lines))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}bash\n{text}\n{fence}"


# -- front matter ----------------------------------------------------------------------------------------------------
def front_matter(facts: CardFacts) -> str:
    """The YAML that hubs read. What they must not be told wrongly is left out, with a comment that asks for it."""
    values: dict[str, Any] = {"library_name": clean(LIBRARIES.get(facts.format, facts.format))}
    values["tags"] = ["speculative-decoding", "draft-model", clean(facts.family)]
    lines = []
    if facts.target in facts.hub_ids and facts.target is not None:
        values["base_model"] = clean(facts.target)
    else:
        lines.append(f"# base_model: {UNKNOWN} (the target's id on the hub)")
    found = [dict(one) for one in facts.licences.values() if one]
    if found and all(one == found[0] for one in found):
        values |= {name: clean(value) for name, value in found[0].items()}
    else:
        why = "the licences of target and old draft differ" if found else "no card of target or old draft states one"
        lines.append(f"# license: {UNKNOWN} ({why})")
    dumped = yaml.safe_dump(values, allow_unicode=True, sort_keys=False, width=1 << 20)
    return "---\n" + dumped + "".join(f"{line}\n" for line in lines) + "---"


def licence_of(card: str) -> dict[str, str]:
    """The licence fields in the front matter of a model card's text; none where there is no such thing."""
    match = re.match(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", card, re.S | re.M)
    try:
        values = load_yaml(match[1]) if match and len(match[1]) <= MOST_YAML else None
    except ValueError:
        return {}
    found = values if isinstance(values, dict) else {}
    return {name: found[name] for name in LICENCE_FIELDS if isinstance(found.get(name), str) and found[name].strip()}


# -- sections --------------------------------------------------------------------------------------------------------
def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _identity(facts: CardFacts) -> str:
    target = UNKNOWN if facts.target is None else code(facts.target)
    hashed = _hashed(facts.target_hash)
    made = code(facts.made_for) + _hashed(facts.made_for_hash) if facts.made_for else ""
    kept = (facts.guard or {}).get("kept") == "old"
    lines = [
        f"- Target: {target}{hashed}. With any other target, its base model included, acceptance is lower.",
        *([f"- Made for another model: {made}; acceptance on the target is lower than on that."] if made else []),
        f"- Base draft: {code(facts.base_draft) if facts.base_draft else UNKNOWN}",
        f"- Method: {code(facts.method) if facts.method else 'none on record'}",
        *([f"- Parameters: {facts.parameters:,}"] if facts.parameters else []),
        f"- Files: {'redraft, ' if facts.format in ('merged', 'private') else ''}format {code(facts.format)}",
    ]
    if facts.format == "private":
        lines.append("- It holds only what was trained: the base draft is needed beside it.")
    if kept:
        lines.append("- Training did not improve it on held-out prompts, so this is the base draft, unchanged.")
    return "\n".join([*lines, *(f"- Note: {code(note)}" for note in facts.notes)])


def _hashed(hash: str | None) -> str:
    return f" (content hash {code(hash)})" if hash else ""


def _serving(facts: CardFacts) -> str:
    return block(facts.serve) if facts.serve else "Export it first: `redraft export` prints the command of the engine."


def _acceptance(facts: CardFacts) -> str:
    """tau before and after, with all that makes it comparable; a figure that is not there is called so."""
    measure = f"{UNMEASURED} `redraft bench` measures it on prompts of your own."
    parts = [measure if facts.bench is None else _bench(parse(BenchResult, facts.bench, "benchmark result"))]
    if facts.guard is not None:
        guard = parse(Guard, facts.guard, "held-out figures")
        parts.append(
            f"On {guard.prompts} held-out prompts, by walking the target's own greedy answers with a chain of "
            f"{guard.gamma}: tau {form.number(guard.old, 3)} before, {form.number(guard.new, 3)} after. "
            "(Training chose its weights by these prompts.)"
        )
    return "\n\n".join(parts)


def _bench(bench: BenchResult) -> str:
    rows = ["| draft | tau | 95% interval | speed-up |", "| --- | ---: | --- | ---: |"]
    for name, figures in bench.drafts.items():
        tau, speed = figures.tau_pooled, figures.speedup
        cells = form.number(tau.value), form.bounds(tau) or form.DASH, form.times(speed.value if speed else None)
        rows.append(f"| {cell(name)} | {' | '.join(cells)} |")
    told = ["tau counts all tokens of a round, the target's own one included", code(sections.sampler_line(bench))]
    if drafted := getattr(bench.setup, "draft_tokens", None):
        told.append(f"drafts propose {code(drafted)} tokens")
    machine = bench.provenance.get("machine")
    if bench.plain is not None and isinstance(machine, dict):
        processor = ", ".join(map(str, [machine.get("cpu"), *machine.get("gpu", [])]))
        told.append(f"speed-ups are over the fastest plain decoding, on {code(processor)}")
    return "\n".join(rows) + "\n\n" + "; ".join(told) + "."


def _listed(values: Mapping[str, Any]) -> str:
    """One line a fact; what is not known is left out."""
    known = {name: value for name, value in values.items() if value not in (None, "", [], {}, ())}
    return "\n".join(f"- {name}: {_value(value)}" for name, value in known.items())


def _value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | list | tuple):
        return code(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _costs(ledger: Mapping[str, Any] | None) -> str:
    costs = None if ledger is None else parse(Costs, ledger, "cost ledger")
    if costs is None or not costs.stages:
        return "Not on record."
    rows = ["| stage | time | tokens | compute | peak memory |", "| --- | ---: | ---: | ---: | ---: |"]
    for stage in [*costs.stages, sections.total_of(costs)]:
        cells = sections.ledger_cells(stage)
        figures = " | ".join(cells[key] for key in ("time", "tokens", "flops", "memory"))
        rows.append(f"| {cell(cells['stage'])} | {figures} |")
    return "\n".join(rows)


def _licence_text(facts: CardFacts) -> str:
    """Whose weights and text these are, as far as their own cards say."""
    lines = []
    for whose in ("target", "base draft"):
        known = facts.licences.get(whose) or {}
        told = ", ".join(code(known[name]) for name in LICENCE_FIELDS if name in known)
        lines.append(f"- Of the {whose}: {told or UNKNOWN}")
    return "\n".join(["The draft is made of the base draft's weights and the target's text.", "", *lines])
