"""What a model card says of a draft, gathered from its record, the run that made it and the cards of its parents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redraft.artifact import read_sealed
from redraft.data.store import read_rows
from redraft.drafts.base import Draft
from redraft.drafts.formats.base import ExportReport
from redraft.drafts.formats.reading import HUB_ID
from redraft.drafts.opening import OpenDraft
from redraft.errors import UserError
from redraft.inputs import read_text
from redraft.registries import FAMILIES
from redraft.reports.card import CARD_FILE, CardFacts, licence_of
from redraft.seals import MEND
from redraft.settings.texts import parse_budget
from redraft.target import Facts

# Of a run directory: its settings, costs, figures and answers.
CONFIG, LEDGER, BENCH, RESPONSES = "config.json", "ledger.json", "bench.json", "responses.jsonl"
TRAINED = ("loss", "epochs", "learning_rate", "optimizer", "unroll", "batch_anchors", "seed")


def run_card(run: Path, format: str, draft: Draft, target: Facts, serve: Sequence[str] = ()) -> CardFacts:
    """The card of what the run directory ``run`` holds or exported; what the run has not reached yet is left out.

    Raises ``UserError`` for a damaged file of the run.
    """
    config = _stored(run / CONFIG)
    record = next((_stored(run / name / "redraft.json") for name in ("merged", "draft") if (run / name).is_dir()), {})
    return CardFacts(
        family=draft.family,
        format=format,
        **_target(target, record),
        **_parents(target.name, config.get("draft")),
        method=record.get("method"),
        parameters=sum(parameter.numel() for parameter in draft.parameters()),
        serve=serve,
        trains=_trains(draft.family, format),
        data=_data(run, config),
        settings=_settings(config),
        bench=_stored(run / BENCH) or None,
        guard=record.get("guard"),
        ledger=_stored(run / LEDGER) or None,
    )


def export_card(found: OpenDraft, report: ExportReport, target: Facts, serve: Sequence[str]) -> CardFacts:
    """The card of a draft that was exported by itself: with all of the run that it lies in, else with its own record.

    Raises ``UserError`` for a damaged file of the run.
    """
    run = Path(found.source).absolute().parent
    if found.meta.get("format", "redraft") == "redraft" and (run / LEDGER).is_file() and (run / CONFIG).is_file():
        return run_card(run, report.format, found.draft, target, serve)
    meta = found.meta
    ours = meta.get("format", "redraft") == "redraft"
    merged = meta.get("merged_from")
    base = (merged.get("base") if isinstance(merged, dict) else None) if ours else found.source
    return CardFacts(
        family=found.draft.family,
        format=report.format,
        **_target(target, meta),
        **_parents(target.name, base),
        method=meta.get("method"),
        parameters=report.parameters,
        serve=serve,
        trains=_trains(found.draft.family, report.format),
        guard=meta.get("guard"),
        notes=[*map(str, meta.get("notes") or ()), *report.warnings],
    )


def _target(target: Facts, record: Mapping[str, Any]) -> dict[str, Any]:
    """Its name, with the hash of its weights where the draft's own record is of it; else the model that the record
    is of."""
    told = record.get("target")
    known = told if isinstance(told, dict) else {"name": record.get("verifier")}
    made, hashed = known.get("name"), known.get("hash")
    if isinstance(made, str) and made and target.name and Path(made).name != Path(target.name).name:
        return {"target": target.name, "made_for": made, "made_for_hash": hashed}
    return {"target": target.name or None, "target_hash": hashed}


def _trains(family: str, format: str) -> bool:
    """Whether a draft is written in this format to go on training it."""
    return bool(getattr(FAMILIES.get(family).writers.get(format), "trains", False))


def _parents(target: str | None, base_draft: str | None) -> dict[str, Any]:
    """The base draft, which of the names a hub knows, and the licences that the parents' own cards state."""
    named = {"target": target, "base draft": base_draft}
    known = {whose: str(name) for whose, name in named.items() if name}
    return {
        "base_draft": known.get("base draft"),
        "hub_ids": frozenset(name for name in known.values() if "/" in name and _on_hub(name)),
        "licences": {whose: licence_of(_card_of(name)) for whose, name in known.items()},
    }


def _on_hub(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _card_of(name: str) -> str:
    """The text of a model's card, from its folder or the hub's cache; nothing is fetched. Empty where there is none."""
    path: Any = Path(name) / CARD_FILE
    if _on_hub(name):
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(name, CARD_FILE)
    try:
        return read_text(path) if isinstance(path, str | Path) else ""
    except UserError:
        return ""


def _stored(path: Path) -> dict[str, Any]:
    return read_sealed(path, None, None, MEND) if path.is_file() else {}


def _data(run: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Whose text the draft was trained on, in numbers."""
    asked, log = config.get("prompts"), config.get("responses")
    found: dict[str, Any] = {
        "prompts": Path(asked).name if asked and Path(asked).exists() else asked,
        "served answers": Path(log).name if log else None,
    }
    if (run / RESPONSES).is_file():
        rows = read_rows(run / RESPONSES)
        found |= {
            "answers": len(rows),
            "tokens of these": int(rows.response_tokens.sum()),
            "written by": "the target" if not log else "whatever served them",
            "temperatures": sorted({float(how.temperature) for how in rows.hows}),
        }
    budget = config.get("budget")
    if budget and not parse_budget(budget).whole:
        found |= {"trained on": f"{budget} of them", "chosen by": config.get("scorer")}
    if config.get("general"):
        found |= {"general text": Path(config["general"]).name, "its share": config.get("general_share")}
    return found


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, as the run directory has it."""
    train = config.get("train") or config.get("align") or {}
    sizes = {name: config.get(name) for name in ("rank", "private_width")} | (config.get("private") or {})
    found = {"method": config.get("method"), "start": config.get("start"), "gamma": config.get("gamma"), **sizes}
    return found | {name.replace("_", " "): train.get(name) for name in TRAINED} | {"replay": config.get("replay")}
