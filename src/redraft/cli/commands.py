"""The commands: each takes its settings and calls the library. Their docstrings are their help.

Nothing here imports torch: a command imports what it calls when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

import redraft
from redraft.cli.generate import Command, add_command, template
from redraft.errors import UserError
from redraft.settings import steps
from redraft.settings.base import Settings, known_name
from redraft.settings.runs import AdaptConfig, DistillConfig
from redraft.settings.shapes import parse_shape
from redraft.settings.studies import StudySettings, read_study

COMMANDS: dict[type[Settings], tuple[Callable[[Any], None], tuple[str, ...]]] = {}


def command(*examples: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """List the function below as what does the command of the settings that it takes, with examples for its help."""

    def listed(call: Callable[[Any], None]) -> Callable[[Any], None]:
        COMMANDS[get_type_hints(call)["s"]] = call, examples
        return call

    return listed


def register(app: typer.Typer) -> None:
    """Add all commands to ``app``."""
    for kind, (call, examples) in COMMANDS.items():
        add_command(app, kind, call, examples)

    @app.command(name="config", cls=Command, epilog="[bold]Examples[/bold]\n\n[cyan]redraft config adapt[/cyan]")
    def config(
        command: Annotated[
            str, typer.Argument(metavar="COMMAND", help="The command whose settings are printed.")
        ] = "adapt",
    ) -> None:
        """Print all settings of a command as a commented YAML file, at their defaults."""
        kinds = {kind.COMMAND: kind for kind in COMMANDS}
        if command == "study":
            raise UserError("the settings of a study are a file of their own kind; see docs/studies/README.md")
        known_name("command", command, kinds)
        print(template(kinds[command]), end="")


def console() -> Any:
    """Standard output for tables; wide enough for them where it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def say(text: str) -> None:
    """One line of plain output."""
    print(text, flush=True)


def spec(settings: Any, name: str | None = None) -> Any:
    """The target that settings name; ``name`` is another one of theirs, without adapter and template arguments."""
    if name is not None:
        return redraft.TargetSpec(name, settings.dtype, settings.device)
    return redraft.TargetSpec(settings.target, settings.dtype, settings.device, settings.adapter, settings.template_arg)


def rest(settings: Settings, *without: str) -> dict[str, Any]:
    """The settings, as keywords of the library's call, but for those of :func:`spec` and the ones named."""
    out = ("target", "adapter", "template_arg", "dtype", "device", *without)
    return {name: getattr(settings, name) for name in type(settings).model_fields if name not in out}


@command("redraft quickstart", "redraft quickstart --out /tmp/demo")
def quickstart(s: steps.QuickstartSettings) -> None:
    """The whole story on a small embedded model: a target fine-tuned on maths gets its lost speed-up back."""
    from redraft.adaptation import quickstart as story
    from redraft.artifact import read_json
    from redraft.reports.tables import acceptance_table, bench_table, ledger_table, probe_panel, summary_table

    say("344 maths problems answered, a draft trained on them, measured on 16 others: ten minutes or so on two cores")
    summary, result, found = story.quickstart(s.out, say)
    before = probe_panel(f"before: {found.verdict}", found.lines(), found.action)
    ledger = s.out / "run" / "ledger.json"
    costs = [ledger_table(read_json(ledger))] if ledger.exists() else []
    for part in (before, bench_table(result), acceptance_table(result), *costs, summary_table(summary)):
        console().print(part)
    say(f"page: {s.out / 'report.html'}")


@command(
    "redraft probe --target my-model --draft old-draft --prompts prompts.jsonl",
    "redraft probe --target my-model --draft old-draft --base-target base-model --prompts eval.jsonl --json probe.json",
    "redraft probe --target my-model --draft old-draft --prompts prompts.jsonl --limit 24 --trial",
)
def probe(s: steps.ProbeSettings) -> None:
    """Say whether the present draft is healthy or stale, and what aligning it would bring, in a minute or so.

    It says at the start how long it will take.
    """
    from redraft.adaptation.models import check_output
    from redraft.artifact import atomic_write_json

    if s.json_out is not None:
        check_output(s.json_out, ".json")
    base = spec(s, s.base_target) if s.base_target else None
    asked = rest(s, "draft", "prompts", "base_target", "json_out", "seed")
    found = redraft.probe(spec(s), s.draft, s.prompts, base_target=base, say=say, **asked)
    if s.json_out is not None:
        atomic_write_json(s.json_out, found.to_dict())
    found.show(console())


