"""Results made up for the tests of the report: nothing in this file is a measurement.

The tests load it with ``runpy``, since test files cannot import each other.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

SCHEMA = "redraft.bench/1"
TASKS = {"gsm8k": 1.0, "mt-bench": 0.86, "humaneval": 1.08}
TEXTS = {
    "gsm8k": (
        "A baker sells 16 loaves in the morning and three times as many in the afternoon. How many is that in all?",
        "In the morning the baker sells 16 loaves.\nIn the afternoon it is three times as many, which is 3 * 16 = 48 "
        "loaves.\nAltogether the baker sells 16 + 48 = 64 loaves that day.\n#### 64",
    ),
    "mt-bench": (
        "Describe the harbour at dawn to somebody who has never seen the sea.",
        "Before the sun is up the water is the colour of slate, and it breathes: a slow rise and fall, as if the whole "
        "town were asleep on its chest. Ropes creak. Gulls quarrel over something silver. Then a line of light opens "
        "along the edge of the world, and every boat has a shadow twice its own length.",
    ),
    "humaneval": (
        "Write a Python function that tells whether a string is a palindrome, whatever its case.",
        "def is_palindrome(text: str) -> bool:\n    letters = [c.lower() for c in text if c.isalnum()]\n"
        "    return letters == letters[::-1]\n",
    ),
}
HOSTILE = ["</script>", "<img src=x onerror=alert(1)>", "\x1b[31mred\x1b[0m", "\u202eflipped", "\ufffd", "&amp;"]
HOSTILE += ["\x9b", ""]


def interval(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def draft(tau: float, speed: float, curve: list[float]) -> dict[str, Any]:
    unconditional = [1.0]
    for chance in curve:
        unconditional.append(unconditional[-1] * chance)
    rounds = round(2400 / tau)
    return {
        "dtype": "bfloat16",
        "parameters": 14_300_000,
        "tau_pooled": interval(tau, 0.07),
        "tau_macro": interval(tau + 0.03, 0.09),
        "alpha": interval(curve[0] - 0.05, 0.012),
        "acceptance_conditional": curve,
        "acceptance_unconditional": unconditional[1:],
        "tokens_per_second": interval(25 * speed, 1.4),
        "speedup": interval(speed, 0.06),
        "time": {"draft": rounds * 0.011, "verify": rounds * 0.043, "other": rounds * 0.0021, "prefill": 0.9},
        "rounds": rounds,
        "tokens": 2400,
        "identical_to_plain": 22,
    }


def bench() -> dict[str, Any]:
    """A result as the first release wrote it: none of the later additions."""
    return {
        "schema": SCHEMA,
        "provenance": {
            "time": "2026-11-21T08:37:30+00:00",
            "argv": ["redraft", "bench"],
            "versions": {"torch": "2.13.0"},
            "note": "<made up> & not measured",
        },
        "setup": {
            "target": "made-up target",
            "sampler": "greedy",
            "gamma": 5,
            "shape": "chain",
            "prompts": 24,
            "max_new_tokens": 128,
            "batch": 1,
            "seed": 0,
        },
        "plain": {
            "float32": {"tokens_per_second": interval(17.5, 0.6)},
            "bfloat16": {"tokens_per_second": interval(25.0, 0.8)},
            "fastest": "bfloat16",
        },
        "drafts": {
            "stale": draft(1.43, 0.94, [0.34, 0.22, 0.18, 0.15, 0.12]),
            "aligned": draft(2.58, 1.71, [0.71, 0.66, 0.62, 0.6, 0.57]),
        },
        "gains": {"aligned over stale": {"tau": interval(1.15, 0.11), "speed": interval(1.82, 0.1)}},
        "per_prompt": [],
    }


def pieces(text: str) -> list[str]:
    """Text cut roughly as a tokenizer does: words with the space before them, long words in two, marks alone."""
    words = re.findall(r"\n| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|\s+", text)
    return [part for word in words for part in ([word[:6], word[6:]] if len(word) > 9 else [word])]


def trace_draft(tokens: list[str], chance: float, gamma: int, seed: int, wrong: list[str]) -> dict[str, Any]:
    """Decoding ``tokens`` with a draft that guesses each one right with ``chance``."""
    order, rounds, at = random.Random(seed), [], 1
    while at < len(tokens):
        accepted = 0
        while accepted < gamma and order.random() < chance:
            accepted += 1
        truth = tokens[at : at + gamma + 1]
        accepted = min(accepted, len(truth))
        kept = min(accepted + 1, len(truth))
        proposed = truth[:accepted][:gamma]
        proposed += [order.choice(wrong) for _ in range(gamma - len(proposed))]
        rounds.append({"accepted": accepted, "kept": kept, "full": accepted == gamma, "proposed": proposed})
        at += kept
    return {"tokens": tokens, "rounds": rounds}


def traces(count: int = 3, gamma: int = 5) -> list[dict[str, Any]]:
    found = []
    for index in range(count):
        task = list(TEXTS)[index % len(TEXTS)]
        prompt, text = TEXTS[task]
        tokens = [*pieces(text), "<|im_end|>"]
        wrong = [" the", " a", ",", " and", "\n", " 4", " which", " day"]
        names = {"stale": 0.32, "aligned": 0.72}
        drafts = {name: trace_draft(tokens, c, gamma, index * 7 + 3, wrong) for name, c in names.items()}
        found.append({"id": f"{task}/{index}", "task": task, "prompt": prompt, "drafts": drafts})
    return found


def hostile_trace() -> dict[str, Any]:
    """Tokens that would act if a page or a terminal took them for its own."""
    tokens = ["first", *HOSTILE]
    whole = {"accepted": 3, "kept": 4, "full": True, "proposed": HOSTILE[:3]}
    rest = {"accepted": 1, "kept": 2, "full": False, "proposed": [HOSTILE[4], "<script>alert(2)</script>", "x"]}
    cut = {"accepted": 2, "kept": 2, "full": False, "proposed": [*HOSTILE[6:8], "y"]}
    return {
        "id": "<b>hostile</b>",
        "task": "</details>",
        "prompt": "say </script> \x1b[2J <!-- and",
        "drafts": {"stale": {"tokens": tokens, "rounds": [whole, rest, cut]}},
    }


def rich_bench(seed: int = 1) -> dict[str, Any]:
    """A result with every addition."""
    order, result = random.Random(seed), bench()
    result["setup"] |= {"shape": "chain of 5", "picked": "chain of 5, 1.71 times expected; 1.66 with 4, 1.69 with 6"}
    result["setup"]["overhead"] = 0.0034
    for name, figures in result["drafts"].items():
        tau, speed = figures["tau_pooled"]["value"], figures["speedup"]["value"]
        figures["by_task"] = {
            task: {
                "prompts": 8,
                "tau_pooled": interval(1 + (tau - 1) * scale, 0.12),
                "speedup": interval(speed * (0.9 + 0.1 * scale), 0.08),
                "tokens_per_second": interval(25 * speed * (0.9 + 0.1 * scale), 2.1),
                "plain_tokens_per_second": interval(25.0, 1.2),
            }
            for task, scale in TASKS.items()
        }
        figures["mbsu"] = {"time": {"value": tau / 1.275, "cost": 0.055}, "bytes": {"value": tau / 1.53, "cost": 0.106}}
        figures["divergence"] = {
            "prompts": 24, "identical": 20, "near_ties": 4, "first_divergence_gap": [0.0, 0.0078, 0.0156, 0.0313],
        }  # fmt: skip
        figures["quality"] = {
            "gsm8k": {
                "rule": "final number",
                "scored": 8,
                "correct": 5,
                "score": interval(0.625, 0.31),
                "difference": interval(0.0, 0.0),
                "changed": 0,
            }
        }
        figures["ideal_speedup"] = tau / 1.275
        result["drafts"][name] = figures
    result["plain_quality"] = {"gsm8k": {"scored": 8, "correct": 5, "score": interval(0.625, 0.31)}}
    result["per_prompt"] = [
        {
            "id": f"{task}/{index}",
            "task": task,
            "plain": {"tokens": 101, "seconds": 4.0},
            "drafts": {
                name: {"tokens": 101, "rounds": rounds, "seconds": rounds * 0.0561 + 0.03, "accepted": []}
                for name, rounds in (("stale", order.randint(60, 78)), ("aligned", order.randint(34, 48)))
            },
        }
        for task in TASKS
        for index in range(8)
    ]
    result["traces"] = traces()
    return result


def fabricate(folder: Path, result: dict[str, Any] | None = None) -> dict[str, Path]:
    """A result, a curve, a ledger and a summary with made-up figures, as files."""
    stages = [
        {
            "stage": "regenerate",
            "tokens": 45_000,
            "flops": 1.3e13,
            "formula": "2 * target parameters * tokens",
            "seconds": 66.0,
            "peak_memory_bytes": 1_400_000_000,
            "bytes_written": 560_000,
        },
        {
            "stage": "train",
            "tokens": 90_000,
            "flops": 3.9e12,
            "formula": "6 * trained * tokens",
            "seconds": 187.0,
            "peak_memory_bytes": 2_100_000_000,
            "bytes_written": 4_300_000,
        },
    ]
    curve = [{"step": s, "tokens": s * 1500, "seconds": s * 3.1, "loss": 1.2 + 2.4 / (1 + s / 9)} for s in range(60)]
    for point in curve[::10]:
        point["heldout_tau"] = 1.4 + 1.1 * (1 - 1 / (1 + point["step"] / 12))
    summary = {
        "tau": {"stale": 1.4, "aligned": 2.5, "full": 2.6},
        "speedup": {"stale": 0.94, "aligned": 1.71},
        "trained_fraction_of_full": 0.16,
        "minutes": 8.2,
        "provenance": {},
    }
    paths = {name: folder / name for name in ("bench.json", "ledger.json", "curve.jsonl", "summary.json")}
    paths["bench.json"].write_text(json.dumps(bench() if result is None else result))
    paths["ledger.json"].write_text(json.dumps({"stages": stages}))
    paths["curve.jsonl"].write_text("".join(json.dumps(point) + "\n" for point in curve))
    paths["summary.json"].write_text(json.dumps(summary))
    return paths


def server() -> dict[str, Any]:
    """Levels of concurrency, plain and with a draft."""
    levels = []
    for requests in (1, 2, 4, 8, 16):
        spread = 3 * requests**0.5
        wait = {
            "ttft": interval(0.05 * requests**0.5, 0.01),
            "ttft_ms": {"mean": 55.0, "p50": 50 * requests**0.5, "p99": 97 * requests**0.5},
            "inter_token_ms": {"mean": 31.0, "p50": 30.0, "p99": 62.0},
        }
        done = {"requests": 24, "failed": 0}
        plain = {"tokens_per_second": interval(25 * requests**0.8, spread), **wait, **done}
        fast = {"tokens_per_second": interval(42 * requests**0.65, spread), "tau": interval(2.5, 0.1), **wait, **done}
        fast["speedup"] = {"value": 1.68 * requests**-0.15, "low": None, "high": None}
        levels.append({"concurrency": requests, "plain": plain, "aligned": fast})
    levels[-1]["aligned"]["failed"] = 1
    failures = [{"server": "aligned", "concurrency": 16, "id": "gsm8k/3", "reason": "timed out after 60 s <made up>"}]
    notes = ["aligned: the server counts rounds of the warm-up too"]
    return {"levels": levels, "notes": notes, "failures": failures}
