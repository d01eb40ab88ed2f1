"""One configuration served by vLLM, offline, one prompt at a time, in vLLM's environment.

Run by ``engines_check.py``. A process of its own per configuration frees the engine's
memory in between and keeps redraft out of vLLM's environment: this file imports vLLM, its neighbour and the
standard library only.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from worker import Answer, work, worker_parser

PREFIX = "vllm:spec_decode_num_"


def read_counters(llm: Any) -> dict[str, Any]:
    """vLLM's speculative counters since the engine started; zeros when it drafts nothing."""
    found: dict[str, Any] = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0, "accepted_tokens_per_pos": []}
    for metric in llm.get_metrics():
        name = metric.name.removeprefix(PREFIX)
        if name in found and metric.name.startswith(PREFIX):
            found[name] = list(metric.values) if hasattr(metric, "values") else int(metric.value)
    return found


def difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What the counters gained between two readings."""
    earlier = before["accepted_tokens_per_pos"] or [0] * len(after["accepted_tokens_per_pos"])
    return {
        "rounds": after["drafts"] - before["drafts"],
        "drafted": after["draft_tokens"] - before["draft_tokens"],
        "accepted": after["accepted_tokens"] - before["accepted_tokens"],
        "per_position": [a - b for a, b in zip(after["accepted_tokens_per_pos"], earlier, strict=True)],
    }


def start_engine(options: argparse.Namespace) -> Any:
    """The engine at batch 1, without prefix caching, so that every prompt pays its own prefill."""
    from vllm import LLM

    speculative = None
    if options.draft:
        speculative = {
            "model": options.draft,
            "method": options.method,
            "num_speculative_tokens": options.speculative_tokens,
        }
    return LLM(
        model=options.target,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=1,
        enable_prefix_caching=False,
        speculative_config=speculative,
        disable_log_stats=False,
        enforce_eager=options.eager,
        seed=0,
    )


def start(options: argparse.Namespace) -> tuple[dict[str, Any], Answer]:
    """vLLM's version, and its greedy answers, one prompt at a time, with what its counters gained."""
    import vllm
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    llm = start_engine(options)

    def answer(prompt_ids: list[int], tokens: int) -> dict[str, Any]:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, detokenize=False)
        before, began = read_counters(llm), time.perf_counter()
        output = llm.generate([TokensPrompt(prompt_token_ids=prompt_ids)], sampling, use_tqdm=False)[0].outputs[0]
        seconds = time.perf_counter() - began
        row = {"seconds": seconds, "ids": list(output.token_ids), "finish_reason": output.finish_reason}
        return row | difference(read_counters(llm), before)

    return {"vllm": vllm.__version__}, answer


def main() -> None:
    parser = worker_parser(__doc__)
    parser.add_argument("--method", default="eagle3", help="vLLM's name of the kind of draft")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--eager", action="store_true", help="skip compilation: starts at once, decodes more slowly")
    work(start, parser.parse_args())


if __name__ == "__main__":
    main()
