"""``regenerate`` and ``select``: the training text and what of it to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redraft.cli.common import (
    Adapter,
    BaseTarget,
    Command,
    Device,
    Dtype,
    OptionalTarget,
    OutFile,
    Prompts,
    Seed,
    TargetName,
    TemplateArgs,
    examples,
    say,
)


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command(
        cls=Command,
        epilog=examples(
            "redraft regenerate --target my-model --prompts prompts.jsonl --out responses.jsonl",
            "redraft regenerate --target my-model --prompts datasets:gsm8k@train --temperature 0 --temperature 0.7 "
            "--top-p 0.95 --out responses.jsonl",
            "redraft regenerate --target my-model --server http://127.0.0.1:8000 --prompts prompts.jsonl --out r.jsonl",
        ),
    )(regenerate)
    app.command(
        cls=Command,
        epilog=examples(
            "redraft select --responses responses.jsonl --scorer rejection --target my-model --draft old-draft "
            "--budget 50% --out selection.json",
            "redraft select --prompts prompts.jsonl --scorer shift --target my-model --base-target base-model "
            "--budget 400 --out selection.json --keep chosen.jsonl",
            "redraft select --responses responses.jsonl --scorer coverage:base=shift,base.layer=12,diversity=0.5 "
            "--target my-model --base-target base-model --budget '60k tokens' --out selection.json",
        ),
    )(select)


def regenerate(
    target: TargetName,
    prompts: Prompts,
    out: OutFile,
    temperature: Annotated[list[float], typer.Option(help="Sampling temperature; may be repeated.")] = [0.0],  # noqa: B006
    top_p: Annotated[float, typer.Option(help="Nucleus of sampled answers.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens to sample from; 0 is all.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 256,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences decoded together, or requests under way at --server.")
    ] = 64,
    server: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server that serves the target; its key: REDRAFT_API_KEY.")
    ] = None,
    server_model: Annotated[str | None, typer.Option(help="The target's name on that server.")] = None,
    adapter: Adapter = None,
    template_arg: TemplateArgs = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Let the target answer the prompts itself: the text that the draft must learn to predict.

    Token ids are kept as generated. A stopped run goes on where it was; what failed is listed beside the output.
    """
    from redraft.adaptation.steps import TargetSpec
    from redraft.api import text
    from redraft.data.template import parse_template_args

    report = text.regenerate(
        TargetSpec(target, dtype, device, adapter, parse_template_args(template_arg or [])),
        prompts,
        out,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        server=server,
        server_model=server_model,
        seed=seed,
    )
    say(str(report))


def select(
    out: OutFile,
    responses: Annotated[Path | None, typer.Option(help="Responses to select from.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompts to select from, before any is answered.")] = None,
    scorer: Annotated[
        str, typer.Option(help="How rows are scored: {scorers}; NAME:KEY=VALUE,KEY=VALUE for its settings.")
    ] = "rejection",
    budget: Annotated[str, typer.Option(help='What to keep: "25%", "400" rows or "60k tokens".')] = "75%",
    order: Annotated[str, typer.Option(help="Which scores come first: highest or lowest.")] = "highest",
    keep: Annotated[Path | None, typer.Option(help="Also write the kept rows or prompts to this file.")] = None,
    target: OptionalTarget = None,
    base_target: BaseTarget = None,
    draft: Annotated[str | None, typer.Option(help="The present draft (scorer rejection, and coverage on it).")] = None,
    adapter: Adapter = None,
    template_arg: TemplateArgs = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Choose the samples worth training on; the manifest says every score and why a row is in.

    From responses, or from prompts before any is answered: --keep then writes the prompts to answer.
    """
    from redraft.adaptation.steps import TargetSpec
    from redraft.api import text
    from redraft.data.template import parse_template_args

    manifest = text.select(
        out,
        responses=responses,
        prompts=prompts,
        scorer=scorer,
        budget=budget,
        order=order,
        target=TargetSpec(target, dtype, device, adapter, parse_template_args(template_arg or [])) if target else None,
        base_target=TargetSpec(base_target, dtype, device) if base_target else None,
        draft=draft,
        keep=keep,
        seed=seed,
    )
    say(f"{manifest}; {out} says why")
