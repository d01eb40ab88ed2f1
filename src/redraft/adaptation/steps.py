"""The single steps behind the commands regenerate, select, merge, export and probe: files in, files out.

``redraft adapt`` chains the same library calls over one run directory; these serve who wants one of them alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from redraft.adaptation.models import (
    contestants,
    open_draft,
    open_proposer,
    open_target,
    prompt_rows,
    settle_template,
)
from redraft.adaptation.probe import ProbeResult, probe
from redraft.adaptation.questions import Questions
from redraft.arithmetic import AUTO, choose_dtype
from redraft.artifact import atomic_write_text
from redraft.data.prompts import Conversation, read_conversations
from redraft.data.regenerate import InProcessEngine, ServerEngine, expected_rows, regenerate
from redraft.data.shapes import row_of
from redraft.data.store import encode_row, read_rows
from redraft.data.transport import check_address
from redraft.drafts.base import Draft
from redraft.drafts.files import save_draft
from redraft.drafts.formats.base import ExportReport, TargetInfo
from redraft.drafts.opening import read_draft
from redraft.drafts.scaling import scale_change
from redraft.errors import UserError
from redraft.loading import load_tokenizer, open_facts, open_head, quiet, read_facts
from redraft.progress import Progress, progress_bar
from redraft.registries import EXPORTERS, FAMILIES
from redraft.rows import anchors
from redraft.sampling import Sampler
from redraft.select import ScoringContext, parse_scorer
from redraft.select.acceptance import alpha_measurer
from redraft.select.manifest import Manifest
from redraft.select.rules import check_order, choose, parse_budget
from redraft.target import Facts, Head, Target


@dataclass(frozen=True)
class TargetSpec:
    """A target as the command line names it."""

    name: str
    dtype: str = AUTO
    device: str = "cpu"
    adapter: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)

    def open(self, dtype: str | None = None, served: bool = False) -> Target:
        """Load it, in another ``dtype`` if one is given; ``served`` as :func:`open_target`. Raises ``UserError``."""
        chosen = choose_dtype(dtype or self.dtype, self.device, print)
        target = open_target(self.name, chosen, self.device, self.adapter, self.template_args, served=served)
        if dtype is None:
            print(f"target {self.name}: {target.verdict()}", flush=True)
            for note in target.notes:
                print(f"note on {self.name}: {note}", flush=True)
        return target

    def head(self, dtype: str) -> Head:
        """Its head alone, for who computes with stored states. Raises ``UserError``."""
        found = open_head(self.name, getattr(torch, dtype), self.device, self.adapter)
        settle_template(found.tokenizer, self.template_args)
        return found

    def facts(self) -> Facts:
        """What is known of it, where nothing is computed with it here. Raises ``UserError``."""
        found = open_facts(self.name, self.adapter)
        settle_template(found.tokenizer, self.template_args)
        return found


def check_output(path: Path, suffix: str = "") -> None:
    """Raise ``UserError`` before any work when ``path`` cannot be the file that the work ends with."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file{f' ending in {suffix}' if suffix else ''}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


# -- regenerate ------------------------------------------------------------------------------------------------------
def regenerate_file(
    spec: TargetSpec,
    prompts: str,
    out: Path,
    samplers: Sequence[Sampler],
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 64,
    server: str | None = None,
    server_model: str | None = None,
) -> Any:
    """The target's own answers to a prompt file, appended to ``out``; returns the report of the regeneration.

    A killed run goes on where it stopped. Raises ``UserError`` for bad prompts, a server that cannot be used and an
    output that cannot be written.
    """
    check_output(out, ".jsonl")
    if server:
        check_address(server)
    conversations = read_conversations(prompts)
    engine: Any
    target: Facts
    if server:
        target = spec.facts()
        engine = ServerEngine(server, server_model, batch_size, vocab_size=target.vocab_size)
    else:
        target = opened = spec.open()
        engine = InProcessEngine(opened, batch_size)
    with progress_bar("regenerate", expected_rows(conversations, samplers), "rows") as progress:
        return regenerate(
            engine,
            conversations,
            target,
            list(samplers),
            out,
            max_new_tokens,
            seed,
            progress.update,
        )


# -- select ----------------------------------------------------------------------------------------------------------
def select_file(
    rows_path: Path | None,
    prompts: str | None,
    out: Path,
    scorer_text: str,
    budget: str,
    *,
    order: str = "highest",
    target: TargetSpec | None = None,
    base_target: TargetSpec | None = None,
    draft: str | None = None,
    keep: Path | None = None,
    seed: int = 0,
) -> Manifest:
    """Score responses (or prompts alone), write the manifest to ``out`` and what it keeps to ``keep``.

    ``scorer_text`` is a scorer as :func:`redraft.select.parse_scorer` reads it. Raises ``UserError`` for an unknown
    scorer or setting, a bad budget, and what the scorer needs and was not given, before any model is loaded.
    """
    scorer = parse_scorer(scorer_text)
    wanted = parse_budget(budget)
    check_order(order)
    if (rows_path is None) == (prompts is None):
        raise UserError("give either --responses or --prompts (before generation)")
    for path in filter(None, (out, keep)):
        check_output(path)
    needs_target = bool({"target", "alpha_of"} & scorer.needs) or rows_path is None
    if needs_target and target is None:
        raise UserError(f"scorer {scorer.name} needs the fine-tuned target here; give --target")
    if "alpha_of" in scorer.needs and draft is None:
        raise UserError(f"scorer {scorer.name} measures the present draft here; give --draft")
    if "base_target" in scorer.needs and base_target is None:
        raise UserError(f"scorer {scorer.name} compares the target with its base; give --base-target")
    asked = read_conversations(prompts) if prompts is not None else []
    answered = [row for row in read_rows(rows_path) if anchors(row)] if rows_path is not None else []
    opened = target.open() if target and needs_target else None
    rows: list[Any] = prompt_rows(asked, opened) if opened and asked else answered
    with progress_bar("select", len(rows), "rows") as progress:
        context = ScoringContext(
            target=opened,
            base_target=base_target.open() if base_target and "base_target" in scorer.needs else None,
            device=target.device if target else "cpu",
            seed=seed,
            progress=lambda done, total: progress.update(done),
            scratch=out.parent,
        )
        if opened and draft and "alpha_of" in scorer.needs:
            context.alpha_of = alpha_measurer(open_draft(draft, opened).draft, opened, out.parent, context.progress)
        manifest = choose(scorer, rows, context, wanted, order, rows_path or _local(prompts))  # type: ignore[arg-type]
    manifest.write(out)
    if keep is not None:
        _write_kept(manifest, rows, asked, keep)
    return manifest


