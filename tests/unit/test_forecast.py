"""The forecast of what alignment brings: its arithmetic, its interval, and that what ships follows from the results."""

from __future__ import annotations

import json
import math
import runpy
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.evaluate.forecast import T_90, Seen, chain_rate, chain_tau, logit, same_chain, shipped, stepped

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "forecast.py")))
Known, least_squares, leave_one_out, calibrated = (
    SCRIPT.Known,
    SCRIPT.least_squares,
    SCRIPT.leave_one_out,
    SCRIPT.calibrated,
)


def known(name: str, tau: float, reference: float, step: float) -> Any:
    return Known(name, Seen(3, tau, reference), stepped(tau, 3, step))


def spread_out(steps: list[float]) -> list[Any]:
    """Targets of different levels and losses with these steps."""
    return [known(f"t{i}", 1.5 + 0.07 * i, 2.2 - 0.03 * i**1.5, step) for i, step in enumerate(steps)]


# -- acceptance of a chain -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gamma", [1, 3, 7])
@pytest.mark.parametrize("rate", [0.02, 0.4, 0.97])
def test_a_tau_and_its_rate_belong_together(rate: float, gamma: int) -> None:
    tau = chain_tau(rate, gamma)
    assert tau == pytest.approx((1 - rate ** (gamma + 1)) / (1 - rate))
    assert chain_rate(tau, gamma) == pytest.approx(rate)
    assert same_chain(tau, gamma, gamma + 2) == pytest.approx(chain_tau(rate, gamma + 2))


def test_no_step_leaves_what_a_chain_can_do() -> None:
    assert stepped(2.0, 3, 0) == pytest.approx(2.0)
    assert 2.0 < stepped(2.0, 3, 1) < stepped(2.0, 3, 50) <= 4
    for tau in (0.9, 4.1):
        with pytest.raises(ValueError, match="from 1 to 4"):
            chain_rate(tau, 3)
    # The ends have finite logits.
    assert math.isfinite(logit(1.0, 3)) and math.isfinite(logit(4.0, 3))


# -- the fit ---------------------------------------------------------------------------------------------------------
def test_the_fit_finds_what_made_the_steps() -> None:
    seen = [Seen(3, 1.5 + 0.1 * i, 2.4 - 0.02 * i * i) for i in range(6)]
    lost = [logit(s.reference_tau or 0, 3) - logit(s.tau, 3) for s in seen]
    rows = [
        Known(str(i), s, stepped(s.tau, 3, math.exp(-1.5 + 0.8 * x)))
        for i, (s, x) in enumerate(zip(seen, lost, strict=True))
    ]
    fit = least_squares(rows, ("lost",))
    assert fit.coefficients == pytest.approx((-1.5, 0.8)) and fit.spread == pytest.approx(0, abs=1e-6)
    found = fit.forecast(rows[2].seen)
    assert found is not None
    assert found["low"] == pytest.approx(found["value"]) == pytest.approx(rows[2].aligned_tau)
    # What was not measured cannot be used.
    assert fit.forecast(replace(rows[2].seen, reference_tau=None)) is None


def test_the_interval_is_that_of_one_more_observation() -> None:
    """Of a constant: mean and t times s times the root of 1 + 1/n, by hand."""
    steps = [0.2, 0.3, 0.5, 0.9]
    logs = [math.log(step) for step in steps]
    mean = sum(logs) / 4
    deviation = math.sqrt(sum((value - mean) ** 2 for value in logs) / 3)
    found = least_squares(spread_out(steps), ()).log_step(Seen(3, 1.7))
    assert found is not None
    assert found[0] == pytest.approx(mean, abs=1e-6)
    assert found[1] == pytest.approx(T_90[2] * deviation * math.sqrt(1.25), abs=1e-6)


def test_nothing_is_extrapolated() -> None:
    """A little beyond the evidence counts as its end, further off there is no forecast; a guard has no coefficient."""
    rows = spread_out([0.6, 0.5, 0.5, 0.3, 0.2])
    fit = least_squares(rows, ("level",), ("base",))
    assert len(fit.coefficients) == 2 and len(fit.ranges) == 2
    (low, high), _ = fit.ranges
    edge, reference = rows[-1].seen, rows[2].seen.reference_tau
    inside = fit.log_step(replace(edge, reference_tau=reference))
    beyond = Seen(3, stepped(edge.tau, 3, 0.4 * (high - low)), reference)
    assert fit.log_step(beyond) == pytest.approx(inside)
    assert fit.log_step(Seen(3, stepped(edge.tau, 3, 0.6 * (high - low)), reference)) is None
    assert (
        fit.log_step(replace(edge, reference_tau=3.8)) is None
        and fit.log_step(replace(edge, reference_tau=None)) is None
    )


