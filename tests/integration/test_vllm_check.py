"""The pure parts of the vLLM check: counters, figures, agreement. The served part is `make vllm-check`."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from redraft.errors import UserError

script = runpy.run_path(str(Path(__file__).with_name("scripts.py")))["script"]
check = script("vllm_check")
worker = script("vllm_worker")


class Engine:
    """Counters that move as vLLM's do: none at all until something was drafted."""

    def __init__(self) -> None:
        self.metrics = [SimpleNamespace(name="vllm:generation_tokens", value=7)]

    def get_metrics(self) -> list[SimpleNamespace]:
        return self.metrics

    def draft(self, drafts: int, accepted: list[int]) -> None:
        named = {"drafts": drafts, "draft_tokens": 3 * drafts, "accepted_tokens": sum(accepted)}
        self.metrics = [SimpleNamespace(name=f"vllm:spec_decode_num_{k}", value=v) for k, v in named.items()]
        self.metrics.append(SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=accepted))


def test_counters_are_read_as_differences() -> None:
    engine = Engine()
    start = worker.read_counters(engine)
    assert start == {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0, "accepted_tokens_per_pos": []}
    engine.draft(10, [6, 3, 1])
    first = worker.read_counters(engine)
    engine.draft(14, [9, 5, 1])
    second = worker.read_counters(engine)
    assert worker.difference(first, start) == {"rounds": 10, "drafted": 30, "accepted": 10, "per_position": [6, 3, 1]}
    assert worker.difference(second, first) == {"rounds": 4, "drafted": 12, "accepted": 5, "per_position": [3, 2, 0]}


def record(seconds: float, rounds: tuple[int, int], accepted: tuple[int, int]) -> dict:
    lengths = (9, 5)
    rows = [
        {
            "id": str(i),
            "seconds": seconds,
            "ids": list(range(lengths[i])),
            "rounds": rounds[i],
            "drafted": 3 * rounds[i],
            "accepted": accepted[i],
            "per_position": [accepted[i], 0, 0],
        }
        for i in range(2)
    ]
    return {"vllm": "0", "load_seconds": 1.0, "prompts": rows}


def test_figures_follow_the_definitions() -> None:
    plain = record(2.0, (0, 0), (0, 0))
    draft = record(1.0, (4, 2), (5, 2))
    draft["prompts"][1]["ids"][-1] = 99
    found = check.figures(draft, plain)
    assert found["tau"] == pytest.approx((8 + 4) / 6)
    assert found["tau_counters"]["value"] == pytest.approx(1 + 7 / 6)
    assert found["tok_s"] == pytest.approx(7.0)
    assert found["speedup"]["value"] == pytest.approx(2.0)
    assert found["acceptance_unconditional"][0] == pytest.approx(7 / 6)
    assert found["identical_to_plain"] == 1
    assert "tau" not in check.figures(plain, plain)


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ({"value": 1.5, "low": 1.4, "high": 1.6}, (True, True, True)),
        ({"value": 1.9, "low": 1.55, "high": 2.0}, (False, False, True)),
        ({"value": 1.9, "low": 1.8, "high": 2.0}, (False, False, False)),
    ],
)
def test_agreement(ours: dict[str, float], expected: tuple[bool, bool, bool]) -> None:
    found = check.agreement({"tau_interval": {"value": 1.5, "low": 1.4, "high": 1.6}}, ours)
    keys = ("vllm_in_our_interval", "ours_in_vllm_interval", "intervals_meet")
    assert tuple(found[key] for key in keys) == expected


def options(tmp_path: Path, python: str) -> argparse.Namespace:
    for name in ("target", "stale", "aligned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt_ids": [1]}\n')
    folders = {name: str(tmp_path / name) for name in ("target", "stale", "aligned")}
    sizes = {"speculative_tokens": 3, "max_new_tokens": 4, "max_model_len": 64, "eager": True}
    prompts, out = str(tmp_path / "prompts.jsonl"), str(tmp_path / "out" / "vllm-check.json")
    return argparse.Namespace(**folders, **sizes, prompts=prompts, out=out, ours=None, vllm_python=python)


def test_a_server_that_fails_is_shown_with_its_log(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no engine here\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(UserError, match=r"plain configuration \(exit 3\)(.|\n)*no engine here"):
        check.check(options(tmp_path, str(broken)), Console(quiet=True))


def test_missing_exports_and_prompts_are_named(tmp_path: Path) -> None:
    given = options(tmp_path, sys.executable)
    (tmp_path / "stale" / "config.json").unlink()
    with pytest.raises(UserError, match="--stale .* holds no config.json"):
        check.check(given, Console(quiet=True))
    (tmp_path / "stale" / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no prompts"):
        check.check(given, Console(quiet=True))


@pytest.mark.parametrize(
    ("config", "method"),
    [({"architectures": ["EagleLlamaForCausalLM"]}, "eagle"), ({"speculators_model_type": "eagle3"}, "eagle3")],
)
def test_vllm_is_told_what_kind_of_draft_it_serves(tmp_path: Path, config: dict, method: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert check.method_of(str(tmp_path)) == method
