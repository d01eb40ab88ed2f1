"""``watch``: decode with a draft in the terminal and see who proposed which token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from redraft.cli.common import (
    Adapter,
    BaseDraft,
    Command,
    Device,
    DraftName,
    Dtype,
    Seed,
    TargetName,
    TemplateArgs,
    console,
    examples,
    sampler_of,
    say,
)
from redraft.errors import UserError

if TYPE_CHECKING:
    from redraft.data.prompts import Conversation


def register(app: typer.Typer) -> None:
    """Add ``watch`` to ``app``."""
    app.command(
        cls=Command,
        epilog=examples(
            'redraft watch --target my-model --draft run/merged --prompt "How many eggs are left?"',
            "redraft watch --target my-model --draft old-draft --prompts prompts.jsonl --limit 3 --rejected",
            'redraft watch --target my-model --draft run/merged --prompt "Tell me a story." --shape tree:5x10x60 '
            "--temperature 0.7 --greedy-drafts",
        ),
    )(watch)


def watch(
    target: TargetName,
    draft: DraftName,
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompts from a file or datasets:NAME, instead.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many of --prompts are decoded.")] = 1,
    shape: Annotated[str, typer.Option(help="chain:5, tree:5x10x60 (depth x top-k x nodes), or paths.")] = "chain:5",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens to sample from; 0 is all.")] = 0,
    greedy_drafts: Annotated[
        bool, typer.Option("--greedy-drafts", help="Propose the likeliest, also when sampling.")
    ] = False,
    rejected: Annotated[bool, typer.Option("--rejected", help="Show the rejected proposals too.")] = False,
    adapter: Adapter = None,
    base_draft: BaseDraft = None,
    template_arg: TemplateArgs = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Decode a prompt with a draft and colour every token by who proposed it, live, with a running tau.

    Without colours (a file, a pipe, NO_COLOR) brackets say the same.
    """
    from redraft.adaptation.models import open_proposer, template_prompts
    from redraft.adaptation.steps import TargetSpec
    from redraft.data.template import parse_template_args
    from redraft.decode.make import make_decoder
    from redraft.decode.pieces import TokenText
    from redraft.decode.tree import parse_shape
    from redraft.loading import quiet
    from redraft.report.live import Watcher, coloured, legend

    sampler, form = sampler_of(temperature, top_k, top_p), parse_shape(shape)
    conversations = asked(prompt, prompts, limit)
    spec = TargetSpec(target, dtype, device, adapter, parse_template_args(template_arg or []))
    with quiet():
        opened = spec.open()
        module, _ = open_proposer(draft, opened, base_draft)
    opened.tap(module.config.taps)
    ready = template_prompts(conversations, opened, max_new_tokens)
    decoder = make_decoder(opened, module, form, sampler, greedy_drafts)
    printer = console()
    say(f"{sampler.describe()}, {form.describe()}, seed {seed}")
    printer.print(legend(coloured(printer), rejected))
    for conversation, each in zip(conversations, ready, strict=True):
        print_prompt(conversation)
        watcher = Watcher(printer, TokenText(opened.tokenizer, each.ids), rejected)
        with watcher:
            decoder.generate(each.ids, max_new_tokens, seed, on_round=watcher.on_round)


def asked(prompt: str | None, prompts: str | None, limit: int) -> list[Conversation]:
    """The one prompt, or the first of a file. Raises ``UserError`` when neither or both are given."""
    from redraft.data.prompts import Conversation, read_conversations

    if (prompt is None) == (prompts is None):
        raise UserError('watch needs one of --prompt "TEXT" and --prompts FILE')
    if prompt is None:
        assert prompts is not None
        return read_conversations(prompts)[:limit]
    if not prompt.strip():
        raise UserError("--prompt is empty; give a question to answer")
    return [Conversation("prompt", [{"role": "user", "content": prompt}])]


def print_prompt(conversation: Conversation) -> None:
    """The first user turn, so that the answer below it can be judged."""
    from redraft.report.tokens import visible_text

    first = next(m["content"] for m in conversation.messages if m["role"] == "user")
    say(f"\n{conversation.id}: {visible_text(first.strip())}\n")
