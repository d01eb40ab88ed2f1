"""Our server benchmark beside guidellm on one server: the same prompts in the same order, greedy, same concurrency.

guidellm sends text where we send token ids, so only prompts are used whose text leads back to the same ids. It counts
tokens by the server's usage, as we do. Figures of both are made alike here, from each request's own times: at
concurrency 1 tokens over the sum of request times, above that tokens over the time from the first request's start to
the last one's end. guidellm's own tokens/s (which at concurrency 1 includes its pauses between requests) stands beside.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from redraft.adaptation.models import template_prompts
from redraft.adaptation.server_bench import launched
from redraft.artifact import atomic_write_json, atomic_write_text
from redraft.data.prompts import read_conversations
from redraft.errors import UserError
from redraft.evaluate.load import ServerConfig
from redraft.evaluate.server import bench_servers
from redraft.evaluate.speed import Prompt
from redraft.loading import read_facts
from redraft.progress import progress_bar
from redraft.provenance import collect


def exact_prompts(options: argparse.Namespace) -> tuple[list[Prompt], list[str]]:
    """The prompts whose text has no other encoding than their ids, and those texts. Raises ``UserError``."""
    known: Any = read_facts(options.target)
    tokenizer = known.tokenizer
    conversations = read_conversations(options.prompts)[: options.count]
    prompts = template_prompts(conversations, known, options.max_new_tokens)
    texts = [tokenizer.decode(p.ids, skip_special_tokens=False) for p in prompts]
    pairs = [
        (p, t)
        for p, t in zip(prompts, texts, strict=True)
        if tokenizer.encode(t, add_special_tokens=False) == list(p.ids)
    ]
    if len(pairs) < max(options.concurrency):
        raise UserError(f"only {len(pairs)} of {len(prompts)} prompts of {options.prompts} survive as text")
    return [p for p, _ in pairs], [t for _, t in pairs]


def our_levels(url: str, prompts: list[Prompt], options: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Our figures by concurrency."""
    config = ServerConfig(max_new_tokens=options.max_new_tokens, concurrencies=tuple(options.concurrency))
    with progress_bar("ours", len(prompts) * len(options.concurrency), "requests") as progress:
        result = bench_servers(
            {options.name: url}, prompts, config, options.target, {}, lambda done, what: progress.update(done, now=what)
        )
    return {level["concurrency"]: level[options.name] for level in result["server"]["levels"]}


