"""What the vLLM check needs, made from a target and two drafts: a checkpoint, two exports, prompts, our own figures.

Writes into ``--out``: ``target/`` (adapter merged, bfloat16), ``stale/`` and ``aligned/`` (the speculators format),
``prompts.jsonl`` with the token ids that both engines decode, and ``ours.json``, the tau of our chain engine on those
prompts at the same draft length, token limit and data type.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from redraft.adaptation.models import open_draft, open_target, template_prompts
from redraft.artifact import atomic_write_json, atomic_write_text
from redraft.data.prompts import read_conversations
from redraft.decode.engine import ChainDecoder
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.errors import UserError
from redraft.evaluate.statistics import ratio_of_sums
from redraft.loading import quiet
from redraft.registries import EXPORTERS
from redraft.target import Target


def prompt_ids(target: Target, path: str, count: int, room: int) -> list[dict[str, Any]]:
    """The first ``count`` prompts through the target's chat template, those left out that exceed ``room`` tokens.

    Raises ``UserError`` when none is left.
    """
    templated = template_prompts(read_conversations(path)[:count], target, 1)
    found = [{"id": prompt.id, "prompt_ids": prompt.ids} for prompt in templated if len(prompt.ids) <= room]
    if not found:
        raise UserError(f"{path} holds no prompt of at most {room} tokens")
    return found


def our_figures(
    target: Target, draft: Eagle3Draft, prompts: Sequence[dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """tau of our greedy chain, as metrics.py defines it and as vLLM's counters would give it."""
    decoder = ChainDecoder(target, draft, options.speculative_tokens)
    runs = [decoder.generate(prompt["prompt_ids"], options.max_new_tokens) for prompt in prompts]
    rounds = [len(run.rounds) for run in runs]
    accepted = [sum(record.accepted for record in run.rounds) for run in runs]
    return {
        "tau": ratio_of_sums([len(run.ids) - 1 for run in runs], rounds).to_dict(),
        "tau_counters": ratio_of_sums([a + r for a, r in zip(accepted, rounds, strict=True)], rounds).to_dict(),
        "rounds": sum(rounds),
    }


def prepare(options: argparse.Namespace, console: Console) -> None:
    """Raises ``UserError`` on bad input."""
    out = Path(options.out)
    target = open_target(options.target, "bfloat16", "cpu", adapter=options.adapter)
    folder = out / "target"
    console.print(f"target -> {folder}")
    with quiet():
        target.save(folder)
    target.name = str(folder)
    room = options.max_model_len - options.max_new_tokens - options.speculative_tokens - 1
    prompts = prompt_ids(target, options.prompts, options.count, room)
    atomic_write_text(out / "prompts.jsonl", "".join(json.dumps(prompt) + "\n" for prompt in prompts))
    ours: dict[str, Any] = {}
    for name, source, base in (("stale", options.stale, None), ("aligned", options.aligned, options.stale)):
        draft = open_draft(source, target, base).draft.to(target.dtype)
        report = EXPORTERS.get("vllm")(draft, out / name, target, speculative_tokens=options.speculative_tokens)
        for warning in report.warnings:
            console.print(f"note: {warning}", markup=False)
        console.print(f"{name} -> {report.folder}; our chain on {len(prompts)} prompts ...")
        ours[name] = our_figures(target, draft, prompts, options)
    atomic_write_json(out / "ours.json", ours)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="the fine-tuned target: folder, hub id or `embedded`")
    parser.add_argument("--adapter", help="PEFT adapter of the target")
    parser.add_argument("--stale", required=True, help="the old draft, any format")
    parser.add_argument(
        "--aligned", required=True, help="the aligned draft, or the private part that belongs to --stale"
    )
    parser.add_argument("--prompts", required=True, help="prompt file, as for `redraft bench`")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--out", default="out/vllm")
    parser.add_argument("--speculative-tokens", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=1024)
    options = parser.parse_args()
    console = Console()
    try:
        prepare(options, console)
    except UserError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
