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
from redraft.reports.costs import round_costs
from redraft.reports.drawing import PHASES, series_colours
from redraft.reports.load import BenchResult, CurvePoint, Trace, read_bench, read_curve, read_ledger, read_summary

# Anchor of a result's part: what it needs, and what the list of contents calls it.
PARTS = {
    "drafts": ("drafts", "Drafts"),
    "tasks": ("tasks", "By task"),
    "tokens": ("traces", "Who proposed which token"),
    "acceptance": ("acceptance", "Acceptance by position"),
    "time": ("costs", "Where the time goes"),
    "server": ("levels", "Under load"),
    "quality": ("quality", "Quality guard"),
    "divergence": ("divergences", "Near-ties"),
}


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
    script = _static("script.js")
    content: dict[str, Any] = {
        "title": title,
        "style": _static("style.css"),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "sections": [_section(index, path, result) for index, (path, result) in enumerate(loaded)],
        "several": len(loaded) > 1,
        "token_kinds": tokens.KINDS,
        "training": _training(points, loaded[0][1]),
        "ledger": sections.ledger_rows(read_ledger(ledger)) if ledger else None,
        "summary": sections.summary_lines(read_summary(summary)) if summary else None,
    }
    page = _environment().get_template("report.html.j2").render(**content, contents=_contents(content))
    # A result may hold halves of surrogate pairs, which UTF-8 has no bytes for.
    atomic_write_text(out, page.encode("utf-8", "replace").decode("utf-8"))
    return out


def _contents(content: dict[str, Any]) -> list[tuple[str, str]]:
    """(anchor, words) of what the page holds, in its order; several results are named and not taken apart."""
    found = []
    if content["several"]:
        found += [(s["name"], s["file"]) for s in content["sections"]]
    else:
        (s,) = content["sections"]
        found += [(f"{s['name']}-{key}", words) for key, (part, words) in PARTS.items() if s[part]]
    parts = {"summary": "everything", "training": "training", "ledger": "cost"}
    words = {"everything": "Against training everything", "training": "Training", "cost": "What it cost"}
    found += [(anchor, words[anchor]) for part, anchor in parts.items() if content[part]]
    return [*found, ("provenance", "Provenance")]


def headline_png(result: Path, out: Path) -> Path:
    """Write the headline picture (acceptance length and speed-up with intervals, on white) and return ``out``."""
    atomic_write_bytes(out, plots.headline_figure_png(read_bench(result)))
    return out


def _static(name: str) -> str:
    return (resources.files("redraft.reports") / "templates" / name).read_text(encoding="utf-8").strip() + "\n"


def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise UserError("reports need matplotlib and jinja2: pip install 'redraft[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("redraft.reports"),
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
        scaled=form.scaled,
        visible=tokens.visible,
        visible_text=tokens.visible_text,
    )
    return environment


def _section(index: int, path: Path, result: BenchResult) -> dict[str, Any]:
    """What the template shows of one result."""
    name = f"r{index}"
    colours = _colours(result)
    scores = sections.quality(result)
    return {
        "name": name,
        "file": path.name,
        "result": result,
        "setup": result.setup,
        "sampler": sections.sampler_line(result),
        "plain": result.plain,
        "drafts": result.drafts,
        "colours": colours,
        "tiles": sections.tiles(result),
        "gains": sections.gains(result),
        "slower": sections.slower(result),
        "others_apart": sections.others_apart(result),
        "types_differ": sections.types_differ(result),
        "headline": plots.headline_svgs(result, name),
        "tasks": sections.tasks(result),
        "task_pictures": _task_pictures(result, name, colours),
        "traces": _traces(result),
        "positions": max((len(d.acceptance_unconditional) for d in result.drafts.values()), default=0),
        "mbsu": sections.mbsu(result),
        "acceptance": plots.acceptance_svgs(result, name),
        "time": plots.time_svg(result, name),
        "costs": round_costs(result),
        "levels": result.server.levels if result.server else [],
        "level_pictures": _level_pictures(result, name, colours),
        "quality": scores,
        "quality_verdict": sections.quality_verdict(scores),
        "quality_picture": _quality_picture(scores, name, colours),
        "divergences": {key: d.divergence for key, d in result.drafts.items() if d.divergence},
        "prompts": (prompts := sections.prompt_rows(result)),
        "prompt_tasks": any(row["task"] for row in prompts),
        "facts": sections.facts(result.provenance),
        "provenance": json.dumps(result.provenance, indent=2, ensure_ascii=False, default=str),
    }