@command(
    "redraft check old-draft --target my-model --for vllm-0.33",
    "redraft check old-draft --target my-model --prompts prompts.jsonl --base-target base-model",
    "redraft check served-draft --target my-model --prompts prompts.jsonl --server http://127.0.0.1:8000 --gamma 5",
)
def check(s: steps.CheckSettings) -> None:
    """Say why acceptance is low, in words, with the command that mends it.

    From the file alone, what an engine will read otherwise than it was trained; with prompts, what one thing changed
    at a time would win back; with a server, what it does otherwise than the same draft here.
    """
    from redraft.adaptation.models import check_output
    from redraft.artifact import atomic_write_json

    if s.json_out is not None:
        check_output(s.json_out, ".json")
    base = spec(s, s.base_target) if s.base_target else None
    asked = rest(s, "draft", "base_target", "json_out")
    found = redraft.check(s.draft, spec(s), base_target=base, **asked)
    if s.json_out is not None:
        atomic_write_json(s.json_out, found.to_dict())
    found.show(console())


@command(
    "redraft regenerate --target my-model --prompts prompts.jsonl --out responses.jsonl",
    "redraft regenerate --target my-model --prompts datasets:gsm8k@train --temperature 0 --temperature 1 --out r.jsonl",
    "redraft regenerate --target my-model --server http://127.0.0.1:8000 --prompts prompts.jsonl --out r.jsonl",
)
def regenerate(s: steps.RegenerateSettings) -> None:
    """Let the target answer the prompts itself: the text that the draft must learn to predict.

    Token ids are kept as generated. A stopped run goes on where it was; what failed is listed beside the output.
    """
    say(str(redraft.regenerate(spec(s), s.prompts, s.out, **rest(s, "prompts", "out"))))


@command(
    "redraft select --responses responses.jsonl --target my-model --draft old-draft --budget 50% --out selection.json",
    "redraft select --prompts prompts.jsonl --scorer shift --target my-model --base-target base-model "
    "--budget 400 --out selection.json --keep chosen.jsonl",
    "redraft select --responses responses.jsonl --scorer coverage:base=shift,base.layer=12,diversity=0.5 "
    "--target my-model --base-target base-model --budget '60k tokens' --out selection.json",
)
def select(s: steps.SelectSettings) -> None:
    """Choose the samples worth training on; the manifest says every score and why a row is in.

    From responses, or from prompts before any is answered: --keep then writes the prompts to answer.
    """
    target, base = spec(s) if s.target else None, spec(s, s.base_target) if s.base_target else None
    manifest = redraft.select(s.out, target=target, base_target=base, **rest(s, "out", "base_target"))
    kept, total = len(manifest.selected_keys), len(manifest.entries)
    what = "responses" if s.prompts is None else "prompts"
    how = f"the budget {s.budget}, {s.order} scores of {s.scorer} first"
    say(f"{kept} of {total} scored {what} kept, {manifest.selected_tokens:,} tokens: {how}; {s.out} says why")


@command(
    "redraft vocabulary --target my-model --draft old-draft --responses responses.jsonl",
    "redraft vocabulary --target my-model --draft old-draft --responses r.jsonl --general g.jsonl --refresh --out new",
)
def vocabulary(s: steps.VocabularySettings) -> None:
    """Report how much of the target's text the draft's vocabulary covers, and what that caps; or refresh it.

    A refresh keeps the size, carries the rows that stay, and makes new ones from the target's head.
    """
    from redraft.adaptation.vocabulary import vocabulary_file

    found, refreshed, result = vocabulary_file(spec(s), s)
    say(f"{found.share:.2%} of {found.tokens:,} tokens can be said by the {found.size:,} of the draft's vocabulary")
    caps = ", ".join("none" if share is None else f"{share:.3f}" for share in found.positions)
    say(f"cap on acceptance by position of a chain of {s.gamma}: {caps}; on tau: {found.tau_cap:.2f}")
    if missing := result["coverage"]["missing"][: s.worst]:
        say("missing tokens, the worst first:")
    for one in missing:  # quoted, since blanks and line breaks are among them
        say(f"  {one['text']!r:<24} id {one['id']:<8} {one['count']:>6} times, {one['share']:.2%}")
    if refreshed is not None:
        for note in refreshed.notes:
            say(note)
        if refreshed.changed:
            say(f"cap on tau: {refreshed.before.tau_cap:.2f} -> {refreshed.after.tau_cap:.2f}; draft: {s.out}")


