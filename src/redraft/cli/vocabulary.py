"""``vocabulary``: what of the target's text the draft can say at all, and a refresh of its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from redraft.cli.common import (
    Adapter,
    BaseDraft,
    Command,
    Device,
    DraftName,
    Dtype,
    Gamma,
    Seed,
    TargetName,
    console,
    examples,
    say,
)


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(
        cls=Command,
        epilog=examples(
            "redraft vocabulary --target my-model --draft old-draft --responses responses.jsonl",
            "redraft vocabulary --target my-model --draft old-draft --responses responses.jsonl "
            "--general general.jsonl --refresh --out refreshed-draft",
        ),
    )(vocabulary)


def vocabulary(
    target: TargetName,
    draft: DraftName,
    responses: Annotated[Path, typer.Option(help="Responses of the target, as `redraft regenerate` writes them.")],
    refresh: Annotated[bool, typer.Option("--refresh", help="Swap unused tokens for missing ones.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the refreshed draft.")] = None,
    general: Annotated[
        Path | None, typer.Option(help="Responses of the domain that must stay covered; its tokens leave last.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write everything to this JSON file.")] = None,
    worst: Annotated[int, typer.Option(min=0, help="Missing tokens to list.")] = 12,
    base_draft: BaseDraft = None,
    adapter: Adapter = None,
    gamma: Gamma = 5,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Report how much of the target's text the draft's vocabulary covers, and what that caps; or refresh it.

    A refresh keeps the size, carries the rows that stay, and makes new ones from the target's head.
    """
    from redraft.adaptation.steps import TargetSpec
    from redraft.adaptation.vocabulary import vocabulary_file

    found, refreshed, result = vocabulary_file(
        TargetSpec(target, dtype, device, adapter),
        draft,
        responses,
        base_draft=base_draft,
        refresh=refresh,
        out=out,
        general=general,
        report=report,
        gamma=gamma,
        seed=seed,
    )
    say(f"{found.share:.2%} of {found.tokens:,} tokens can be said by the {found.size:,} of the draft's vocabulary")
    caps = ", ".join("none" if share is None else f"{share:.3f}" for share in found.positions)
    say(f"cap on acceptance by position of a chain of {gamma}: {caps}; on tau: {found.tau_cap:.2f}")
    if result["coverage"]["missing"] and worst:
        console().print(_table(result["coverage"]["missing"][:worst]))
    if refreshed is not None:
        for note in refreshed.notes:
            say(note)
        if refreshed.changed:
            say(f"cap on tau: {refreshed.before.tau_cap:.2f} -> {refreshed.after.tau_cap:.2f}; draft: {out}")


def _table(missing: list[dict[str, Any]]) -> Any:
    """The worst missing tokens; their text quoted, since blanks and line breaks are among them."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="missing tokens")
    for name in ("token", "id", "count", "share"):
        table.add_column(name, justify="left" if name == "token" else "right")
    for entry in missing:
        table.add_row(Text(repr(entry["text"])), str(entry["id"]), str(entry["count"]), f"{entry['share']:.2%}")
    return table
