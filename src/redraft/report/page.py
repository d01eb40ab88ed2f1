"""The report: one HTML file that needs nothing else, and the headline picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redraft.errors import UserError
from redraft.report import format as form
from redraft.report import plots
from redraft.report.costs import round_cost
from redraft.report.load import (
    BenchResult,
    Costs,
    CurvePoint,
    DraftResult,
    Interval,
    Stage,
    Summary,
    read_bench,
    read_curve,
    read_ledger,
    read_summary,
)


def build_report(
    results: Sequence[Path],
    out: Path,
    curve: Path | None = None,
    ledger: Path | None = None,
    summary: Path | None = None,
    title: str = "Draft alignment report",
) -> Path:
    """Write the page of one or more benchmark results to ``out`` and return ``out``.

    ``curve`` is a training curve (JSONL), ``ledger`` a cost ledger, ``summary`` a quickstart summary; each adds its
    section. Nothing is fetched, neither now nor when the page is opened. Raises ``UserError`` that names the file
    when an input is unreadable, of another schema or broken, or when ``out`` cannot be written.
    """
    if not results:
        raise UserError("a report needs at least one result file of `redraft bench`")
    loaded = [(path, read_bench(path)) for path in results]
    points = read_curve(curve) if curve else []
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            sections=[_section(index, path, result) for index, (path, result) in enumerate(loaded)],
            several=len(loaded) > 1,
            training=_training(points, loaded[0][1]),
            ledger=_ledger(read_ledger(ledger)) if ledger else None,
            summary=_summary(read_summary(summary)) if summary else None,
        )
    )
    from redraft.artifact import atomic_write_text

    atomic_write_text(out, page)
    return out


def headline_png(result: Path, out: Path) -> Path:
    """Write the headline picture (acceptance length and speed-up with intervals, on white) and return ``out``."""
    from redraft.artifact import atomic_write_bytes

    atomic_write_bytes(out, plots.headline_figure_png(read_bench(result)))
    return out


def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise UserError("reports need matplotlib and jinja2: pip install 'redraft[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("redraft.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        num=form.number,
        bounds=form.bounds,
        percent=form.percent,
        times=form.times,
        count=form.count,
        duration=form.duration,
    )
    return environment


def _section(index: int, path: Path, result: BenchResult) -> dict[str, Any]:
    """What the template shows of one result."""
    name = f"r{index}"
    costs = {key: round_cost(result, draft) for key, draft in result.drafts.items()}
    return {
        "name": name,
        "file": path.name,
        "setup": result.setup,
        "sampler": sampler_line(result),
        "plain": result.plain,
        "drafts": result.drafts,
        "colours": plots.series_colours(list(result.drafts)),
        "tiles": _tiles(result),
        "gains": _gains(result),
        "headline": plots.headline_svgs(result, name),
        "acceptance": plots.acceptance_svgs(result, name),
        "time": plots.time_svg(result, name),
        "costs": costs,
        "provenance": json.dumps(result.provenance, indent=2, ensure_ascii=False, default=str),
    }


def sampler_line(result: BenchResult) -> str:
    """How the figures were taken: sampler, proposal shape, prompts, batch size."""
    s = result.setup
    return (
        f"{s.sampler}, {s.shape} of {s.gamma}, {s.prompts} prompts, up to {s.max_new_tokens} new tokens, "
        f"batch {s.batch}, seed {s.seed}"
    )


def first_and_last(result: BenchResult) -> tuple[str, str]:
    """The drafts that the headline compares: stale and aligned where they are, else the first and the last."""
    names = list(result.drafts)
    return ("stale" if "stale" in names else names[0]), ("aligned" if "aligned" in names else names[-1])


def _tiles(result: BenchResult) -> list[dict[str, Any]]:
    """The headline figures: before, after, and the interval of after."""
    before, after = first_and_last(result)
    drafts = result.drafts

    def tile(label: str, pick: Any, unit: str, digits: int = 2) -> dict[str, Any]:
        old: Interval | None = pick(drafts[before]) if before != after else None
        new: Interval = pick(drafts[after])
        return {
            "label": label,
            "unit": unit,
            "before_name": before,
            "after_name": after,
            "before": form.number(old.value, digits) if old else None,
            "before_bounds": form.bounds(old, digits),
            "after": form.number(new.value, digits),
            "after_bounds": form.bounds(new, digits),
        }

    def tau(draft: DraftResult) -> Interval:
        return draft.tau_pooled

    return [
        tile("acceptance length, tokens a round", tau, ""),
        tile(
            f"speed-up over the fastest plain decoding ({result.plain.fastest})",
            lambda d: d.speedup,
            "\N{MULTIPLICATION SIGN}",
        ),
        tile("tokens a second", lambda d: d.tokens_per_second, "", 1),
    ]


def _gains(result: BenchResult) -> list[str]:
    """One sentence a measured gain, with its paired interval."""
    words = {"tau": "acceptance length higher by {}", "speed": "{} times the tokens a second"}
    return [
        f"{pair}: {words.get(kind, kind + ' {}').format(form.number(gain.value))} (95% interval {form.bounds(gain)})"
        for pair, kinds in result.gains.items()
        for kind, gain in kinds.items()
    ]


def _training(points: list[CurvePoint], result: BenchResult) -> dict[str, Any] | None:
    """The training section; nothing for an empty curve. ``heldout_tau`` of step 0 is the stale draft's where given."""
    if not points:
        return None
    stale = None
    if points[0].step == 0 and points[0].heldout_tau is not None:
        stale = ("before training", points[0].heldout_tau)
    elif "stale" in result.drafts:
        stale = ("stale draft, on the benchmark's prompts", result.drafts["stale"].tau_pooled.value)
    held = [p.heldout_tau for p in points if p.heldout_tau is not None]
    return {
        "pictures": plots.training_svgs(points, stale),
        "steps": points[-1].step,
        "tokens": form.scaled(points[-1].tokens, ""),
        "time": form.duration(points[-1].seconds),
        "best": form.number(max(held)) if held else None,
    }