@command(
    "redraft train --target my-model --draft old-draft --responses responses.jsonl --method eda+fc --out run",
    "redraft train --target my-model --from-nothing --vocabulary 8192 --responses general.jsonl --out new-draft",
)
def train(s: steps.TrainSettings) -> None:
    """Train a small part of an old draft, or a new draft, on the target's own responses. A stopped run goes on."""
    sizes = {"width": s.private_width, "rank": s.rank, **s.private}
    what = rest(s, *s.OWN, "responses", "out", "private", "private_width", "rank", "from_nothing", "setting")
    say(str(redraft.train(spec(s), s.responses, s.out, private=sizes, say=say, **what, **s.training())))


@command(
    "redraft adapt --target my-model --draft old-draft --prompts prompts.jsonl --out run",
    "redraft adapt --config adapt.yaml",
    "redraft adapt --config adapt.yaml --method fc --out run-fc",
)
def adapt(s: AdaptConfig) -> None:
    """Everything in one go: regenerate, select, train, export, bench and report. Stop it and resume it at will."""
    redraft.adapt(say=say, **{name: getattr(s, name) for name in s.model_fields_set}).show(console())


@command(
    "redraft import someones-draft --target my-model --out draft",
    "redraft import some-org/public-draft --target my-model --trainer specforge --out draft --json read.json",
)
def import_(s: steps.ImportSettings) -> None:
    """Read a draft as the trainer that wrote it means it, and say of every value where it comes from.

    What redraft does not compute is refused by its name, and nothing is written.
    """
    from redraft.adaptation.models import check_output
    from redraft.artifact import atomic_write_json

    if s.json_out is not None:
        check_output(s.json_out, ".json")
    found = redraft.import_draft(s.source, s.out, target=s.target, taps=s.taps, trainer=s.trainer)
    if s.json_out is not None:
        atomic_write_json(s.json_out, found.to_dict())
    found.show(console())


@command(
    "redraft merge --private run/private --base-draft old-draft --out merged",
    "redraft merge --private run/private --base-draft old-draft --scale 0.7 --out milder",
    "redraft merge --private run/private --base-draft some-org/public-draft --target my-model --out merged",
)
def merge(s: steps.MergeSettings) -> None:
    """Fold a private part into the shared draft: an ordinary dense draft, with no extra work for engines."""
    merged = redraft.merge(s.private, s.base_draft, s.out, target=s.target, scale=s.scale)
    share = "the whole change" if s.scale == 1 else f"{s.scale:g} times the change"
    say(f"{share} that {s.private} makes to the shared draft {s.base_draft} is merged")
    say(str(merged))


@command("redraft merge-target --target base-model --adapter my-adapter --out my-model")
def merge_target(s: steps.MergeTargetSettings) -> None:
    """Merge an adapter into its base model: the checkpoint that a serving engine needs beside the draft.

    Its tokenizer and generation settings are written too. A folder is there whole, or not at all.
    """
    from redraft.adaptation.merged_target import merge_target_folder

    say(f"target: {merge_target_folder(s.target, s.adapter, s.out)}")


@command(
    "redraft export --draft run/merged --target my-model --format vllm --out draft-for-vllm",
    "redraft export --draft run/private --base-draft old-draft --target my-model --format sglang --out sglang",
)
def export(s: steps.ExportSettings) -> None:
    """Write a draft in the format that a serving engine loads: complete, or not at all."""
    say(str(redraft.export(s.draft, s.target, s.format, s.out, base_draft=s.base_draft, gamma=s.gamma)))


@command(
    "redraft distill --target my-chat-model --text corpus/ --prompts seeds.jsonl --out run",
    "redraft distill --config distill.yaml",
    "redraft distill --target my-chat-model --draft sibling --text-share 0 --prompts seeds.jsonl --out run",
)
def distill(s: DistillConfig) -> None:
    """Make a drafter of one's own: pretrain, let the target answer, align. Stop it and resume it at will."""
    from redraft.adaptation.distill import DistillRun
    from redraft.locks import held
    from redraft.training.workers import together

    with together() as workers, held(s.out, say=say):
        with workers.first():
            run = DistillRun(s, say)
        run.run()
    say(f"drafter: {run.folder / 'draft'}; record: {run.folder / 'distill.json'}")


