"""The check from one end to the other: the file, the server, the target's own answers, and what all of it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch

from redraft.adaptation.bench import Questions
from redraft.adaptation.check import served as serving
from redraft.adaptation.check import static, verdict
from redraft.adaptation.check.causes import CAUSES, READS_NONE
from redraft.adaptation.check.result import CheckResult, Finding
from redraft.adaptation.check.rounds import Rounds
from redraft.adaptation.check.trials import Ground, Trial, ground, mended, positions, suspects_of
from redraft.adaptation.check.verdict import Evidence, Piece, Reference
from redraft.adaptation.models import TargetSpec
from redraft.data.prompts import prompt_messages
from redraft.data.turns import Message
from redraft.drafts.opening import AnyDraft, OpenDraft, open_checkpoint
from redraft.errors import UserError
from redraft.evaluate.forecast import same_chain
from redraft.evaluate.load import ServerConfig, Session
from redraft.evaluate.speed import Prompt
from redraft.progress import progress_bar
from redraft.registries import FAMILIES
from redraft.settings.steps import CheckSettings
from redraft.starts.vocabulary import coverage
from redraft.target import Facts, Target

GAMMA = 5
# Rows that padding adds to a vocabulary; another tokenizer differs by more.
PADDED = 1024
# Texts that a server is asked to go on with, piece by piece, and the pieces of each.
TEXTS, PIECES, LEAST_PIECE = 3, 6, 4


def check_draft(s: CheckSettings, spec: TargetSpec, draft: AnyDraft, base: TargetSpec | None) -> CheckResult:
    """Why acceptance of ``draft`` on this target is low. Raises ``UserError``, in one line, for bad input."""
    questions = Questions(s) if s.prompts or s.suite else None
    if s.server and questions is None:
        raise UserError("nothing to ask the server; give --prompts FILE or --suite NAME")
    facts = spec.facts()
    result = CheckResult(draft.source if isinstance(draft, OpenDraft) else str(draft), facts.name)
    check = Check(s, result, facts)
    if not check.open(draft):
        return result
    check.look()
    if questions is not None and not any(one.cause == "other_tokenizer" for one in result.findings):
        check.measure(spec.open(), questions, base)
    if questions is None and not s.engine:
        result.notes.append("only the file was looked at: --prompts measures it, --for says what an engine reads")
    result.notes = list(dict.fromkeys([*result.static.notes, *result.notes]))
    return result


class Check:
    """One check under way; what it finds goes into ``result``."""

    def __init__(self, s: CheckSettings, result: CheckResult, facts: Facts) -> None:
        self.s, self.result, self.facts = s, result, facts
        self.opened: Any = None
        self.session: Session | None = None
        self.engine = s.engine

    def found(self, evidence: Evidence | None) -> None:
        """Add a cause, unless it is there already."""
        if evidence is None or any(one.cause == evidence.cause for one in self.result.findings):
            return
        s = self.s
        known = {"draft": self.result.draft, "target": self.result.target, "base": s.base_target, "prompts": s.prompts}
        known |= {"server": s.server, "gamma": str(evidence.gamma) if evidence.gamma else None}
        known["format"] = static.format_for(self.opened, self.engine)
        known["option"] = evidence.option or " "
        cause = CAUSES[evidence.cause]
        if cause.id == "refused" and self.engine in static.WRITES_ALONE:
            cause = replace(cause, mend=READS_NONE)
        mend = cause.mended(**{name: str(value) for name, value in known.items() if value})
        self.result.findings.append(Finding(evidence.cause, evidence.words, mend))

    # -- the file ----------------------------------------------------------------------------------------------------
    def open(self, draft: AnyDraft) -> bool:
        """Open the draft; false where another tokenizer is why it does not open. Raises ``UserError``."""
        source = None if isinstance(draft, OpenDraft) else str(draft)
        if source is not None and (misfit := static.fits(source, self.facts)):
            self.found(Evidence(misfit.cause, misfit.evidence))
            return False
        try:
            self.opened = open_checkpoint(draft, self.facts, self.s.base_draft, torch.float32)
        except UserError as error:
            told = static.vocabulary_of(source) if source is not None else None
            if told is None or abs(told - self.facts.vocab_size) < PADDED:
                raise
            self.found(Evidence("other_tokenizer", str(error)))
            return False
        return True

    def look(self, engine: str | None = None) -> None:
        """Lay the readings of the file side by side: ours, and that of the engine that was named or found out."""
        result, self.engine = self.result, engine or self.s.engine
        result.static = static.look(self.opened, self.facts, self.engine)
        for one in result.static.suspicions:
            self.found(Evidence(one.cause, one.evidence))

    # -- the measurement -----------------------------------------------------------------------------------------------
    def measure(self, target: Target, questions: Questions, base: TargetSpec | None) -> None:
        """Ask the server where there is one, walk the draft, try changes, and weigh it all. Raises ``UserError``."""
        prompts, s = questions.read(target), self.s
        draft = self.opened.draft.bind(target).eval().to(target.device)
        messages = [prompt_messages(one, ()) for one in questions.conversations]
        served, hindered = self.ask(target, prompts, messages) if s.server else (None, False)
        gamma = s.gamma or (served.gamma if served else None) or GAMMA
        if served is not None and served.gamma:
            gamma = served.gamma
        try:
            with progress_bar("check: answers", len(prompts), "prompts") as bar:
                with ground(target, draft, prompts, gamma, s.max_new_tokens, bar.update) as place:
                    self.weigh(place, draft, prompts, served, hindered, base)
        finally:
            if self.session is not None:
                self.session.close()

    def ask(
        self, target: Target, prompts: Sequence[Prompt], messages: Sequence[list[Message]]
    ) -> tuple[serving.Served | None, bool]:
        """What the server does, and whether its own fault explains what it accepts. Raises ``UserError``."""
        s, result = self.s, self.result
        assert s.server is not None
        connection, model = serving.connected(s.server, s.server_model)
        try:
            faults, notes = serving.read_prompts(connection, model, prompts, messages, target.tokenizer)
        finally:
            connection.close()
        result.notes += notes
        for fault in faults:
            self.found(Evidence(fault.cause, fault.evidence))
        if any(fault.blocks for fault in faults):
            return None, True
        config = ServerConfig(
            max_new_tokens=s.max_new_tokens,
            seed=s.seed,
            model=model,
            eos_ids=tuple(target.eos_ids),
            vocab_size=target.vocab_size,
        )
        with progress_bar("check: server", len(prompts), "prompts") as bar:
            self.session = serving.open_session(s.server, config, prompts)
            done = count(1)
            served = serving.ask(self.session, prompts, lambda what: bar.update(next(done)))
        result.notes += served.notes
        engine = serving.engine_of(self.session)
        self.engine = s.engine or engine
        known = FAMILIES.get(self.opened.draft.family).readers
        if s.engine is None and engine in known and self.opened.meta.get("format") != "redraft":
            self.look(engine)
        result.there = verdict.served_rates(served)
        texts = serving.compare_texts(target, prompts, served.answers)
        if texts is None:
            result.notes.append("the server gives no token ids: whether its target is ours was not looked at")
        other = verdict.other_texts(texts)
        for evidence in [*other, *verdict.limits(served, s.gamma)]:
            self.found(evidence)
        return served, bool(other)

    def weigh(
        self,
        place: Ground,
        draft: Any,
        prompts: Sequence[Prompt],
        served: serving.Served | None,
        hindered: bool,
        base: TargetSpec | None,
    ) -> None:
        """Everything that the target's own answers tell."""
        result = self.result
        here = place.rounds(draft)
        if not here.keys:
            raise UserError("no answer has two tokens or more, so no round can be walked; give other prompts")
        result.here = verdict.rates(here) | {"gamma": place.gamma, "prompts": len(here.keys)}
        levels = self.trials(place, draft, here)
        if served is not None and not hindered:
            self.compare(place, draft, here, served, levels[0])
        reference = self.reference(place, draft, prompts, base)
        own = verdict.changes(levels, reference)
        for evidence in own:
            self.found(evidence)
        if own:
            return
        covered = coverage(draft, place.rows, place.gamma) if place.source is not None else None
        for evidence in verdict.poorer(here, reference, static.claims(self.opened, place.target), covered):
            self.found(evidence)
        if reference is None:
            result.notes.append(
                "whether the draft is stale nobody can say: give the model it was made for (--base-target)"
            )
        self.found(verdict.too_long(here))
        longest = max(positions(row) for row in place.rows)
        told = getattr(draft.config, "max_position_embeddings", 0)
        self.found(verdict.lost_thread(here, [*([told] if 0 < told < longest else []), *quarters(place)]))

    def trials(self, place: Ground, draft: Any, here: Rounds) -> list[list[Trial]]:
        """The trials, which go into the result."""
        number = sum(1 for _ in suspects_of(draft, place.target)) + 1
        done = count(1)
        with progress_bar("check: trials", number, "changes") as bar:
            levels = mended(place, draft, here, lambda what: bar.update(min(number, next(done)), now=what))
        self.result.trials = [
            {
                "cause": trial.suspect.cause,
                "what": trial.suspect.what,
                "tau": trial.rounds.tau().value,
                "gain": trial.gain,
                "sure": trial.sure,
            }
            for trial in levels[0]
        ]
        return levels

    def compare(self, place: Ground, draft: Any, here: Rounds, served: serving.Served, trials: Sequence[Trial]) -> None:
        """Why the server accepts less than this engine does, where it does."""
        result = self.result
        told = [one.cause for one in result.findings]
        if not verdict.lower(served, here):
            # What an engine might read otherwise does no harm here.
            file = {one.cause for one in result.static.suspicions}
            harmless = [one for one in result.findings if one.cause in file]
            result.notes += [f"{one.evidence}; yet the server accepts what is accepted here" for one in harmless]
            result.findings = [one for one in result.findings if one.cause not in file]
            return
        # What fits exactly; else a position of the text behind which it falls off; else what fits best.
        explained = verdict.misreading(served, here, trials, told, verdict.EXACTLY)
        if explained is None and "engine_limit" not in told:
            explained = verdict.falling(self.pieces(place, draft)) or verdict.misreading(served, here, trials, told)
            rates = f"tau is {served.counted.tau().value:.2f} at the server, {here.tau().value:.2f} here"
            explained = explained or Evidence("engine_lower", rates)
        if explained is not None:
            # In front of what the file alone made suspect: that has been tried by now.
            before, result.findings = result.findings, []
            self.found(explained)
            result.findings += [one for one in before if one.cause != explained.cause]

    def pieces(self, place: Ground, draft: Any) -> list[Piece]:
        """What is accepted behind several positions of the longest texts, here and at the server."""
        assert self.session is not None
        found: list[Piece] = []
        rows = sorted(place.rows, key=positions)[-TEXTS:]
        runs = {
            row.key: runs for row, runs in draft.walk(place.target).runs(rows, place.features(draft.taps), place.gamma)
        }
        for row in rows:
            room = place.limits[row.key]
            size = max(LEAST_PIECE, room // PIECES)
            starts = [start for start in range(0, room - size, size)]
            for start, counts in zip(starts, serving.by_pieces(self.session, row, starts, size), strict=True):
                if counts is None or not counts.rounds:
                    continue
                tokens, rounds = counts.tau_tokens(size, 1), counts.rounds
                mine = pieces_here(runs[row.key], start, size)
                if mine:
                    at = len(row.prompt_ids) + start
                    found.append(Piece(at, sum(mine) / len(mine), tokens / rounds - 1))
        return found

    def reference(
        self, place: Ground, draft: Any, prompts: Sequence[Prompt], base: TargetSpec | None
    ) -> Reference | None:
        """What the draft reached on the model that it was made for, or by its own record."""
        if base is not None:
            other = base.open()
            with progress_bar("check: base", len(prompts), "prompts") as bar:
                with ground(other, draft, prompts, place.gamma, self.s.max_new_tokens, bar.update) as there:
                    rounds = there.rounds(draft)
                    covered = coverage(draft, there.rows, place.gamma) if there.source is not None else None
            draft.bind(place.target)
            return Reference(rounds.tau().value, "on the base model's own answers", base=rounds, covered=covered)
        stated = self.opened.meta.get("heldout") or {}
        tau = (stated.get("tau") or {}).get("value") if isinstance(stated, dict) else None
        if not isinstance(tau, int | float):
            return None
        gamma = stated.get("gamma") or place.gamma
        try:
            tau = tau if gamma == place.gamma else same_chain(tau, gamma, place.gamma)
        except ValueError:
            return None
        same = (self.opened.meta.get("target") or {}).get("hash") == place.target.content_hash()
        return Reference(tau, "by its own record, on other prompts", same)


def pieces_here(runs: Sequence[int], start: int, size: int) -> list[int]:
    """Accepted tokens of the rounds of a request that goes on behind ``start`` tokens and gives ``size``."""
    found, at = list[int](), start
    while at - start < size - 1 and at < len(runs):
        found.append(runs[at])
        at += runs[at] + 1
    return found


def quarters(place: Ground) -> list[int]:
    """Positions that divide the walked texts in four."""
    ends = sorted(len(row.prompt_ids) for row in place.rows), max(positions(row) for row in place.rows)
    first = ends[0][0]
    return [first + (ends[1] - first) * k // 4 for k in (2, 3, 1)]
