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
    DataFolder,
    Device,
    DraftName,
    Dtype,
    Gamma,
    OptionalPrompts,
    OutFile,
    Seed,
    Suites,
    TargetName,
    TemplateArgs,
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
            "redraft probe --target my-model --draft old-draft --prompts prompts.jsonl --limit 24 --trial",
        ),
    )(probe)


def register(app: typer.Typer) -> None:
    """Add ``bench`` and ``report`` to ``app``."""
    app.command(
        cls=Command,
        epilog=examples(
            "redraft bench --target my-model --draft stale=old-draft --draft aligned=run/merged "
            "--prompts eval.jsonl --out bench.json",
            "redraft bench --target my-model --draft run/merged --suite gsm8k --suite mt-bench --shape auto "
            "--out bench.json",
            "redraft bench --target my-model --draft run/merged --shape tree:5x10x60 --temperature 0.7 --top-p 0.9 "
            "--greedy-drafts --prompts eval.jsonl --out bench.json",
            "redraft bench --target my-model --server plain=http://127.0.0.1:8000 "
            "--server aligned=http://127.0.0.1:8001 --concurrency 1 --concurrency 8 --prompts eval.jsonl "
            "--out server.json",
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
    prompts: OptionalPrompts = None,
    suite: Suites = None,
    data: DataFolder = None,
    base_target: BaseTarget = None,
    base_draft: BaseDraft = None,
    limit: Annotated[int, typer.Option(min=2, help="How many of the prompts are asked.")] = 16,
    gamma: Gamma = 5,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 128,
    trial: Annotated[
        bool, typer.Option("--trial", help="Also adapt the draft to half of the answers and measure it on the others.")
    ] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    adapter: Adapter = None,
    template_arg: TemplateArgs = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
) -> None:
    """Say whether the present draft is healthy or stale, and what aligning it would bring, in a minute or so.

    It says at the start how long it will take.
    """
    from redraft.adaptation.steps import TargetSpec, check_output
    from redraft.api import measuring
    from redraft.artifact import atomic_write_json
    from redraft.data.template import parse_template_args

    if json_out is not None:
        check_output(json_out, ".json")
    found = measuring.probe(
        TargetSpec(target, dtype, device, adapter, parse_template_args(template_arg or [])),
        draft,
        prompts,
        suite=suite or (),
        data=data,
        base_draft=base_draft,
        base_target=TargetSpec(base_target, dtype, device) if base_target else None,
        limit=limit,
        gamma=gamma,
        max_new_tokens=max_new_tokens,
        trial=trial,
        say=say,
    )
    if json_out is not None:
        atomic_write_json(json_out, found.to_dict())
    console().print(found)


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
    out: OutFile,
    draft: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER or hub id; repeatable. Gains are over the first.")
    ] = None,
    prompts: OptionalPrompts = None,
    suite: Suites = None,
    data: DataFolder = None,
    limit: Annotated[int, typer.Option(min=1, help="How many prompts of the file, and of each suite.")] = 24,
    trained_on: Annotated[
        Path | None, typer.Option(help="Responses that a draft was trained on: none of their prompts is measured.")
    ] = None,
    shape: Annotated[str, typer.Option(help="chain:5, tree:5x10x60, a .json file of paths, or auto.")] = "chain:5",
    greedy_drafts: Annotated[
        bool, typer.Option("--greedy-drafts", help="Propose the draft's likeliest tokens although the target samples.")
    ] = False,
    static: Annotated[
        bool, typer.Option("--static", help="Steps of fixed shapes, recorded as CUDA graphs where there are some.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens to sample from; 0 is all.")] = 0,
    base_draft: BaseDraft = None,
    server: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure servers (key: REDRAFT_API_KEY): NAME=ADDRESS, NAME=COMMAND with {port}; repeatable."
        ),
    ] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="Requests under way at servers; repeatable.")] = None,
    server_model: Annotated[str | None, typer.Option(help="The target's name on servers that have several.")] = None,
    adapter: Adapter = None,
    template_arg: TemplateArgs = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Measure drafts against the fastest plain decoding: same prompts, same run, with 95% intervals."""
    from redraft.adaptation.server_bench import named_servers
    from redraft.adaptation.steps import TargetSpec
    from redraft.api import measuring
    from redraft.data.template import parse_template_args

    result = measuring.bench(
        TargetSpec(target, dtype, device, adapter, parse_template_args(template_arg or [])),
        named_drafts(draft or []),
        out,
        prompts=prompts,
        suite=suite or (),
        data=data,
        limit=limit,
        trained_on=trained_on,
        shape=shape,
        greedy_drafts=greedy_drafts,
        static=static,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        base_draft=base_draft,
        servers=named_servers(server or []),
        concurrency=concurrency or (),
        server_model=server_model,
        seed=seed,
    )
    console().print(result)
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
    """Turn results into one HTML page that needs nothing else: nothing is fetched, now or when it is opened."""
    from redraft.api import measuring

    say(str(measuring.report(results, out, curve=curve, ledger=ledger, summary=summary, png=png, title=title)))
    if png is not None:
        say(str(png))
