"""``probe``, ``bench`` and ``report``: is the draft any good, and how good."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redraft.cli.common import (
    Adapter,
    BaseDraft,
    BaseTarget,
    Command,
    Device,
    DraftName,
    Dtype,
    Gamma,
    OutFile,
    Prompts,
    Seed,
    TargetName,
    console,
    examples,
    say,
)
from redraft.errors import UserError


def register_probe(app: typer.Typer) -> None:
    """Add ``probe``, which stands early in the help, to ``app``."""
    app.command(
        cls=Command,
        epilog=examples(
            "redraft probe --target my-model --draft old-draft --prompts prompts.jsonl",
            "redraft probe --target my-model --draft old-draft --base-target base-model --prompts prompts.jsonl "
            "--limit 32 --json probe.json",
        ),
    )(probe)


def register(app: typer.Typer) -> None:
    """Add ``bench`` and ``report`` to ``app``."""
    app.command(
        cls=Command,
        epilog=examples(
            "redraft bench --target my-model --draft stale=old-draft --draft aligned=run/merged "
            "--prompts eval.jsonl --out bench.json",
            "redraft bench --target my-model --draft run/merged --temperature 0.7 --top-p 0.9 --prompts eval.jsonl "
            "--out bench.json",
        ),
    )(bench)
    app.command(
        cls=Command,
        epilog=examples(
            "redraft report bench.json --out report.html",
            "redraft report run/bench.json --curve run/train/curve.jsonl --ledger run/ledger.json --png headline.png "
            "--out report.html",
        ),
    )(report)


def probe(
    target: TargetName,
    draft: DraftName,
    prompts: Prompts,
    base_target: BaseTarget = None,
    base_draft: BaseDraft = None,
    limit: Annotated[int, typer.Option(min=2, help="How many of the prompts are asked.")] = 16,
    gamma: Gamma = 5,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 128,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    adapter: Adapter = None,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Say in a minute whether the present draft is healthy or stale, and whether aligning it is worth it."""
    from redraft.artifact import atomic_write_json
    from redraft.pipeline.steps import TargetSpec, probe_files
    from redraft.report.tables import probe_panel

    found = probe_files(
        TargetSpec(target, dtype, device, adapter),
        draft,
        prompts,
        base_draft=base_draft,
        base_target=TargetSpec(base_target, dtype, device) if base_target else None,
        limit=limit,
        gamma=gamma,
        max_new_tokens=max_new_tokens,
    )
    if json_out is not None:
        atomic_write_json(json_out, found.to_dict())
    console().print(probe_panel(found.verdict, found.lines(), healthy=not found.adapt))


def named_drafts(given: list[str]) -> dict[str, str]:
    """``NAME=PLACE`` or a place alone, which is then called after its last part. Raises ``UserError``."""
    drafts: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals:
            name, place = Path(text.rstrip("/")).name, text
        if not name or not place:
            raise UserError(f"--draft {text} is not understood; write NAME=FOLDER, such as aligned=run/merged")
        if name in drafts or name == "plain":
            raise UserError(f"two contestants are called {name}; write --draft NAME=FOLDER with names that differ")
        drafts[name] = place
    return drafts


def bench(
    target: TargetName,
    draft: Annotated[list[str], typer.Option(help="NAME=FOLDER or hub id; may be repeated. Gains are over the first.")],
    prompts: Prompts,
    out: OutFile,
    base_draft: BaseDraft = None,
    limit: Annotated[int, typer.Option(min=1, help="How many of the prompts are decoded.")] = 24,
    gamma: Gamma = 5,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens to sample from; 0 is all.")] = 0,
    adapter: Adapter = None,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Measure drafts against the fastest plain decoding: same prompts, same run, with 95% intervals."""
    from redraft.pipeline.steps import TargetSpec, bench_files
    from redraft.report.tables import acceptance_table, bench_table
    from redraft.sampling import Sampler

    result = bench_files(
        TargetSpec(target, dtype, device, adapter),
        named_drafts(draft),
        prompts,
        out,
        base_draft=base_draft,
        limit=limit,
        sampler=Sampler(temperature, top_k, top_p),
        gamma=gamma,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    printer = console()
    printer.print(bench_table(result))
    printer.print(acceptance_table(result))
    say(f"{out}; for the page: redraft report {out} --out {out.with_suffix('.html')}")


def report(
    results: Annotated[list[Path], typer.Argument(help="Result files of redraft bench.", metavar="RESULT...")],
    out: OutFile = Path("report.html"),
    curve: Annotated[Path | None, typer.Option(help="Training curve: curve.jsonl of a run.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="Cost ledger: ledger.json of a run.")] = None,
    summary: Annotated[Path | None, typer.Option(help="Summary of a quickstart.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also write the headline picture of the first result.")] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Draft alignment report",
) -> None:
    """Turn results into one HTML page that needs nothing else: no network, no scripts."""
    from redraft.report import build_report, headline_png

    say(str(build_report(results, out, curve, ledger, summary, title)))
    if png is not None:
        say(str(headline_png(results[0], png)))
