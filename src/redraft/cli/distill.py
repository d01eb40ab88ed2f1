"""``distill``: a standalone drafter from nothing, or a given one, aligned with a chat target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redraft.cli.common import Adapter, Command, OptionalDtype, OptionalTarget, TemplateArgs, examples, say


def register(app: typer.Typer) -> None:
    """Add ``distill`` to ``app``."""
    app.command(
        cls=Command,
        epilog=examples(
            "redraft distill --target my-chat-model --text corpus/ --prompts seeds.jsonl --out run",
            "redraft distill --config distill.yaml",
            "redraft distill --target my-chat-model --draft sibling --text-share 0 --prompts seeds.jsonl --out run",
        ),
    )(distill)


def distill(
    config: Annotated[Path | None, typer.Option(help="YAML file with any of these settings; flags win.")] = None,
    target: OptionalTarget = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run directory; a stopped run resumes from it.")
    ] = None,
    adapter: Adapter = None,
    template_arg: TemplateArgs = None,
    draft: Annotated[str | None, typer.Option(help="A drafter to align, instead of pretraining a new one.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Size of a new one: a share of the target (1/10), parameters (15M), or goel.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="How many layers a new one has.")] = None,
    embeddings: Annotated[str | None, typer.Option(help="Start of its embeddings: target or random.")] = None,
    tied: Annotated[bool | None, typer.Option("--tied/--untied", help="One table for embedding and head.")] = None,
    from_layers: Annotated[
        list[int] | None, typer.Option(help="Start from this layer of the target, from 0; repeatable.")
    ] = None,
    private_width: Annotated[
        int | None, typer.Option(help="Train only private experts of this width beside the MLPs of --draft.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Plain text: file, folder or datasets:NAME:CONFIG@SPLIT; repeatable.")
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of JSON lines that holds the text.")] = None,
    heldout_text: Annotated[str | None, typer.Option(help="Held-out text; else a share of --text.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Seed instructions that the target answers.")] = None,
    responses: Annotated[str | None, typer.Option(help="A log of served responses instead of --prompts.")] = None,
    temperatures: Annotated[list[float] | None, typer.Option(help="Temperature of the answers; repeatable.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus of sampled answers.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    server: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server that answers; its key: REDRAFT_API_KEY.")
    ] = None,
    server_model: Annotated[str | None, typer.Option(help="The target's name on that server.")] = None,
    server_only: Annotated[
        bool | None, typer.Option("--server-only", help="The target's weights are not here: config and tokenizer are.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences decoded together, or requests under way.")] = None,
    heldout_prompts: Annotated[int | None, typer.Option(help="Prompts kept back for early stopping.")] = None,
    loss: Annotated[str | None, typer.Option(help="Training loss: {losses}.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="What the target is known by: states (logits), tops (a server's), tokens.")
    ] = None,
    text_share: Annotated[float | None, typer.Option(help="Share of plain text in alignment.")] = None,
    gamma: Annotated[int | None, typer.Option(help="Drafted tokens a round.")] = None,
    dtype: OptionalDtype = None,
    device: Annotated[str | None, typer.Option(help="Torch device: cpu, cuda, ...")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    exports: Annotated[list[str] | None, typer.Option(help="Formats to export: {formats}; repeatable.")] = None,
    pretrain: Annotated[
        list[str] | None, typer.Option(help="Pretraining setting NAME=VALUE (tokens, length ...); repeatable.")
    ] = None,
    align: Annotated[
        list[str] | None, typer.Option(help="Alignment setting NAME=VALUE (epochs ...); repeatable.")
    ] = None,
) -> None:
    """Make a drafter of one's own: pretrain, let the target answer, align. Stop it and resume it at will."""
    given = {name: value for name, value in locals().items() if name != "config" and value not in (None, [])}
    from redraft.adaptation.distill import DistillRun
    from redraft.adaptation.distill_config import read_distill_config
    from redraft.cli.align import settings
    from redraft.data.template import parse_template_args
    from redraft.train.distil import DistilConfig
    from redraft.train.pretrain import PretrainConfig

    for name, kind in (("pretrain", PretrainConfig), ("align", DistilConfig)):
        if name in given:
            given[name] = settings(given[name], kind)
    if template_arg:
        given["template_arg"] = parse_template_args(template_arg)
    parsed = read_distill_config(config, given)
    run = DistillRun(parsed, say)
    run.run()
    say(f"drafter: {run.folder / 'draft'}; record: {run.folder / 'distill.json'}")