@command(
    "redraft bench --target my-model --draft stale=old-draft --draft aligned=run/merged "
    "--prompts eval.jsonl --out bench.json",
    "redraft bench --target my-model --draft run/merged --suite gsm8k --suite mt-bench --shape auto --out bench.json",
    "redraft bench --target my-model --draft run/merged --shape tree:5x10x60 --temperature 0.7 --top-p 0.9 "
    "--greedy-drafts --prompts eval.jsonl --out bench.json",
    "redraft bench --target my-model --server plain=http://127.0.0.1:8000 "
    "--server aligned=http://127.0.0.1:8001 --concurrency 1 --concurrency 8 --prompts eval.jsonl --out server.json",
)
def bench(s: steps.BenchSettings) -> None:
    """Measure drafts against the fastest plain decoding: same prompts, same run, with 95% intervals."""
    asked = rest(s, "draft", "server", "out")
    redraft.bench(spec(s), s.drafts, s.out, servers=s.servers, **asked).show(console())
    say(f"{s.out}; for the page: redraft report {s.out} --out {s.out.with_suffix('.html')}")


@command(
    "redraft report bench.json --out report.html",
    "redraft report run/bench.json --curve run/train/curve.jsonl --ledger run/ledger.json --png headline.png",
)
def report(s: steps.ReportSettings) -> None:
    """Turn results into one HTML page that needs nothing else: nothing is fetched, now or when it is opened."""
    say(str(redraft.report(list(s.results), s.out, **rest(s, "results", "out"))))
    if s.png is not None:
        say(str(s.png))


@command(
    "redraft study runs/studies/selection.yaml --out out/study",
    "redraft study runs/studies/selection.yaml --list",
    "redraft study --tables out/study/results.json",
)
def study(s: StudySettings) -> None:
    """Compare methods, data, selections, losses and starts: one results file, its tables and pictures."""
    if s.tables is not None:
        from redraft.adaptation.study.figures import write_tables

        say(f"tables: {write_tables(s.tables, s.out)}")
        return
    assert s.config is not None
    if s.list_cells:
        for number, cell in enumerate(read_study(s.config).all_cells(), 1):
            say(f"{number:4}  {cell.key}")
        return
    if s.out is None:
        raise UserError("name the folder of the study with --out")
    found = redraft.study(s.config, s.out, template_arg=s.template_arg, full=s.full, say=say)
    say(f"results: {found.results}; tables: {found.tables}")


@command(
    'redraft watch --target my-model --draft run/merged --prompt "How many eggs are left?"',
    "redraft watch --target my-model --draft old-draft --prompts prompts.jsonl --limit 3 --rejected",
    'redraft watch --target my-model --draft run/merged --prompt "Tell me a story." --shape tree:5x10x60 '
    "--temperature 0.7 --greedy-drafts",
)
def watch(s: steps.WatchSettings) -> None:
    """Decode a prompt with a draft and colour every token by who proposed it, live, with a running tau.

    Without colours (a file, a pipe, NO_COLOR) brackets say the same.
    """
    from redraft.adaptation.models import open_any, template_prompts
    from redraft.data.prompts import Conversation, read_conversations
    from redraft.decode.auto import make_decoder
    from redraft.decode.requests import TokenText
    from redraft.loading import quiet
    from redraft.reports.live import Watcher, coloured, legend
    from redraft.reports.tokens import visible_text

    form, printer = parse_shape(s.shape), console()
    if s.prompts is not None:
        asked = read_conversations(s.prompts)[: s.limit]
    else:
        asked = [Conversation("prompt", [{"role": "user", "content": str(s.prompt)}])]
    with quiet():
        opened = spec(s).open()
        module = open_any(s.draft, opened, s.base_draft).draft
    opened.tap(module.config.taps)
    ready = template_prompts(asked, opened, s.max_new_tokens)
    decoder = make_decoder(opened, module, form, s.sampler, s.greedy_drafts)
    say(f"{s.sampler.describe()}, {form.describe()}, seed {s.seed}")
    printer.print(legend(coloured(printer), s.rejected))
    for conversation, each in zip(asked, ready, strict=True):
        first = next(m["content"] for m in conversation.messages if m["role"] == "user")
        say(f"\n{conversation.id}: {visible_text(first.strip())}\n")
        with Watcher(printer, TokenText(opened.tokenizer, each.ids), s.rejected) as watcher:
            decoder.generate(each.ids, s.max_new_tokens, s.seed, on_round=watcher.on_round)
