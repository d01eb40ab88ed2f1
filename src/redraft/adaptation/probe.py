"""``redraft probe``: is the present draft healthy or stale, what would alignment bring, is it worth doing?

The target answers a few prompts greedily (batched), the draft's rounds are walked over the features that passed by
on the way, and two short decodings time a round. The reference is the same draft on the target it was made for; what
alignment would bring is a forecast with an interval (:mod:`redraft.evaluate.forecast`), to which a trial adaptation
can be added. Drafts of every family are probed; there is a forecast for those that it was fitted on.

A trial adaptation is the default method on the answers at hand, dealt into two halves. A copy of the draft, from a
refreshed vocabulary as ``adapt`` starts, is trained on one half and walked over the other, and the other way round, so
that every answer is measured once by a draft that was not trained on it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from redraft.acceptance.simulate import simulate_greedy_chain
from redraft.adaptation import advice
from redraft.adaptation.advice import ADAPT_ANSWERS, ADAPT_PASSES, LEAVE, TIMED_PROMPTS, Pace, ProbeResult
from redraft.data.generate import Request, generate
from redraft.data.store import Row
from redraft.drafts.base import Draft
from redraft.drafts.groups import prepare
from redraft.errors import UserError
from redraft.evaluate.forecast import Evidence, Fit, Seen, same_chain, shipped
from redraft.evaluate.speed import Prompt, tau_interval
from redraft.features import FeatureStore, RowFeatures
from redraft.reports.format import duration
from redraft.rows import anchors
from redraft.settings.runs import adaptation
from redraft.settings.sampler import Sampler
from redraft.settings.training import PrivateSize, TrainConfig
from redraft.starts.apply import StartContext, apply_start
from redraft.starts.vocabulary import coverage
from redraft.target import Target
from redraft.training.trainer import Trainer

# A trial: the default method on few answers seen often, in small steps.
METHOD, START = "lora", "vocabulary"
PASSES, STEP_TOKENS, SEED = 8.0, 256, 0
FEWEST_ANSWERS = 4
# A probe that takes longer says how to shorten it.
MINUTE = 60.0


# -- the target's answers --------------------------------------------------------------------------------------------
def greedy_rows(
    target: Target,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    progress: Callable[..., None] | None = None,
    store: FeatureStore | None = None,
) -> list[Row]:
    """The target's greedy answers, those left out that have no position to be measured at.

    ``store`` takes the features that the target computes on the way.
    """
    requests = [Request(p.id, p.ids, Sampler()) for p in prompts]
    rows, kept, tokens = list[Row](), list[RowFeatures](), 0
    for done in generate(target, requests, max_new_tokens, features=store is not None):
        texts = (done.request.key, list(done.request.prompt_ids), done.response_ids)
        row = Row(*texts, 0.0, 0, 1.0, 0, done.finish_reason, "")
        rows.append(row)
        if done.features:
            kept.append(RowFeatures(row, *done.features))
        tokens += len(done.response_ids)
        if progress:
            progress(len(rows), tokens=tokens)
    if store is not None:
        store.put(kept)
    return [row for row in rows if anchors(row)]


@contextmanager
def greedy_answers(
    target: Target,
    taps: Sequence[int],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    progress: Callable[..., None] | None = None,
) -> Iterator[tuple[list[Row], FeatureStore | None]]:
    """The target's greedy answers and their features at ``taps``; none of those where there are no taps."""
    if not taps:
        yield greedy_rows(target, prompts, max_new_tokens, progress), None
        return
    target.tap(taps)
    with tempfile.TemporaryDirectory(prefix="redraft-probe-", ignore_cleanup_errors=True) as folder:
        store = FeatureStore(Path(folder), {})
        rows = greedy_rows(target, prompts, max_new_tokens, progress, store)
        store.build(target, rows)  # nothing, unless the disk was too full to keep them
        yield rows, store


def walked(
    target: Target, draft: Draft, rows: Sequence[Row], store: FeatureStore | None, gamma: int
) -> dict[str, float]:
    """tau_pooled with its interval of the greedy chain over the target's own greedy answers, without decoding.

    Raises ``UserError`` when no answer has two tokens.
    """
    if not rows:
        raise UserError("the target ends every answer at once; check its chat template and end token")
    return tau_interval(simulate_greedy_chain(draft.to(target.device), target, rows, store, gamma), rows)


