"""The embedded target served by vLLM plain, with the stale draft and with the aligned draft, side by side.

Each configuration runs in a process of its own (``vllm_worker.py``, in vLLM's environment); they take the same prompts
in turn (``turns.py``), greedy, batch 1, bfloat16. tau comes from vLLM's own counters; beside it stands our chain
engine's tau on the same prompts, where the caller gives it. Both engines' texts part where bfloat16 rounding differs,
so agreement is asked of the bootstrap interval over prompts, not of every round.

Two ways to count, both printed:
  tau          tokens that the rounds produced, after the stop rule's cut, / rounds (the definition in metrics.py);
  tau_counters 1 + accepted / rounds, straight from the counters: the last round is not cut.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from redraft.artifact import atomic_write_json
from redraft.errors import UserError
from redraft.evaluate.statistics import Interval, paired_ratio, ratio_of_sums
from redraft.provenance import collect
from turns import Worker, take_turns

WORKER = Path(__file__).with_name("vllm_worker.py")


def served(name: str, draft: str, options: argparse.Namespace, work: Path, *more: str) -> Worker:
    """A worker with one configuration; its output goes to ``work/NAME.log``, ``more`` to the worker."""
    record = work / f"{name}.json"
    command = [options.vllm_python, str(WORKER), "--target", options.target, "--draft", draft]
    command += ["--prompts", options.prompts, "--out", str(record), "--max-model-len", str(options.max_model_len)]
    command += ["--speculative-tokens", str(options.speculative_tokens)]
    command += ["--max-new-tokens", str(options.max_new_tokens)]
    command += [*(["--eager"] if options.eager else []), *more]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    }
    return Worker(f"vLLM failed on the {name} configuration", command, record, environment)


def method_of(draft: str) -> str:
    """vLLM's name of the kind of an exported draft."""
    config = json.loads((Path(draft) / "config.json").read_text())
    return "eagle" if "EagleLlamaForCausalLM" in config.get("architectures", []) else "eagle3"