def _colours(result: BenchResult) -> dict[str, str]:
    """A colour for plain decoding and for everything that any part of the result names."""
    names = [*result.drafts, *(key for trace in result.traces for key in trace.drafts)]
    names += [key for level in (result.server.levels if result.server else []) for key in level.contestants]
    return series_colours([name for name in dict.fromkeys(names) if name != "plain"]) | {"plain": PHASES["other"]}


def _task_pictures(result: BenchResult, name: str, colours: dict[str, str]) -> list[str]:
    """tau by task, and the speed-up (tokens a second without a baseline) by task."""
    pictures = []
    if groups := sections.task_figures(result, "tau_pooled"):
        pictures.append(plots.grouped_svg(groups, colours, "acceptance length by task", f"{name}-task-tau"))
    if groups := sections.task_figures(result, "speedup"):
        pictures.append(plots.grouped_svg(groups, colours, "speed-up by task", f"{name}-task-speed", line=1.0))
    elif groups := sections.task_figures(result, "tokens_per_second"):
        pictures.append(plots.grouped_svg(groups, colours, "tokens a second by task", f"{name}-task-speed"))
    return pictures


def _level_pictures(result: BenchResult, name: str, colours: dict[str, str]) -> list[str]:
    titles = {"tokens_per_second": "tokens a second, all requests", "ttft": "median time to the first token, s"}
    return [
        plots.lines_svg(curves, colours, titles[field], "requests under way", f"{name}-level-{field}")
        for field, curves in sections.levels(result).items()
    ]


def _quality_picture(scores: dict[str, Any], name: str, colours: dict[str, str]) -> str | None:
    groups = {task: {key: s.score for key, s in by_name.items() if s.score} for task, by_name in scores.items()}
    groups = {task: figures for task, figures in groups.items() if figures}
    return plots.grouped_svg(groups, colours, "score by task", f"{name}-quality") if groups else None


def _traces(result: BenchResult) -> dict[str, Any] | None:
    """The token view: the traces that fit the page, and how many the file holds."""
    shown = tokens.chosen(result.traces)
    if not shown:
        return None
    return {"shown": [_trace(trace, sections.is_tree(result)) for trace in shown], "total": len(result.traces)}


def _trace(trace: Trace, tree: bool) -> dict[str, Any]:
    views = [tokens.draft_view(name, draft, tree) for name, draft in trace.drafts.items()]
    prompt = trace.prompt.strip()
    return {
        "id": trace.id,
        "task": trace.task,
        "prompt": prompt[: tokens.MAX_PROMPT],
        "prompt_cut": len(prompt) > tokens.MAX_PROMPT,
        "drafts": views,
        "rounds": max(len(view.rounds) for view in views),
    }


def _training(points: list[CurvePoint], result: BenchResult) -> dict[str, Any] | None:
    """The training section; nothing for an empty curve. The draft before training is step 0's, where that is known."""
    if not points:
        return None
    stale = None
    if points[0].step == 0 and points[0].heldout_tau is not None:
        stale = ("before training", points[0].heldout_tau)
    elif "stale" in result.drafts:
        stale = ("stale, in the benchmark", result.drafts["stale"].tau_pooled.value)
    held = [p for p in points if p.heldout_tau is not None]
    return {
        "pictures": plots.training_svgs(points, stale),
        "steps": points[-1].step,
        "tokens": form.scaled(points[-1].tokens, ""),
        "time": form.duration(points[-1].seconds),
        "best": form.number(max(p.heldout_tau or 0 for p in held)) if held else None,
        "rows": sections.thinned(held or points),
    }
