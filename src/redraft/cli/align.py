"""``quickstart``, ``train``, ``adapt``, ``merge`` and ``export``: from a stale draft to one that an engine loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from redraft.cli.common import (
    Adapter,
    BaseDraft,
    BaseTarget,
    Command,
    Device,
    Dtype,
    Gamma,
    OptionalDtype,
    OptionalTarget,
    OutFolder,
    PrivateWidth,
    Rank,
    Seed,
    TargetName,
    TemplateArgs,
    console,
    examples,
    say,
)
from redraft.errors import UserError


def register_quickstart(app: typer.Typer) -> None:
    """Add ``quickstart``, which stands first in the help, to ``app``."""
    app.command(cls=Command, epilog=examples("redraft quickstart", "redraft quickstart --out /tmp/demo"))(quickstart)


def register(app: typer.Typer) -> None:
    """Add the other commands to ``app``."""
    app.command(
        cls=Command,
        epilog=examples(
            "redraft train --target my-model --draft old-draft --responses responses.jsonl --method eda+fc --out run",
            "redraft train --target my-model --from-nothing --vocabulary 8192 --responses general.jsonl --epochs 3 "
            "--out new-draft",
        ),
    )(train)
    app.command(
        cls=Command,
        epilog=examples(
            "redraft adapt --target my-model --draft old-draft --prompts prompts.jsonl --out run",
            "redraft adapt --config adapt.yaml",
            "redraft adapt --config adapt.yaml --method fc --out run-fc",
        ),
    )(adapt)
    app.command(
        cls=Command,
        epilog=examples(
            "redraft merge --private run/private --base-draft old-draft --out merged",
            "redraft merge --private run/private --base-draft old-draft --scale 0.7 --out milder",
            "redraft merge --private run/private --base-draft some-org/public-draft --target my-model --out merged",
        ),
    )(merge)
    app.command(
        cls=Command,
        epilog=examples(
            "redraft export --draft run/merged --target my-model --format vllm --out draft-for-vllm",
            "redraft export --draft run/private --base-draft old-draft --target my-model --format sglang --out sglang",
        ),
    )(export)


def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run, its summary and its page.")] = Path(
        "out/quickstart"
    ),
) -> None:
    """The whole story on a small embedded model: a target fine-tuned on maths gets its lost speed-up back."""
    from redraft.adaptation import quickstart as story
    from redraft.report.tables import acceptance_table, bench_table, ledger_table, probe_panel, summary_table

    summary, result, found = story.quickstart(out, say)
    printer = console()
    printer.print(probe_panel(f"before: {found.verdict}", found.lines(), found.action))
    printer.print(bench_table(result))
    printer.print(acceptance_table(result))
    ledger = out / "run" / "ledger.json"
    if ledger.exists():
        from redraft.report.load import read_ledger

        printer.print(ledger_table(read_ledger(ledger)))
    printer.print(summary_table(summary))
    say(f"page: {out / 'report.html'}")


def train(
    target: TargetName,
    responses: Annotated[Path, typer.Option(help="Responses of the target, from redraft regenerate.")],
    out: OutFolder,
    draft: Annotated[str | None, typer.Option(help="The old draft: folder in any format, or hub id.")] = None,
    from_nothing: Annotated[bool, typer.Option("--from-nothing", help="Train a new draft instead.")] = False,
    vocabulary: Annotated[int, typer.Option(min=1, help="Draft vocabulary of a new draft.")] = 8192,
    method: Annotated[str, typer.Option(help="What of an old draft is trained: {methods}.")] = "lora",
    private_width: PrivateWidth = None,
    rank: Rank = None,
    private: Annotated[
        list[str] | None, typer.Option(help="Any other size of the private part, NAME=VALUE; repeatable.")
    ] = None,
    family: Annotated[str, typer.Option(help="Family of a new draft: eagle3, or eagle1 as in its paper.")] = "eagle3",
    selection: Annotated[Path | None, typer.Option(help="Manifest of redraft select: train on what it keeps.")] = None,
    heldout: Annotated[int, typer.Option(min=1, help="Greedy responses kept back: training stops on their tau.")] = 40,
    heldout_responses: Annotated[Path | None, typer.Option(help="Held-out responses in a file of their own.")] = None,
    loss: Annotated[str, typer.Option(help="Training loss: {losses}.")] = "kl",
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the responses; by default 6, for a new draft 3.")
    ] = None,
    batch_anchors: Annotated[
        int | None, typer.Option(min=1, help="Supervised positions a step; by default 768, for a new draft 1536.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest learning rate; by default the method's own, for a new draft 0.001.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option(help="Any other training setting, NAME=VALUE; repeatable.")
    ] = None,
    gamma: Gamma = 5,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Train a small part of an old draft, or a new draft, on the target's own responses. A stopped run goes on."""
    from redraft.adaptation.config import adaptation
    from redraft.adaptation.steps import TargetSpec
    from redraft.adaptation.training import TrainData, train_new, train_old
    from redraft.drafts.methods import PrivateSize
    from redraft.train.trainer import TrainConfig

    flags: dict[str, Any] = {"epochs": epochs, "batch_anchors": batch_anchors, "learning_rate": learning_rate}
    # a flag with a default of its own counts as given where it differs from that
    flags |= {"loss": None if loss == "kl" else loss, "gamma": None if gamma == 5 else gamma, "seed": seed or None}
    values = {"loss": loss, "gamma": gamma, "seed": seed, **once(flags, settings(setting or [], TrainConfig))}
    spec = TargetSpec(target, dtype, device, adapter)
    data = TrainData(responses, heldout, heldout_responses, selection)
    if from_nothing and draft is None:
        train_new(spec, data, out, vocabulary, TrainConfig(**values), say, family)
    elif draft is not None and not from_nothing:
        sizes = once({"width": private_width, "rank": rank}, settings(private or [], PrivateSize))
        config = TrainConfig(**adaptation(method) | values)
        train_old(spec, draft, data, out, config, method, PrivateSize(**sizes), say)
    else:
        raise UserError("give either --draft, the old draft to adapt, or --from-nothing for a new one")