# -- a trial adaptation ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Trial:
    """``tau`` of all answers, each by the draft that was trained on the other half, with its interval.

    ``tokens`` are the supervised positions of both trainings, ``seconds`` what these took.
    """

    tau: dict[str, float]
    answers: int
    tokens: int
    seconds: float


def check_trial(draft: Draft) -> None:
    """Raise ``UserError`` for a draft of a family that there is no forecast for, which a trial would narrow."""
    known = shipped().families
    if draft.family not in known:
        raise UserError(
            f"a trial adapts {' and '.join(known)} drafts, this one is of the family {draft.family}; leave --trial out"
        )


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that can be measured, dealt out in turn in the order of their keys."""
    ordered = sorted((row for row in rows if anchors(row)), key=lambda row: row.key)
    return ordered[::2], ordered[1::2]


def trial(target: Target, draft: Draft, rows: Sequence[Row], store: FeatureStore, gamma: int) -> Trial:
    """Train twice, walk twice. ``draft`` stays as it is; ``store`` holds the features of ``rows``.

    Raises ``UserError`` for fewer answers than four, and what training raises.
    """
    parts = halves(rows)
    answers = sum(map(len, parts))
    if answers < FEWEST_ANSWERS:
        raise UserError(
            f"a trial adaptation needs {FEWEST_ANSWERS} answers of two tokens or more, there are {answers}; "
            "give more prompts, or leave --trial out"
        )
    found: dict[str, list[int]] = {}
    tokens, seconds = 0, 0.0
    settings = adaptation(METHOD) | {"epochs": PASSES, "batch_anchors": STEP_TOKENS, "gamma": gamma, "seed": SEED}
    config = TrainConfig(**settings | {"evaluate_every": 10**9, "patience": 0})
    for seen, unseen in (parts, parts[::-1]):
        own = copy.deepcopy(draft).float()
        started = apply_start(START, own, StartContext(target, rows=seen, gamma=gamma, seed=SEED)).draft
        prepared, _ = prepare(started, METHOD, PrivateSize(), SEED, target)
        with tempfile.TemporaryDirectory(prefix="redraft-trial-", ignore_cleanup_errors=True) as folder:
            # The best weights are chosen on what was seen: nothing may be chosen on the answers that are measured.
            trainer = Trainer(prepared, target, store, seen, seen, config, Path(folder))
            result = trainer.run(None)
        found |= simulate_greedy_chain(trainer.draft, target, unseen, store, gamma)
        tokens, seconds = tokens + result.anchors, seconds + result.seconds
    return Trial(tau_interval(found, [*parts[0], *parts[1]]), answers, tokens, seconds)


# -- the whole -------------------------------------------------------------------------------------------------------
def probe(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    gamma: int,
    max_new_tokens: int = 128,
    base_target: Target | None = None,
    known_reference: dict[str, float] | None = None,
    progress: Callable[..., None] | None = None,
    *,
    known_gamma: int | None = None,
    targets: Mapping[str, Target] | None = None,
    with_trial: bool = False,
    say: Callable[[str], None] | None = None,
) -> ProbeResult:
    """Measure and judge.

    ``known_reference`` is the tau that the draft's own record states, of a chain of ``known_gamma``, used without a
    base. ``targets`` holds the target in the data types that it may be served in; ``with_trial`` adapts to a part of
    the answers to narrow the forecast; ``say`` is told how long it will take. Raises ``UserError``.
    """
    evidence, own, base = shipped(), draft.family, base_target
    if with_trial:
        check_trial(draft)
    reference, where = _stated(known_reference if base is None else None, known_gamma or gamma, gamma)
    targets = targets or {str(target.dtype).removeprefix("torch."): target}
    size = draft.parameters_per_token / target.parameters_per_token
    pace = advice.first_batch(target, prompts, max_new_tokens)
    if say:
        training = evidence.training(size) * evidence.trial_passes if with_trial else 0.0
        passes = 1 if base is None else 2
        seconds = advice.expected_seconds(pace, len(prompts), max_new_tokens, passes, len(targets), training)
        shorter = (
            "; fewer prompts (--limit) or shorter answers (--max-new-tokens) take less" if seconds > MINUTE else ""
        )
        say(f"this takes about {duration(max(1.0, seconds))} here, less where answers end early{shorter}")
    share: float | None = None
    tried: Trial | None = None
    with greedy_answers(target, draft.taps, prompts, max_new_tokens, progress) as (rows, store):
        tau = walked(target, draft, rows, store, gamma)
        length = sum(len(row.response_ids) for row in rows) / len(rows)
        if store is not None:  # a draft that reads text alone says every token, and no trial adapts it
            tried = trial(target, draft, rows, store, gamma) if with_trial else None
            share = coverage(draft, rows, gamma).share
    timed = advice.round_cost(targets, draft, prompts[:TIMED_PROMPTS], gamma)
    if base is not None:
        with greedy_answers(base, draft.taps, prompts, max_new_tokens, progress) as (rows, store):
            reference = walked(base, draft, rows, store, gamma)
        where = "on the base target's own answers to the same prompts"
    measured = reference["value"] if reference is not None and base is not None else None
    observed = Seen(gamma, tau["value"], measured, tried.tau["value"] if tried else None)
    fit = evidence.fit_for(observed) if own in evidence.families else None
    forecast = fit.forecast(observed) if fit else None
    found = advice.judge(tau["value"], reference["value"] if reference else None, timed, forecast, _more(observed, fit))
    paid = None
    if forecast is not None and found.action != LEAVE:
        paid = advice.break_even(tau["value"], timed, forecast, adaptation_seconds(length, tried, evidence, pace, size))
    known = " and ".join(evidence.families)
    return ProbeResult(
        verdict=found.verdict,
        advice=found.advice,
        action=found.action,
        adapt=found.action != LEAVE,
        prompts=len(prompts),
        gamma=gamma,
        tau=tau,
        reference_tau=reference,
        reference=where,
        coverage=share,
        trial_tau=tried.tau if tried else None,
        forecast=forecast,
        forecast_from=fit.sentence() if fit else f"no forecast: it was fitted on {known} drafts, not {own}",
        round_cost=timed.cost,
        round_types={"plain": timed.plain_type, "round": timed.round_type},
        speedup_now=tau["value"] / timed.cost,
        speedup_expected=forecast["value"] / timed.cost if forecast else None,
        gain=found.gain,
        break_even=paid.to_dict() if paid else None,
        break_even_text=paid.sentence() if paid else None,
    )


def _stated(reference: Mapping[str, float] | None, known_gamma: int, gamma: int) -> tuple[dict[str, float] | None, str]:
    """What a draft's record states of a chain of ``known_gamma``, as tau of one of ``gamma``, and words for it.

    Raises ``UserError`` for a tau that no chain has.
    """
    if reference is None:
        return None, "none: give --base-target to learn what the draft could reach"
    where = "stated by the draft's own record, on other prompts"
    if known_gamma == gamma:
        return dict(reference), where
    try:
        converted = {end: same_chain(tau, known_gamma, gamma) for end, tau in reference.items()}
    except ValueError as error:
        text = f"the draft's record states a held-out tau that cannot be: {error}; give --base-target"
        raise UserError(text) from error
    return converted, f"{where}, from a chain of {known_gamma}"


def _more(observed: Seen, fit: Fit | None) -> str:
    """How to learn more than the forecast says."""
    ways = []
    if fit is not None and observed.reference_tau is None:
        ways.append("--base-target may narrow this")
    if fit is not None and observed.trial_tau is None:
        ways.append("--trial shows what a few answers bring")
    return ", ".join([*ways, "redraft adapt measures it on held-out prompts"])


def adaptation_seconds(length: float, tried: Trial | None, evidence: Evidence, pace: Pace, size: float) -> float:
    """What `redraft adapt` would take here by default: answers of this ``length`` at this pace, and training on them.

    A trained position costs what it did in the trial, else as many generated tokens as in the committed runs, by the
    draft's share ``size`` of the target's parameters.
    """
    token = pace.token(length)
    position = tried.seconds / tried.tokens if tried and tried.tokens else evidence.training(size) * token
    return ADAPT_ANSWERS * length * (token + ADAPT_PASSES * position)
