"""What alignment will make of acceptance: a forecast with an interval, fitted on targets whose outcome is known.

A chain of gamma tokens whose proposals are each right with probability a, whatever the place, gives
tau = 1 + a + ... + a^gamma; so every tau has one rate a at its gamma, and every rate a tau at any other gamma. The
outcome of a target is the step of logit(a) from the old draft to the aligned one, which no forecast can carry past
gamma + 1. Steps are above zero (alignment keeps the old draft where nothing is gained), and the larger they are the
less they are known: the logarithm of a step is a linear function of a few observations, by least squares. The interval
is that of a new observation under Student's t, made wider by what leaving every target out in turn showed it to lack.

The evidence, its coefficients and how they did on targets that they were not fitted on come from
benchmarks/forecast.py and ship as assets/forecast.json (docs/metrics.md).

Shape legend: N targets, F observations and a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

Array = npt.NDArray[np.float64]

# Two-sided 90% points of Student's t for 1, 2, ... degrees of freedom; the last one stands for all beyond.
T_90 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753, 1.746)
# How far beyond the evidence an observation may lie, in widths of its range.
REACH = 0.5
# A draft that is never, or always, right has no finite logit.
LEAST_RATE, MOST_RATE = 0.01, 0.99


# -- acceptance of a chain -------------------------------------------------------------------------------------------
def chain_tau(rate: float, gamma: int) -> float:
    """tau of a chain of ``gamma`` whose proposals are each right with probability ``rate``."""
    return math.fsum(rate**place for place in range(gamma + 1))


def chain_rate(tau: float, gamma: int) -> float:
    """The ``rate`` at which :func:`chain_tau` is ``tau``, kept within what has a finite logit.

    Raises ``ValueError`` for a tau that no chain of ``gamma`` has.
    """
    if not 1 <= tau <= gamma + 1:
        raise ValueError(f"a chain of {gamma} has a tau from 1 to {gamma + 1}, not {tau}")
    low, high = LEAST_RATE, MOST_RATE
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if chain_tau(middle, gamma) < tau else (low, middle)
    return (low + high) / 2


def logit(tau: float, gamma: int) -> float:
    """logit of the rate behind a tau; -4.6 to 4.6."""
    rate = chain_rate(tau, gamma)
    return math.log(rate / (1 - rate))


def stepped(tau: float, gamma: int, step: float) -> float:
    """The tau whose logit is ``step`` above that of ``tau``."""
    return chain_tau(1 / (1 + math.exp(-logit(tau, gamma) - step)), gamma)


def same_chain(tau: float, gamma: int, other: int) -> float:
    """The tau of a chain of ``other`` with the rate that ``tau`` is at a chain of ``gamma``."""
    return chain_tau(chain_rate(tau, gamma), other)


# -- what a probe sees -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Seen:
    """A draft before alignment: tau on the target's answers, on its base target's, and after a trial adaptation, all of
    greedy chains of ``gamma``; what was not measured is None."""

    gamma: int
    tau: float
    reference_tau: float | None = None
    trial_tau: float | None = None

    def observations(self) -> dict[str, float | None]:
        """By name: the draft's own ``level``, that on its ``base`` target, what it ``lost`` between the two, and what
        a ``trial`` brought; all of them logits."""
        level = logit(self.tau, self.gamma)
        base, tried = (None if tau is None else logit(tau, self.gamma) for tau in (self.reference_tau, self.trial_tau))
        lost, trial = (None if other is None else other - level for other in (base, tried))
        return {"level": level, "base": base, "lost": lost, "trial": trial}


def observed(seen: Seen, names: Sequence[str]) -> Array | None:
    """A constant and the named observations, [F]; None where one was not measured."""
    known = seen.observations()
    values = [value for name in names if (value := known[name]) is not None]
    return np.array([1.0, *values]) if len(values) == len(names) else None


# -- the fit ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fit:
    """``log(step) = coefficients . observations``, with what its interval is made of.

    ``ranges`` are the least and the greatest of every observation in the evidence: what lies beyond counts as the
    nearer one, and what lies further off (:data:`REACH`) has no forecast. So it is with ``guards``, observations that
    only say whether the draft is like those of the evidence; their ranges come last. ``gram`` is the inverse of X'X
    [F, F], ``spread`` the residual standard deviation, ``widened`` how many times wider than Student's interval the
    forecast's is. ``held`` of ``targets`` outcomes lay in that of a fit without them.
    """

    observations: tuple[str, ...]
    guards: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]
    coefficients: tuple[float, ...]
    gram: tuple[tuple[float, ...], ...]
    spread: float
    targets: int
    widened: float = 1.0
    held: int = 0

    def log_step(self, seen: Seen) -> tuple[float, float] | None:
        """(log of the step, half the width of its interval); None where an observation is missing or far off."""
        all_F = observed(seen, (*self.observations, *self.guards))
        if all_F is None:
            return None
        for place, (low, high) in enumerate(self.ranges, 1):
            if not low - REACH * (high - low) <= all_F[place] <= high + REACH * (high - low):
                return None
            all_F[place] = min(max(all_F[place], low), high)
        x_F = all_F[: 1 + len(self.observations)]
        free = self.targets - len(x_F)
        point = T_90[min(free, len(T_90)) - 1]
        distance = float(x_F @ np.array(self.gram) @ x_F)
        return float(x_F @ np.array(self.coefficients)), self.widened * point * self.spread * math.sqrt(1 + distance)

    def forecast(self, seen: Seen) -> dict[str, float] | None:
        """tau after alignment with its interval, of a chain of the gamma that was seen; None as in :meth:`log_step`.

        What the draft reached on its base target is within its reach again, so that the upper end is no lower.
        """
        found = self.log_step(seen)
        if found is None:
            return None
        log, half = found
        ends = {"value": log, "low": log - half, "high": log + half}
        # A draft that is all but never wrong has no room for a step.
        found_tau = {name: max(seen.tau, stepped(seen.tau, seen.gamma, math.exp(end))) for name, end in ends.items()}
        return found_tau | {"high": max(found_tau["high"], seen.reference_tau or 0.0)}

    def sentence(self) -> str:
        """Where the forecast comes from, for the terminal."""
        return (
            f"a forecast from {self.targets} targets whose outcome is known; fitted without each, "
            f"the interval held {self.held} of them"
        )


# -- what ships ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Evidence:
    """The shipped fits, the one with the narrowest intervals first, for drafts of ``families``.

    ``training_cost`` is the seconds of a trained position over those of a generated token in the committed runs, whose
    drafts have ``draft_share`` of the target's parameters; ``trial_passes`` how often a trial sees a position.
    """

    families: tuple[str, ...]
    fits: tuple[Fit, ...]
    training_cost: float
    draft_share: float
    trial_passes: float

    def fit_for(self, seen: Seen) -> Fit | None:
        """The first fit that has a forecast for this; the last one, which asks for nothing, always has."""
        return next((fit for fit in self.fits if fit.log_step(seen) is not None), None)

    def training(self, share: float) -> float:
        """Generated tokens that a trained position costs, of a draft with this ``share`` of the target's parameters."""
        return self.training_cost * share / self.draft_share


@cache
def shipped() -> Evidence:
    """The evidence in assets/forecast.json."""
    return TypeAdapter(Evidence).validate_json((files("redraft") / "assets" / "forecast.json").read_bytes())
