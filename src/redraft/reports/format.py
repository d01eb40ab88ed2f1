"""Figures as text: the same form on the page, in the pictures and in the terminal."""

from __future__ import annotations

import math

from redraft.reports.load import Interval

DASH = "\N{EN DASH}"
PREFIXES = "kMGTPE"


def missing(value: float | None) -> bool:
    """Whether there is no figure: absent, or not a number (a metric of nothing)."""
    return value is None or math.isnan(value)


def number(value: float | None, digits: int = 2) -> str:
    """A plain decimal; a dash when there is none."""
    return DASH if missing(value) else f"{value:.{digits}f}"


def bounds(interval: Interval | None, digits: int = 2) -> str:
    """The two ends of an interval, ``1.95 to 2.21``; empty when there is none, as over a single prompt."""
    if interval is None or missing(interval.low) or interval.low == interval.high:
        return ""
    return f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


def interval(figure: Interval) -> str:
    """`` (95% interval 1.95 to 2.21)``; empty when there is none."""
    ends = bounds(figure)
    return f" (95% interval {ends})" if ends else ""


def percent(value: float | None, digits: int = 0) -> str:
    """A share between 0 and 1 as a percentage."""
    return DASH if value is None or missing(value) else f"{100 * value:.{digits}f}%"


def times(value: float | None, digits: int = 2) -> str:
    """A ratio: ``1.83x`` with the multiplication sign."""
    return DASH if missing(value) else f"{value:.{digits}f}\N{MULTIPLICATION SIGN}"


def scaled(value: float | None, unit: str, base: int = 1000) -> str:
    """A large figure with a decimal prefix: ``1.2 TFLOP``, ``3.4 GB``, ``181 k``."""
    if value is None:
        return DASH
    power = 0
    while abs(value) >= base and power < len(PREFIXES):
        value, power = value / base, power + 1
    digits = 0 if not power or abs(value) >= 100 else 1
    return f"{value:.{digits}f} {PREFIXES[power - 1] if power else ''}{unit}".rstrip()


def count(value: int | None) -> str:
    """A whole number with thousands separated."""
    return DASH if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them: ``0.4 s``, ``48 s``, ``11 min 3 s``, ``2 h 5 min``."""
    if seconds is None:
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
