"""The report: one HTML file that needs nothing else and fetches nothing, and the headline picture.

A content security policy in the page allows its own styles and the one script whose hash it names: text out of a
result (a token may be ``</script>``) could not run or fetch anything even if it were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from redraft.errors import UserError
from redraft.files import atomic_write_bytes, atomic_write_text
from redraft.reports import format as form
from redraft.reports import plots, sections, tokens
from redraft.reports.load import BenchResult, Costs, Summary, read_as, read_bench, read_curve


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
    script = _static("script.js")
    page = _environment().get_template("report.html.j2")
    text = page.render(
        title=title,
        style=_static("style.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        results=[_section(index, path, result) for index, (path, result) in enumerate(loaded)],
        several=len(loaded) > 1,
        training=sections.training(read_curve(curve), loaded[0][1]) if curve else None,
        ledger=sections.ledger_rows(read_as(Costs, ledger)) if ledger else None,
        summary=sections.summary_lines(read_as(Summary, summary)) if summary else None,
    )
    # A result may hold halves of surrogate pairs, which UTF-8 has no bytes for.
    atomic_write_text(out, text.encode("utf-8", "replace").decode("utf-8"))
    return out


def headline_png(result: Path, out: Path) -> Path:
    """Write the headline picture (acceptance length and speed-up with intervals, on white) and return ``out``."""
    atomic_write_bytes(out, plots.headline_figure_png(read_bench(result)))
    return out


def _static(name: str) -> str:
    return (resources.files("redraft.reports") / "templates" / name).read_text(encoding="utf-8").strip() + "\n"


def _told(value: Any) -> Any:
    """What a page shows of a text that is no markup of ours: characters that act are spelled out."""
    return tokens.visible_text(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise UserError("reports need matplotlib and jinja2: pip install 'redraft[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("redraft.reports"),
        autoescape=True,
        finalize=_told,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(plots=plots, sections=sections, tokens=tokens)
    environment.filters["num"] = form.number
    for found in (form.bounds, form.percent, form.times, form.count, form.duration, form.scaled):
        environment.filters[found.__name__] = found
    environment.filters.update(visible=tokens.visible, visible_text=tokens.visible_text)
    return environment


def _section(index: int, path: Path, result: BenchResult) -> dict[str, Any]:
    """What the template shows of one result, and cannot ask :mod:`sections` and :mod:`plots` for on the spot."""
    name = f"r{index}"
    return {
        "name": name,
        "file": path.name,
        "result": result,
        "drafts": result.drafts,
        "colours": plots.result_colours(result),
        "tasks": sections.tasks(result),
        "traces": result.traces,
        "acceptance": plots.acceptance_svgs(result, name),
        "costs": sections.round_costs(result),
        "levels": result.server.levels if result.server else [],
        "quality": sections.quality(result),
        "divergences": {key: d.divergence for key, d in result.drafts.items() if d.divergence},
        "provenance": json.dumps(result.provenance, indent=2, ensure_ascii=False, default=str),
    }
