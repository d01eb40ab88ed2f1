"""What the scripts that start vLLM's server need, made from a target and two drafts.

Writes into ``--out``: ``target/`` (adapter merged, bfloat16), ``stale/`` and ``aligned/`` (the speculators format).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from redraft.adaptation.models import open_draft, open_target
from redraft.errors import UserError
from redraft.loading import quiet
from redraft.registries import EXPORTERS


def prepare(options: argparse.Namespace, console: Console) -> None:
    """Raises ``UserError`` on bad input."""
    out = Path(options.out)
    target = open_target(options.target, "bfloat16", "cpu", adapter=options.adapter)
    folder = out / "target"
    console.print(f"target -> {folder}")
    with quiet():
        target.save(folder)
    target.name = str(folder)
    for name, source, base in (("stale", options.stale, None), ("aligned", options.aligned, options.stale)):
        draft = open_draft(source, target, base).draft.to(target.dtype)
        report = EXPORTERS.get("vllm")(draft, out / name, target, speculative_tokens=options.speculative_tokens)
        for warning in report.warnings:
            console.print(f"note: {warning}", markup=False)
        console.print(f"{name} -> {report.folder}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="the fine-tuned target: folder, hub id or `embedded`")
    parser.add_argument("--adapter", help="PEFT adapter of the target")
    parser.add_argument("--stale", required=True, help="the old draft, any format")
    parser.add_argument(
        "--aligned", required=True, help="the aligned draft, or the private part that belongs to --stale"
    )
    parser.add_argument("--out", default="out/vllm")
    parser.add_argument("--speculative-tokens", type=int, default=3)
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