def test_what_the_base_pair_reached_is_within_reach() -> None:
    fit = least_squares(spread_out([0.05, 0.05, 0.051, 0.05]), ())
    found = fit.forecast(Seen(3, 1.5, 2.5))
    assert found is not None and found["value"] < 1.6 and found["high"] == 2.5


def test_a_target_that_is_left_out_plays_no_part_in_its_forecast() -> None:
    rows = spread_out([0.2, 0.4, 0.3, 0.6, 0.5])
    changed = [*rows[:2], known("t2", rows[2].seen.tau, rows[2].seen.reference_tau or 0, 2.0), *rows[3:]]
    before, after = (leave_one_out(some, ("level",)) for some in (rows, changed))
    assert before[2]["predicted"] == after[2]["predicted"] and before[2]["half"] == after[2]["half"]
    assert before[2]["log_step"] != after[2]["log_step"] and before[1]["predicted"] != after[1]["predicted"]


def test_intervals_are_widened_until_nine_of_ten_hold() -> None:
    calm = [0.3, 0.31, 0.29, 0.3, 0.32, 0.3, 0.31, 0.29, 0.3, 0.31]
    one, two = ([*calm[: 10 - n], *([3.0, 0.05][:n])] for n in (1, 2))
    # One stray of ten may stay outside; of two the nearer one may not.
    fit = calibrated(spread_out(one), ())
    assert fit.widened == 1 and fit.held == 9
    fit = calibrated(spread_out(two), ())
    assert fit.widened > 1 and fit.held == 9


def test_nothing_gained_is_the_least_step() -> None:
    assert Known("worse", Seen(3, 2.0), 1.9).step == SCRIPT.LEAST_STEP


def test_too_few_targets_are_no_evidence() -> None:
    with pytest.raises(ValueError, match="3 targets are too few"):
        least_squares(spread_out([0.2, 0.3, 0.4]), ("level", "lost"))


# -- what ships ------------------------------------------------------------------------------------------------------
def test_what_ships_follows_from_the_committed_results() -> None:
    ships, record = (json.loads(json.dumps(part)) for part in SCRIPT.evidence())
    stored = json.loads((files("redraft") / "assets" / "forecast.json").read_text())
    kept = json.loads((ROOT / "benchmarks" / "results" / "forecast.json").read_text())
    for made, found in ((ships, stored), (record, kept)):
        assert made["provenance"] == found["provenance"]
        assert _numbers(made) == pytest.approx(_numbers(found), rel=1e-6)
    assert SCRIPT.table(kept) in (ROOT / "docs" / "metrics.md").read_text()


def _numbers(value: object) -> list[float]:
    """Every number of a JSON value, in order."""
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in _numbers(value[key])]
    if isinstance(value, list):
        return [number for part in value for number in _numbers(part)]
    return [float(value)] if isinstance(value, int | float) else []


def test_the_shipped_intervals_held() -> None:
    for fit in shipped().fits:
        assert fit.held >= SCRIPT.WANTED * fit.targets


def test_the_shipped_forecast_knows_what_it_was_told() -> None:
    """The lower the draft stands, the more there is to win; the base pair's own acceptance is within reach."""
    evidence, steps = shipped(), list[float]()
    for tau in (1.6, 1.8, 2.0):
        fit = evidence.fit_for(Seen(3, tau, 2.05))
        assert fit is not None and fit.observations == ("level",)
        forecast = fit.forecast(Seen(3, tau, 2.05))
        assert forecast is not None and tau < forecast["low"] < forecast["value"] < forecast["high"] < 4
        assert forecast["high"] >= 2.05
        steps.append(logit(forecast["value"], 3) - logit(tau, 3))
    assert steps == sorted(steps, reverse=True)
    assert evidence.training(2 * evidence.draft_share) == pytest.approx(2 * evidence.training_cost)


@pytest.mark.parametrize("seen", [Seen(3, 1.8), Seen(3, 1.8, 3.4), Seen(3, 3.1, 3.4), Seen(3, 1.05, 2.05)])
def test_a_draft_unlike_the_evidence_has_the_widest_interval(seen: Seen) -> None:
    """Without its base pair, with a better one, far above or far below all that was seen."""
    first, *_, last = shipped().fits
    fit = shipped().fit_for(seen)
    assert fit is last and fit.observations == () and first.log_step(seen) is None
    found = fit.forecast(seen)
    assert found is not None and found["high"] >= (seen.reference_tau or 0)
    near = first.log_step(Seen(3, 1.8, 2.05))
    assert near is not None and near[1] < (fit.log_step(seen) or (0, 0))[1]