def figures(record: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """What the result file says of one configuration. Intervals are paired over prompts with ``plain``."""
    rows, base = record["prompts"], plain["prompts"]
    found = speeds(rows) | {"load_seconds": record["load_seconds"]}
    if not any(row["rounds"] for row in rows):
        return found
    return found | counts(rows) | against(rows, base)


def speeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens and tokens a second."""
    tokens = [len(row["ids"]) for row in rows]
    rate = ratio_of_sums(tokens, [row["seconds"] for row in rows])
    return {"tok_s": rate.value, "tok_s_interval": rate.to_dict(), "tokens": sum(tokens)}


def counts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """tau and what it is made of, both ways to count."""
    rounds, accepted = [row["rounds"] for row in rows], [row["accepted"] for row in rows]
    tau = ratio_of_sums([len(row["ids"]) - 1 for row in rows], rounds)
    counted = ratio_of_sums([a + r for a, r in zip(accepted, rounds, strict=True)], rounds)
    per_position = [sum(column) / sum(rounds) for column in zip(*(row["per_position"] for row in rows), strict=True)]
    return {
        "tau": tau.value,
        "tau_interval": tau.to_dict(),
        "tau_counters": counted.to_dict(),
        "rounds": sum(rounds),
        "drafted": sum(row["drafted"] for row in rows),
        "accepted": sum(accepted),
        "acceptance_unconditional": per_position,
    }


def against(rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Speed-up over plain decoding, paired over prompts, and how many texts are the same."""
    (tokens, seconds), plain = [
        ([len(row["ids"]) for row in part], [row["seconds"] for row in part]) for part in (rows, base)
    ]
    return {
        "speedup": paired_ratio((tokens, seconds), plain).to_dict(),
        "identical_to_plain": sum(row["ids"] == other["ids"] for row, other in zip(rows, base, strict=True)),
    }


def agreement(found: dict[str, Any], ours: dict[str, float]) -> dict[str, Any]:
    """Whether each engine's tau lies within the other's interval or the intervals meet; all three are told."""
    theirs, mine = Interval(**found["tau_interval"]), Interval(**ours)
    return {
        "ours": mine.to_dict(),
        "vllm_in_our_interval": mine.low <= theirs.value <= mine.high,
        "ours_in_vllm_interval": theirs.low <= mine.value <= theirs.high,
        "intervals_meet": theirs.low <= mine.high and mine.low <= theirs.high,
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The table for a reader."""
    title = f"vLLM {result['vllm']} on this machine's CPU: {result['prompts']} prompts, greedy, batch 1, bfloat16"
    table = Table(title=f"{title}, {result['speculative_tokens']} drafted tokens")
    for heading in ("", "tau (vLLM)", "tau (our chain)", "1 + accepted/rounds", "tokens/s", "speed-up", "same text"):
        table.add_column(heading, justify="left" if not heading else "right")

    def span(interval: dict[str, float] | None, digits: int = 2) -> str:
        if interval is None:
            return "-"
        value, low, high = (f"{interval[key]:.{digits}f}" for key in ("value", "low", "high"))
        return f"{value} [{low}, {high}]"

    for name in ("plain", "stale", "aligned"):
        row = result[name]
        same = f"{row['identical_to_plain']} of {result['prompts']}" if "rounds" in row else "-"
        table.add_row(
            name,
            span(row.get("tau_interval")),
            span(row.get("agreement", {}).get("ours")),
            span(row.get("tau_counters")),
            span(row["tok_s_interval"], 1),
            span(row.get("speedup")) if "rounds" in row else "1",
            same,
        )
    console.print(table)


def check(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the three configurations and gather the result. Raises ``UserError`` on bad input or a failed server."""
    for label in ("target", "stale", "aligned"):
        if not (Path(getattr(options, label)) / "config.json").is_file():
            raise UserError(f"--{label} {getattr(options, label)} holds no config.json; export it first")
    try:
        prompts = [json.loads(line) for line in Path(options.prompts).read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts {options.prompts} cannot be read: {error}") from error
    if not prompts:
        raise UserError(f"--prompts {options.prompts} holds no prompts")
    ours = json.loads(Path(options.ours).read_text()) if options.ours else {}
    work = Path(options.out).parent / "vllm"
    work.mkdir(parents=True, exist_ok=True)
    start = {}
    for name, draft in (("plain", ""), ("stale", options.stale), ("aligned", options.aligned)):
        more = ["--method", method_of(draft)] if draft else []
        start[name] = partial(served, name, draft, options, work, *more)
    records = take_turns(start, len(prompts), lambda text: console.print(f"vLLM: {text}", highlight=False))
    result: dict[str, Any] = {name: figures(record, records["plain"]) for name, record in records.items()}
    for name in ("stale", "aligned"):
        if "tau" not in result[name]:
            raise UserError(
                f"vLLM counted no drafts for {name}: it served the target without it; see {work}/{name}.log"
            )
        if name in ours:
            result[name]["agreement"] = agreement(result[name], ours[name]["tau"])
    return result | {
        "prompts": len(prompts),
        "max_new_tokens": options.max_new_tokens,
        "speculative_tokens": options.speculative_tokens,
        "sampler": "greedy",
        "batch": 1,
        "dtype": "bfloat16",
        "compiled": not options.eager,
        "vllm": records["plain"]["vllm"],
        "provenance": collect(seed=0, device="cpu"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="checkpoint folder of the fine-tuned target")
    parser.add_argument("--stale", required=True, help="export folder of the stale draft")
    parser.add_argument("--aligned", required=True, help="export folder of the aligned draft")
    parser.add_argument("--prompts", required=True, help='JSONL of {"id", "prompt_ids": [...]}')
    parser.add_argument("--ours", help='JSON of our chain\'s tau: {"stale": {"tau": {value, low, high}}, ...}')
    parser.add_argument("--out", default="out/vllm-check.json")
    parser.add_argument("--speculative-tokens", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--eager", action="store_true", help="without compilation: starts at once, speeds mean little")
    parser.add_argument("--vllm-python", default=sys.executable, help="the interpreter that has vLLM")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        result = check(options, console)
    except UserError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
    atomic_write_json(Path(options.out), result)
    show(result, console)
    console.print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