def settings(given: list[str], config: Any) -> dict[str, Any]:
    """``NAME=VALUE`` texts as values of the types of a config's fields. Raises ``UserError``."""
    from redraft.adaptation.config import typed
    from redraft.registry import nearest

    known = get_type_hints(config)
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            near = nearest(name, known)
            raise UserError(f"setting {text!r} is not understood{near}; write NAME=VALUE, one of {', '.join(known)}")
        told = typed(f"setting {name}", value.strip(), known[name])
        if found.setdefault(name, told) != told:
            raise UserError(f"setting {name} is given twice, as {found[name]} and as {told}; give it once")
    return found


def once(flags: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """Settings from flags of their own (None: not given) and ``NAME=VALUE``. Raises ``UserError`` for two values."""
    given = {name: value for name, value in flags.items() if value is not None}
    for name in given.keys() & named.keys():
        if given[name] != named[name]:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {given[name]} and the setting {name} is {named[name]}; give it once")
    return given | named


def adapt(
    config: Annotated[Path | None, typer.Option(help="YAML file with any of these settings; flags win.")] = None,
    target: OptionalTarget = None,
    draft: Annotated[str | None, typer.Option(help="The old draft: folder in any format, or hub id.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompts of the target's domain; self:400 lets the target write 400 questions itself."),
    ] = None,
    responses: Annotated[
        str | None, typer.Option(help="A log of served responses instead of --prompts: nothing is generated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run directory; a stopped run resumes from it.")
    ] = None,
    adapter: Adapter = None,
    template_arg: TemplateArgs = None,
    base_target: BaseTarget = None,
    eval_prompts: Annotated[
        str | None, typer.Option(help="Prompts to measure on; else held out from --prompts.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Which parameters are trained: {methods}.")] = None,
    private_width: PrivateWidth = None,
    rank: Rank = None,
    private: Annotated[
        list[str] | None,
        typer.Option(help="Other sizes of the private part, NAME=VALUE (alpha, ...; bits with full); repeatable."),
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="What training starts from: {starts}; joined by + where several.")
    ] = None,
    replay: Annotated[
        int | None, typer.Option(help="Passes over the states where the trained draft's rounds end early.")
    ] = None,
    loss: Annotated[str | None, typer.Option(help="Training loss: {losses}.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="How samples are scored: {scorers}; NAME:KEY=VALUE for its settings.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help='What selection keeps: "25%", "400" or "60k tokens".')] = None,
    select_on: Annotated[str | None, typer.Option(help="Score responses, or prompts before any is answered.")] = None,
    general: Annotated[
        str | None, typer.Option(help="Responses to general prompts, mixed in to guard the draft's other speed.")
    ] = None,
    general_share: Annotated[float | None, typer.Option(help="Their share of all response tokens.")] = None,
    temperatures: Annotated[list[float] | None, typer.Option(help="Regeneration temperature; repeatable.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus of sampled regeneration.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest response.")] = None,
    server: Annotated[str | None, typer.Option(help="OpenAI-compatible server; its key: REDRAFT_API_KEY.")] = None,
    server_model: Annotated[str | None, typer.Option(help="The target's name on that server.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences decoded together, or requests under way at --server.")
    ] = None,
    heldout_prompts: Annotated[int | None, typer.Option(help="Prompts kept back for early stopping.")] = None,
    bench_prompts: Annotated[int | None, typer.Option(help="Prompts of the final benchmark.")] = None,
    bench_tokens: Annotated[int | None, typer.Option(help="Longest answer in the benchmark.")] = None,
    gamma: Annotated[int | None, typer.Option(help="Drafted tokens a round.")] = None,
    dtype: OptionalDtype = None,
    device: Annotated[str | None, typer.Option(help="Torch device: cpu, cuda, ...")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    exports: Annotated[list[str] | None, typer.Option(help="Formats to export: {formats}; repeatable.")] = None,
    train: Annotated[list[str] | None, typer.Option(help="Training setting such as epochs=4; repeatable.")] = None,
) -> None:
    """Everything in one go: regenerate, select, train, export, bench and report. Stop it and resume it at will."""
    given = {name: value for name, value in locals().items() if name != "config" and value not in (None, [])}
    from redraft.adaptation.adapt import AdaptRun
    from redraft.adaptation.config import parse_config, read_config
    from redraft.report.tables import acceptance_table, bench_table, ledger_table

    given |= named_settings(given)
    parsed = read_config(config, given) if config is not None else parse_config(given)
    run = AdaptRun(parsed, say)
    result = run.run()
    printer = console()
    printer.print(bench_table(result))
    printer.print(acceptance_table(result))
    printer.print(ledger_table(run.ledger.to_dict()))
    say(f"draft: {run.folder / 'merged'}; page: {run.folder / 'report.html'}")


def named_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The NAME=VALUE flags of ``adapt`` among ``given`` as settings in their types. Raises ``UserError``."""
    from redraft.data.template import parse_template_args
    from redraft.drafts.methods import PrivateSize
    from redraft.train.trainer import TrainConfig

    kinds = {"train": TrainConfig, "private": PrivateSize}
    found: dict[str, Any] = {name: settings(given[name], kind) for name, kind in kinds.items() if name in given}
    if "template_arg" in given:
        found["template_arg"] = parse_template_args(given["template_arg"])
    return found


def merge(
    private: Annotated[str, typer.Option(help="The private part: run/private of an adaptation.")],
    base_draft: Annotated[str, typer.Option(help="The shared draft that it was trained on.")],
    out: OutFolder,
    target: Annotated[
        str | None, typer.Option(help="The target; needed for a public checkpoint as shared draft.")
    ] = None,
    scale: Annotated[
        float, typer.Option(min=0, help="How much of the change goes in; less keeps more of the speed on other text.")
    ] = 1.0,
) -> None:
    """Fold a private part into the shared draft: an ordinary dense draft, with no extra work for engines."""
    from redraft.adaptation.steps import merge_folder, target_info

    meta = merge_folder(private, base_draft, out, target_info(target) if target else None, scale)
    say(f"{out}: {meta['parameters']:,} parameters, method {meta.get('method')}")


def export(
    draft: Annotated[str, typer.Option(help="The draft: redraft folder, private part, or public checkpoint.")],
    target: TargetName,
    format: Annotated[str, typer.Option(help="Format to write: {formats}.")],
    out: OutFolder,
    base_draft: BaseDraft = None,
    gamma: Gamma = 5,
) -> None:
    """Write a draft in the format that a serving engine loads: complete, or not at all."""
    from redraft.adaptation.steps import export_folder, target_info
    from redraft.registries import EXPORTERS

    EXPORTERS.get(format)
    found = export_folder(draft, target_info(target), format, out, base_draft, gamma)
    for warning in found.warnings:
        say(f"note: {warning}")
    say(f"{found.folder}: {found.parameters:,} parameters, {found.bytes / 1e6:.1f} MB")
    say(f"serve with: {found.serve}")
