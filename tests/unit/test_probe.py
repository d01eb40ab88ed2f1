"""The probe around its forecast: trial adaptations, how long it says it takes, a round in its fastest type."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from redraft.adaptation import advice
from redraft.adaptation import probe as probing
from redraft.adaptation.advice import (
    ADAPT_ANSWERS,
    ADAPT_PASSES,
    TIMED_PROMPTS,
    TIMED_TOKENS,
    Pace,
    expected_seconds,
    first_batch,
    round_cost,
)
from redraft.adaptation.probe import (
    PASSES,
    Trial,
    adaptation_seconds,
    check_trial,
    greedy_answers,
    halves,
    probe,
    trial,
)
from redraft.drafts.base import fresh
from redraft.drafts.standalone.shapes import fresh_standalone
from redraft.errors import UserError
from redraft.evaluate.forecast import same_chain, shipped
from redraft.evaluate.speed import Prompt
from redraft.rows import anchors

TOYS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toys.py"))))
PROMPTS = [Prompt(f"p{i}", ids) for i, ids in enumerate(TOYS.prompts(6))]


@pytest.fixture
def target(tiny_target: Any) -> Any:
    return tiny_target("llama", initializer_range=0.1)


# -- trial -----------------------------------------------------------------------------------------------------------
def test_a_trial_measures_every_answer_once_by_a_draft_that_did_not_see_it(
    target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = TOYS.make_draft("fresh", target)
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    seen: list[set[str]] = []
    walked: list[set[str]] = []
    make, walk = probing.Trainer, probing.simulate_greedy_chain

    def trainer(draft: Any, target: Any, store: Any, rows: Any, heldout: Any, *rest: Any) -> Any:
        assert {row.key for row in heldout} <= {row.key for row in rows}  # nothing is chosen on what is measured
        seen.append({row.key for row in rows})
        return make(draft, target, store, rows, heldout, *rest)

    def simulate(draft: Any, target: Any, rows: Any, *rest: Any) -> Any:
        walked.append({row.key for row in rows})
        return walk(draft, target, rows, *rest)

    monkeypatch.setattr(probing, "Trainer", trainer)
    monkeypatch.setattr(probing, "simulate_greedy_chain", simulate)
    with greedy_answers(target, draft.taps, PROMPTS, 16) as (rows, store):
        found = trial(target, draft, rows, store, 3)
        positions = sum(map(anchors, rows))
    assert len(seen) == len(walked) == 2 and not seen[0] & walked[0] and not seen[1] & walked[1]
    assert walked[0] | walked[1] == {row.key for row in rows} and not walked[0] & walked[1]
    assert found.answers == len(rows) and 1 <= found.tau["value"] <= 4
    assert found.tokens == PASSES * positions and found.seconds > 0
    for name, tensor in draft.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_trial_that_cannot_be_is_refused(target: Any) -> None:
    with pytest.raises(UserError, match="standalone.*leave --trial out"):
        check_trial(fresh_standalone(target, layers=[0]))
    draft = TOYS.make_draft("fresh", target)
    with greedy_answers(target, draft.taps, PROMPTS[:3], 12) as (rows, store):
        with pytest.raises(UserError, match="needs 4 answers .* there are 3"):
            trial(target, draft, rows, store, 3)
        assert [len(part) for part in halves(rows)] == [2, 1]


# -- time ------------------------------------------------------------------------------------------------------------
def test_the_time_is_told_from_a_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that takes 2 s for the prompts, 0.5 s for each token of a batch and 0.1 s for one alone."""
    clock = SimpleNamespace(now=0.0)

    def generate(target: Any, requests: Any, tokens: int) -> Any:
        clock.now += 2 + (tokens - 1) * (0.5 if len(requests) > 1 else 0.1)
        return iter(())

    monkeypatch.setattr(advice, "generate", generate)
    monkeypatch.setattr(advice, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    found = first_batch(None, PROMPTS, 64)  # type: ignore[arg-type]
    assert (found.batch, found.prompts) == (6, pytest.approx(2))
    assert (found.single, found.step) == (pytest.approx(0.1), pytest.approx(0.5))
    timing = TIMED_PROMPTS * TIMED_TOKENS * 2 * 0.1
    assert expected_seconds(found, 6, 64, 1, 1) == pytest.approx(2 + 64 * 0.5 + timing)
    assert expected_seconds(found, 6, 64, 2, 2) == pytest.approx(2 * (2 + 64 * 0.5) + 2 * timing)
    # More prompts than are answered at once come in waves.
    assert expected_seconds(found, 13, 64, 1, 1) == pytest.approx(3 * (2 + 64 * 0.5) + timing)
    # A trial: so many generated tokens for every token that may be trained on.
    trained = 0.3 * 6 * 64 * found.token(64)
    assert expected_seconds(found, 6, 64, 1, 1, 0.3) == pytest.approx(2 + 64 * 0.5 + timing + trained)


def test_a_step_of_many_answers_is_shared_by_them() -> None:
    """0.1 s alone, 0.5 s for five: 0.1 s more for each, so 6.4 s for 64; and the prompt, by the token."""
    assert Pace(5, 2.0, 0.1, 0.5).token(50.0) == pytest.approx(6.4 / 64 + 2.0 / 5 / 50)
    # What costs no more for five costs no more for 64.
    assert Pace(5, 0.0, 0.5, 0.5).token(50.0) == pytest.approx(0.5 / 64)


def test_plain_decoding_and_rounds_count_in_their_fastest_types(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"half": (0.010, 0.030), "whole": (0.020, 0.024)}
    monkeypatch.setattr(advice, "_timed", lambda target, *_: seconds[target])
    found = round_cost({"bfloat16": "half", "float32": "whole"}, None, [], 3)  # type: ignore[dict-item, arg-type]
    assert (found.plain, found.round) == (0.010, 0.024) and found.cost == pytest.approx(2.4)
    assert (found.plain_type, found.round_type) == ("bfloat16", "float32")
    # Without a draft where that is faster.
    assert found.per_token(2.0) == 0.010 and found.per_token(3.0) == pytest.approx(0.008)


def test_an_adaptation_costs_its_answers_and_its_passes() -> None:
    evidence = shipped()
    pace, tokens = Pace(64, 0.0, 0.1, 0.64), ADAPT_ANSWERS * 50
    training = evidence.training(0.1) * 0.01
    assert adaptation_seconds(50.0, None, evidence, pace, 0.1) == pytest.approx(
        tokens * (0.01 + ADAPT_PASSES * training)
    )
    tried = Trial({}, 8, tokens=2000, seconds=10.0)
    assert adaptation_seconds(50.0, tried, evidence, pace, 0.1) == pytest.approx(tokens * (0.01 + ADAPT_PASSES * 0.005))


# -- the whole -------------------------------------------------------------------------------------------------------
def test_a_probe_with_a_trial_says_what_it_saw(target: Any) -> None:
    draft, said = TOYS.make_draft("fresh", target), list[str]()
    stated = {"value": 1.5, "low": 1.4, "high": 1.6}
    found = probe(
        target, draft, PROMPTS, 3, 12, known_reference=stated, known_gamma=5, with_trial=True, say=said.append
    )
    assert len(said) == 1 and said[0].startswith("this takes about")
    # A chain of five is no reference for one of three.
    assert found.reference_tau == pytest.approx({end: same_chain(tau, 5, 3) for end, tau in stated.items()})
    assert "from a chain of 5" in found.reference and found.forecast is not None and found.trial_tau is not None
    assert found.tau["value"] <= found.forecast["low"] <= found.forecast["value"] <= found.forecast["high"] <= 4
    lines = found.lines()
    assert "trial adaptation" in lines and "targets whose outcome is known" in lines["when aligned"]
    assert ("break-even" in lines) == (found.action != "leave")
    assert ("slower than plain decoding" in lines["speed-up now"]) == (found.speedup_now <= 1)


def test_a_record_that_cannot_be_is_named(target: Any) -> None:
    stated = {"value": 7.5, "low": 7.0, "high": 8.0}
    with pytest.raises(UserError, match="a chain of 5 has a tau from 1 to 6, not 7.5; give --base-target"):
        probe(target, TOYS.make_draft("fresh", target), PROMPTS[:3], 3, 12, known_reference=stated, known_gamma=5)


def test_a_family_without_evidence_has_no_forecast(target: Any) -> None:
    draft = fresh("eagle1", target, range(100), seed=1)
    found = probe(target, draft, PROMPTS[:3], 2, 12)
    assert found.forecast is None and found.gain is None and found.break_even is None and found.action == "try"
    assert "fitted on eagle3 drafts" in found.lines()["when aligned"]