def their_level(url: str, texts: Path, count: int, streams: int, options: argparse.Namespace) -> dict[str, Any]:
    """guidellm's figures at one concurrency. Raises ``UserError`` when it fails or loses requests."""
    report = texts.with_name(f"guidellm-{streams}.json")
    report.unlink(missing_ok=True)
    backend = {
        "kind": "openai_http",
        "target": url,
        "model": options.model,
        "request_format": "/v1/completions",
        "max_tokens": options.max_new_tokens,
        "http2": False,
        "extras": {"body": {"temperature": 0, "add_special_tokens": False}},
    }
    command = [options.guidellm, "run", "--backend", json.dumps(backend)]
    command += ["--profile", json.dumps({"kind": "concurrent", "streams": [streams]})]
    command += ["--constraint", f"kind=max_requests,count={count}"]
    command += ["--tokenizer", json.dumps({"kind": "hf_auto", "model": options.target})]
    command += ["--data", json.dumps({"kind": "json_file", "path": str(texts)})]
    command += ["--output", json.dumps({"kind": "json", "path": str(report)}), "--disable-console"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    log = report.with_suffix(".log")
    with log.open("w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
    if code or not report.is_file():
        raise UserError(f"guidellm failed (exit {code}); see {log}")
    found = json.loads(report.read_text())["benchmarks"][0]
    requests = found["requests"]["successful"]
    if len(requests) != count:
        raise UserError(f"guidellm finished {len(requests)} of {count} requests; see {log}")
    return their_figures(requests, found["metrics"], streams)


def their_figures(requests: list[dict[str, Any]], metrics: dict[str, Any], streams: int) -> dict[str, Any]:
    """The figures of our table from guidellm's requests and metrics."""
    tokens = sum(r["output_metrics"]["text_tokens"] for r in requests)
    times = [(r["request_start_time"], r["request_end_time"]) for r in requests]
    wall = max(end for _, end in times) - min(start for start, _ in times)
    seconds = sum(end - start for start, end in times) if streams == 1 else wall
    return {
        "requests": len(requests),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "own_tokens_per_second": metrics["output_tokens_per_second"]["successful"]["mean"],
        "ttft_ms": metrics["time_to_first_token_ms"]["successful"]["mean"],
        "inter_token_ms": metrics["inter_token_latency_ms"]["successful"]["mean"],
        "request_ms": 1000 * metrics["request_latency"]["successful"]["mean"],
    }


def show(levels: list[dict[str, Any]], console: Console) -> None:
    """Both beside each other."""
    table = Table(title="our load and guidellm's on the same server")
    for heading in ("concurrency", "", "requests", "tokens", "tokens/s", "own tokens/s", "first token ms",
                    "a token ms", "request ms"):  # fmt: skip
        table.add_column(heading, justify="right" if heading else "left")
    for level in levels:
        for who in ("redraft", "guidellm"):
            row = level[who]
            own = row.get("own_tokens_per_second")
            table.add_row(
                str(level["concurrency"]), who, str(row["requests"]), str(row["tokens"]),
                f"{row['tokens_per_second']:.2f}", "-" if own is None else f"{own:.2f}",
                f"{row['ttft_ms']:.1f}", f"{row['inter_token_ms']:.2f}", f"{row['request_ms']:.0f}",
            )  # fmt: skip
    console.print(table)
    for level in levels:
        ratio = level["ratio"]
        console.print(f"concurrency {level['concurrency']}: ours over guidellm's tokens/s {ratio:.3f}", highlight=False)


def ours_row(level: dict[str, Any]) -> dict[str, Any]:
    """Our figures in the form of :func:`their_figures`."""
    row = {key: level[key] for key in ("requests", "tokens", "seconds")}
    row |= {key: level[key]["mean"] for key in ("ttft_ms", "inter_token_ms", "request_ms")}
    return row | {"tokens_per_second": level["tokens_per_second"]["value"]}


def check(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure with both, ours first. Raises ``UserError``."""
    out = Path(options.out)
    prompts, lines = exact_prompts(options)
    console.print(f"{len(prompts)} of {options.count} prompts have the same token ids when sent as text")
    texts = out.parent / "guidellm" / "prompts.jsonl"
    atomic_write_text(texts, "".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    running = options.server.startswith("http")
    log = texts.with_name("server.log")
    server: AbstractContextManager[str] = nullcontext(options.server) if running else launched(options.server, log)
    levels = []
    with server as url:
        ours = our_levels(url, prompts, options)
        for streams in options.concurrency:
            console.print(f"guidellm at concurrency {streams} ...")
            theirs = their_level(url, texts, len(prompts), streams, options)
            mine = ours_row(ours[streams])
            ratio = mine["tokens_per_second"] / theirs["tokens_per_second"]
            levels.append({"concurrency": streams, "redraft": mine, "guidellm": theirs, "ratio": ratio})
    version = subprocess.run([options.guidellm, "--version"], capture_output=True, text=True).stdout.strip()
    return {
        "contestant": options.name,
        "guidellm": version,
        "max_new_tokens": options.max_new_tokens,
        "sampler": "greedy",
        "levels": levels,
        "provenance": collect(seed=0, device="as the server runs"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", required=True, help="the guidellm program")
    parser.add_argument("--target", required=True, help="checkpoint folder of the target: tokenizer and config")
    parser.add_argument("--server", required=True, help="address, or the command that starts it with {port} in it")
    parser.add_argument("--name", default="aligned", help="what is served; `plain` decodes without a draft")
    parser.add_argument("--model", default="target", help="served model name")
    parser.add_argument("--prompts", required=True, help="prompt file, as for `redraft bench`")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--concurrency", default="1,4", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--out", default="out/guidellm-check.json")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        result = check(options, console)
    except UserError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
    atomic_write_json(Path(options.out), result)
    show(result["levels"], console)
    console.print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
