"""One configuration served by llama.cpp, one prompt at a time; run by ``engines_check.py``.

The package xllamacpp carries llama.cpp's server; it listens on a free local port and is asked over HTTP as any such
server is (``/completion``, ``/metrics``). This file imports xllamacpp, its neighbour and the standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
import urllib.request
from typing import Any

from worker import Answer, work, worker_parser

PREFIX = "llamacpp:spec_decode_num_"
# How the server uses a draft: as a language model of its own, or on the target's states.
TYPES = ("simple", "eagle3")
NAMES = {"drafts": "rounds", "draft_tokens": "drafted", "accepted_tokens": "accepted"}
COUNTER = re.compile(rf"^{PREFIX}(\w+)_total(?:\{{position=\"(\d+)\"\}})? (\S+)$", re.M)


def parse_counters(text: str) -> dict[str, Any]:
    """llama.cpp's speculative counters since the server started, out of its metrics page; zeros where it has none."""
    found: dict[str, Any] = {"rounds": 0, "drafted": 0, "accepted": 0, "per_position": []}
    for name, position, value in COUNTER.findall(text):
        if position:
            found["per_position"].append(int(float(value)))
        elif name in NAMES:
            found[NAMES[name]] = int(float(value))
    return found


def difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What the counters gained between two readings."""
    earlier = before["per_position"] or [0] * len(after["per_position"])
    per_position = [a - b for a, b in zip(after["per_position"], earlier, strict=True)]
    return {name: after[name] - before[name] for name in NAMES.values()} | {"per_position": per_position}


def start_server(options: argparse.Namespace) -> Any:
    """The server at one slot. A draft proposes its fixed number of tokens, however unsure it is of them."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.target
    params.n_ctx, params.n_parallel, params.endpoint_metrics = options.context, 1, True
    cache = xllamacpp.ggml_type.GGML_TYPE_F32 if options.full_cache else params.cache_type_k
    params.cache_type_k = params.cache_type_v = cache
    places = [params.cpuparams, params.cpuparams_batch]
    if options.draft:
        draft = params.speculative.draft
        draft.mparams.path = options.draft
        draft.n_max, draft.n_min, draft.p_min = options.speculative_tokens, 0, 0.0
        kind = f"COMMON_SPECULATIVE_TYPE_DRAFT_{options.type.upper()}"
        params.speculative.types = [getattr(xllamacpp.common_speculative_type, kind)]
        places += [draft.cpuparams, draft.cpuparams_batch]
        draft.cache_type_k = draft.cache_type_v = cache
    for place in places:
        place.n_threads = options.threads
    return xllamacpp.Server(params)


def ask(address: str, body: dict[str, Any] | None = None) -> str:
    """The server's answer to a body, or a page of it."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return answer.read().decode()


def start(options: argparse.Namespace) -> tuple[dict[str, Any], Answer]:
    """The package's version, and the server's greedy answers, one prompt at a time, with what its counters gained."""
    import xllamacpp

    server = start_server(options)

    def answer(prompt_ids: list[int], tokens: int) -> dict[str, Any]:
        home = server.listening_address  # asked here, so that the server lives as long as its answers are wanted
        body = {"prompt": prompt_ids, "n_predict": tokens, "temperature": 0.0}
        body |= {"cache_prompt": False, "return_tokens": True}
        before, began = parse_counters(ask(f"{home}/metrics")), time.perf_counter()
        output = json.loads(ask(f"{home}/completion", body))
        seconds = time.perf_counter() - began
        gained = difference(parse_counters(ask(f"{home}/metrics")), before)
        told = output["timings"]
        if (told.get("draft_n", 0), told.get("draft_n_accepted", 0)) != (gained["drafted"], gained["accepted"]):
            raise SystemExit(f"the answer says {told}, the metrics gained {gained}")
        return {"seconds": seconds, "ids": output["tokens"], "finish_reason": output["stop_type"]} | gained

    return {"xllamacpp": xllamacpp.__version__}, answer


def main() -> None:
    parser = worker_parser(__doc__)
    parser.add_argument("--type", default="simple", choices=TYPES, help="how the draft is used")
    parser.add_argument("--full-cache", action="store_true", help="keys and values in float32, not float16")
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    work(start, parser.parse_args())


if __name__ == "__main__":
    main()