def _ledger(costs: Costs) -> dict[str, Any]:
    return {"rows": [ledger_cells(stage) for stage in costs.stages], "total": ledger_cells(total_of(costs))}


def total_of(costs: Costs) -> Stage:
    """Sums of the ledger; the peak memory is the largest, not the sum."""

    def add(field: str) -> Any:
        return sum(getattr(stage, field) or 0 for stage in costs.stages)

    return Stage(
        stage="total",
        tokens=add("tokens"),
        flops=add("flops"),
        seconds=add("seconds"),
        bytes_written=add("bytes_written"),
        peak_memory_bytes=max((s.peak_memory_bytes or 0 for s in costs.stages), default=0) or None,
    )


def ledger_cells(stage: Stage) -> dict[str, str]:
    """One stage of the ledger as text."""
    return {
        "stage": stage.stage,
        "tokens": form.count(stage.tokens),
        "flops": form.scaled(stage.flops, "FLOP"),
        "time": form.duration(stage.seconds),
        "memory": form.scaled(stage.peak_memory_bytes, "B"),
        "written": form.scaled(stage.bytes_written, "B"),
        "formula": stage.formula or "",
    }


def recovery(summary: Summary) -> float | None:
    """(aligned - stale) / (full - stale) of tau, from one run alone: figures of two runs are not paired.

    None when one is missing, comes from elsewhere, or full gained nothing.
    """
    if summary.tau_full_from:
        return None
    stale, aligned, full = (summary.tau.get(name) for name in ("stale", "aligned", "full"))
    if stale is None or aligned is None or full is None or full <= stale:
        return None
    return (aligned - stale) / (full - stale)


def _summary(summary: Summary) -> list[tuple[str, str]]:
    """The quickstart's own lines: recovery, trained share, minutes, and any note it carries."""
    share = recovery(summary)
    lines = [("acceptance length after training every weight", form.number(summary.tau.get("full")))]
    if summary.tau_full_from:
        lines.append(("where that comes from", summary.tau_full_from))
    if share is not None:
        lines.append(("share of that gain recovered", form.percent(share)))
    lines += [
        ("trained parameters, of those that full training changes", form.percent(summary.trained_fraction_of_full, 1)),
        ("minutes from start to end", form.number(summary.minutes, 1)),
    ]
    extra = summary.model_extra or {}
    return lines + [(key.replace("_", " "), value) for key, value in extra.items() if isinstance(value, str)]
