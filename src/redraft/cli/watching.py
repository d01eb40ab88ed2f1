"""What ``redraft watch`` shows: prompts decoded with a draft, live."""

from __future__ import annotations

from rich.console import Console

from redraft.adaptation.models import TargetSpec, open_any, template_prompts
from redraft.data.prompts import Conversation, read_conversations
from redraft.decode.auto import make_decoder
from redraft.decode.requests import TokenText
from redraft.loading import quiet
from redraft.reports.live import Watcher, coloured, legend
from redraft.reports.tokens import visible_text
from redraft.settings.measure import WatchSettings
from redraft.settings.shapes import parse_shape


def watch_prompts(settings: WatchSettings, spec: TargetSpec, printer: Console) -> None:
    """Decode the prompts of ``settings`` and colour every token by who proposed it. Raises ``UserError``."""
    s, form = settings, parse_shape(settings.shape)
    if s.prompts is not None:
        asked = read_conversations(s.prompts)[: s.limit]
    else:
        asked = [Conversation("prompt", [{"role": "user", "content": str(s.prompt)}])]
    with quiet():
        opened = spec.open()
        module = open_any(s.draft, opened, s.base_draft).draft
    opened.tap(module.config.taps)
    ready = template_prompts(asked, opened, s.max_new_tokens)
    decoder = make_decoder(opened, module, form, s.sampler, s.greedy_drafts)
    print(f"{s.sampler.describe()}, {form.describe()}, seed {s.seed}")
    printer.print(legend(coloured(printer), s.rejected))
    for conversation, each in zip(asked, ready, strict=True):
        first = next(m["content"] for m in conversation.messages if m["role"] == "user")
        print(f"\n{conversation.id}: {visible_text(first.strip())}\n")
        watcher = Watcher(printer, TokenText(opened.tokenizer, each.ids), s.rejected)
        with watcher:
            decoder.generate(each.ids, s.max_new_tokens, s.seed, on_round=watcher.on_round)