def _local(prompts: str | None) -> Path | None:
    """The prompt file, where it is one (and not the name of a data set)."""
    return Path(prompts) if prompts is not None and Path(prompts).is_file() else None


def _write_kept(manifest: Manifest, rows: Sequence[Any], asked: Sequence[Conversation], keep: Path) -> None:
    """The selected rows as a response file, or the selected prompts as a prompt file."""
    if not asked:
        atomic_write_text(keep, b"".join(encode_row(row) for row in manifest.apply(rows)).decode())
        return
    chosen = set(manifest.selected_keys)
    lines = [json.dumps(row_of(c)) for c in asked if c.id in chosen]
    atomic_write_text(keep, "\n".join(lines) + "\n")


# -- merge and export ------------------------------------------------------------------------------------------------
def target_info(name: str) -> TargetInfo:
    """The facts about a target that a draft must fit, without its weights. Raises ``UserError``."""
    return TargetInfo.of(read_facts(name, tokenizer=False), name)


def merge_folder(
    private: str, base: str, out: Path, info: TargetInfo | None = None, scale: float = 1.0
) -> dict[str, Any]:
    """Write the shared draft and ``scale`` times what a private part changes as one dense draft in ``out``.

    Returns its metadata. Raises ``UserError``.
    """
    draft, meta = read_draft(private, info, base)
    kept = {key: meta[key] for key in ("method", "target", "tokenizer_hash", "provenance") if key in meta}
    origin = {"merged_from": {"base": base, "private": private, "scale": scale}}
    if scale != 1:
        draft = scale_change(draft, read_draft(base, info)[0], scale)
    merged = draft.merged()
    save_draft(out, merged, kept | origin)
    return kept | {"parameters": sum(parameter.numel() for parameter in merged.parameters())}


def export_folder(
    draft: str, info: TargetInfo, name: str, out: Path, base: str | None = None, gamma: int = 5
) -> ExportReport:
    """Write a draft in the format of an engine. Raises ``UserError`` where the engine could not compute it alike."""
    exporter = EXPORTERS.get(name)
    found, _ = read_draft(draft, info, base)
    if not FAMILIES.get(found.family).reads_states:
        # A model by itself must speak as the target does, down to its special tokens.
        with quiet():
            info = replace(info, tokenizer=load_tokenizer(info.name))
    return exporter(found, out, info, speculative_tokens=gamma)


# -- probe -----------------------------------------------------------------------------------------------------------
def probe_files(
    spec: TargetSpec,
    draft: str,
    questions: Questions,
    *,
    base_draft: str | None = None,
    base_target: TargetSpec | None = None,
    gamma: int = 5,
    max_new_tokens: int = 128,
    with_trial: bool = False,
    say: Callable[[str], None] | None = None,
) -> ProbeResult:
    """Measure and judge a draft on these prompts; ``say`` is told how long it takes. Raises ``UserError``."""
    questions.conversations  # noqa: B018  a bad prompt file is refused before anything large is loaded
    target = spec.open()
    opened, meta = open_proposer(draft, target, base_draft)
    asked = questions.read(target, max_new_tokens, 0)
    base = base_target.open() if base_target else None
    stated = meta.get("heldout", {})
    with progress_bar("probe", len(asked) * (2 if base else 1), "prompts") as progress:
        return probe(
            target,
            opened,
            asked,
            gamma,
            max_new_tokens,
            base,
            stated.get("tau"),
            _counting(progress),
            known_gamma=stated.get("gamma"),
            targets=timed_targets(target, opened, spec.dtype, spec.open),
            with_trial=with_trial,
            say=say,
        )


def timed_targets(target: Target, draft: Draft, dtype: str, open_as: Callable[[str], Target]) -> dict[str, Target]:
    """The target in the data types that it may be served in, each tapped where the draft reads."""
    found = contestants(target, dtype, open_as)
    if draft.taps:
        for each in found.values():
            each.tap(draft.taps)
    return found


def _counting(progress: Progress) -> Callable[..., None]:
    """One count over the two passes of a probe, each of which starts from one again."""
    state = {"before": 0, "last": 0}

    def update(done: int, **fields: Any) -> None:
        if done < state["last"]:
            state["before"] += state["last"]
        state["last"] = done
        progress.update(state["before"] + done, **fields)

    return update
