"""The engines check: our engine and transformers on tiny drafts, counters, what is kept, engines that are absent."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from redraft.decode.accept import accept_greedy
from redraft.drafts.files import save_draft
from redraft.drafts.standalone.shapes import fresh_standalone
from redraft.errors import UserError

METRICS = """# TYPE llamacpp:spec_decode_num_drafts_total counter
llamacpp:spec_decode_num_drafts_total {drafts}
llamacpp:spec_decode_num_draft_tokens_total {drafted}
llamacpp:spec_decode_num_accepted_tokens_total {accepted}
llamacpp:predicted_tokens_seconds 6.1
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{{position="0"}} {first}
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{{position="1"}} {second}
"""

script = runpy.run_path(str(Path(__file__).with_name("scripts.py")))["script"]
figures = script("engine_figures")
runs = script("engine_runs")
check = script("engines_check")
vllm_worker, llamacpp_worker = script("vllm_worker"), script("llamacpp_worker")


def console() -> Console:
    return Console(file=io.StringIO(), width=160)


@pytest.fixture
def world(tiny_target, tmp_path) -> Path:
    """``target`` and two drafts of it on disk, ``half`` and ``whole``, and three prompts."""
    target = tiny_target("llama", num_hidden_layers=2, initializer_range=0.1)
    target.save(tmp_path / "target")
    save_draft(tmp_path / "half", fresh_standalone(target, layers=[0]), {})
    save_draft(tmp_path / "whole", fresh_standalone(target, layers=[0, 1]), {})
    texts = ["three pears cost ten", "how many boxes are there", "the other apples"]
    rows = [{"id": f"p{i}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(texts)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return tmp_path


def options(world: Path, *drafts: str, more: tuple[str, ...] = ("--engines", "transformers")) -> argparse.Namespace:
    words = ["--target", str(world / "target"), "--out", str(world / "out" / "e.json"), "--work", str(world / "work")]
    words += ["--prompts", str(world / "prompts.jsonl"), "--max-new-tokens", "20", "--context", "256"]
    for draft in drafts or ("half",):
        name, _, folder = draft.rpartition("=")
        words += ["--draft", f"{name}={world / folder}" if name else str(world / folder)]
    return check.parse([*words, *more])


# -- counting --------------------------------------------------------------------------------------------------------
def test_a_row_counts_what_rounds_accepted():
    proposed = [[4, 5, 6], [7, 8, 9], [1]]
    chosen = [[4, 5, 2, 0], [3, 0, 0, 0], [1, 2]]
    accepted = [accept_greedy(torch.tensor(c), p)[0] for c, p in zip(chosen, proposed, strict=True)]
    found = figures.row("a", list(range(7)), 1.0, accepted, [len(p) for p in proposed], 3)
    assert accepted == [2, 0, 1] and (found["rounds"], found["drafted"], found["accepted"]) == (3, 7, 3)
    assert found["per_position"] == [2, 1, 0]


def test_a_round_at_the_limit_is_counted_as_the_engine_counts_it():
    """One token of prefill, then rounds that leave 4, 7, 10 and 14 tokens."""
    each = figures.row("a", list(range(14)), 1.0, [2, 2, 2, 3], [3, 3, 3, 3], 3)

    def rounds(limit: int, beyond: bool) -> list[int]:
        found = figures.counted([each], limit, 3, beyond)[0]
        assert found["ids"] == list(range(limit)) and found["rounds"] == len(found["accepted_by_round"])
        return found["accepted_by_round"]

    # With room for k tokens one kind of engine drafts k - 1, and the other three all the same.
    assert rounds(9, False) == [2, 2, 1] and rounds(9, True) == [2, 2, 2]
    assert rounds(10, False) == [2, 2, 2] == rounds(10, True), "a round begins where a token is wanted alone"
    assert rounds(11, False) == [2, 2, 2] and rounds(11, True) == [2, 2, 2, 3]
    assert rounds(12, False) == [2, 2, 2, 1] and rounds(14, False) == [2, 2, 2, 3]
    assert figures.counted([each], 9, 3, False)[0]["drafted"] == 3 + 3 + 1


def record(rounds: tuple[int, int], accepted: tuple[int, int], last: int = 4) -> list[dict[str, Any]]:
    lengths = (9, 5)
    return [
        {
            "id": str(i),
            "seconds": 1.0,
            "ids": [*range(lengths[i] - 1), last],
            "rounds": rounds[i],
            "drafted": 3 * rounds[i],
            "accepted": accepted[i],
            "per_position": [accepted[i], 0, 0],
        }
        for i in range(2)
    ]


def test_figures_follow_the_definitions():
    found = figures.beside(record((4, 2), (5, 2)), record((4, 2), (5, 2)))
    assert found["tau_engine"] == found["tau_ours"]["value"] == pytest.approx(1 + 7 / 6)
    assert found["within_interval"] and found["difference"] == 0 and found["same_counts"] == found["prompts"] == 2
    assert found["same_text"] == 2 and "same_rounds" not in found
    assert found["per_position"]["engine"][0] == pytest.approx(7 / 6)
    apart = figures.beside(record((4, 2), (0, 0)), record((4, 2), (5, 2), last=9))
    assert apart["tau_engine"] == 1 and not apart["within_interval"] and apart["same_counts"] == 0
    assert apart["accepted"] == {"engine": 0, "ours": 7} and apart["same_text"] == 0


def test_speeds_are_paired_over_prompts():
    slow = [each | {"seconds": 2.0} for each in record((0, 0), (0, 0))]
    found = figures.speeds(record((4, 2), (5, 2)), slow)
    assert found["tok_s"]["value"] == pytest.approx(7.0) and found["speedup"]["value"] == pytest.approx(2.0)
    assert found["text_as_its_own_plain"] == 2


def test_vllm_counters_are_read_as_differences():
    engine = SimpleNamespace(metrics=[SimpleNamespace(name="vllm:generation_tokens", value=7)])
    engine.get_metrics = lambda: engine.metrics

    def draft(drafts: int, accepted: list[int]) -> None:
        """Counters that move as vLLM's do: none at all until something was drafted."""
        named = {"drafts": drafts, "draft_tokens": 3 * drafts, "accepted_tokens": sum(accepted)}
        engine.metrics = [SimpleNamespace(name=f"vllm:spec_decode_num_{k}", value=v) for k, v in named.items()]
        engine.metrics.append(SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=accepted))

    start = vllm_worker.read_counters(engine)
    assert start == {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0, "accepted_tokens_per_pos": []}
    draft(10, [6, 3, 1])
    first = vllm_worker.read_counters(engine)
    draft(14, [9, 5, 1])
    second = vllm_worker.read_counters(engine)
    gained = {"rounds": 10, "drafted": 30, "accepted": 10, "per_position": [6, 3, 1]}
    assert vllm_worker.difference(first, start) == gained
    assert vllm_worker.difference(second, first) == {
        "rounds": 4,
        "drafted": 12,
        "accepted": 5,
        "per_position": [3, 2, 0],
    }


def test_llamacpp_counters_are_read_as_differences():
    assert llamacpp_worker.parse_counters("nothing of the kind 1\n")["rounds"] == 0
    first = llamacpp_worker.parse_counters(METRICS.format(drafts=10, drafted=27, accepted=8, first=6, second=2))
    assert first == {"rounds": 10, "drafted": 27, "accepted": 8, "per_position": [6, 2]}
    second = llamacpp_worker.parse_counters(METRICS.format(drafts=14, drafted=39, accepted=9, first=7, second=2))
    gained = {"rounds": 4, "drafted": 12, "accepted": 1, "per_position": [1, 0]}
    assert llamacpp_worker.difference(second, first) == gained
    assert llamacpp_worker.difference(first, llamacpp_worker.parse_counters("")) == first


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"architectures": ["EagleLlamaForCausalLM"]}, "eagle"),
        ({"architectures": ["Eagle3Speculator"]}, "eagle3"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "eagle3"),
        ({"architectures": ["Eagle3Qwen3ForCausalLM"]}, "eagle3"),
        ({"architectures": ["LlamaForCausalLM"]}, "draft_model"),
    ],
)
def test_vllm_is_told_what_kind_of_draft_it_serves(tmp_path, config, method):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert runs.method_of(tmp_path) == method


# -- the check itself ------------------------------------------------------------------------------------------------
def test_our_rounds_and_transformers_rounds_are_the_same(world):
    result = check.measure(check.prepare(options(world, "half")), console())
    found = result["engines"]["transformers"]["standalone"]
    assert found["format"] == "hf" and found["within_interval"] and found["difference"] == 0
    assert found["same_text"] == found["same_counts"] == found["same_rounds"] == found["prompts"] == 3
    assert found["accepted"]["engine"] == found["accepted"]["ours"] > 0
    assert not result["left_out"] and not result["failed"]
    shares = [each["value"] for each in found["per_position"]["ours"]]
    assert found["per_position"]["engine"] == pytest.approx(shares)
    assert found["tau_engine"] == pytest.approx(1 + sum(shares))


def test_a_target_that_drafts_for_itself_accepts_every_token(world):
    job = check.prepare(options(world, "a=half", "b=whole", more=("--engines", "transformers", "--speeds")))
    result = check.measure(job, console())
    assert set(result["engines"]["transformers"]) == {"a", "b"}
    found = result["engines"]["transformers"]["b"]
    assert found["accepted"]["engine"] == found["proposed"]["engine"] > 0
    assert found["speeds"]["tok_s"]["value"] > 0 and found["speeds"]["text_as_its_own_plain"] == 3
    page = console()
    check.show({"setup": check.setup(job, ["a", "b"])} | result, page)
    assert "float32" in page.file.getvalue() and "3 of 3" in page.file.getvalue()


def test_what_was_measured_is_not_measured_again_until_something_differs(world, monkeypatch):
    asked: list[str] = []
    before = runs.assisted
    engine = check.ENGINES["transformers"]

    def counted(job, case):
        asked.append(case.name)
        return before(job, case)

    told = vars(engine) | {"answer": counted}
    monkeypatch.setitem(check.ENGINES, "transformers", type(engine)(**told))
    first = check.measure(check.prepare(options(world)), console())
    page = console()
    second = check.measure(check.prepare(options(world)), page)
    assert asked == ["standalone"] and first == second and "measured before" in page.file.getvalue()
    check.measure(check.prepare(options(world, "standalone=whole")), console())
    assert len(asked) == 2, "another draft under the same name"
    check.measure(check.prepare(options(world, more=("--engines", "transformers", "--gamma", "2"))), console())
    check.measure(check.prepare(options(world, more=("--engines", "transformers", "--again"))), console())
    assert len(asked) == 4


def test_watching_leaves_the_library_as_it_was():
    from transformers.generation.candidate_generator import AssistedCandidateGenerator as Generator

    before = Generator.update_candidate_strategy
    with runs.watched([]):
        assert Generator.update_candidate_strategy is not before
    assert Generator.update_candidate_strategy is before


def test_engines_that_are_not_there_are_left_out_with_the_reason(world):
    asked = options(world, more=("--engines", "vllm,llamacpp", "--vllm-python", str(world / "nowhere")))
    asked.llamacpp_python = sys.executable if importlib.util.find_spec("xllamacpp") is None else str(world / "none")
    result = check.measure(check.prepare(asked), console())
    assert not result["engines"] and not result["failed"]
    assert "there is no" in result["left_out"]["vllm"] and "--vllm-python" in result["left_out"]["vllm"]
    assert "llamacpp" in result["left_out"]


def test_a_server_that_fails_is_shown_with_its_log_and_the_others_are_kept(world, monkeypatch):
    broken = world / "python"
    broken.write_text('#!/bin/sh\n[ "$1" = -c ] && { echo 9.9; exit 0; }\necho no engine here\nexit 3\n')
    broken.chmod(0o755)
    page = console()
    asked = options(world, more=("--engines", "vllm,transformers", "--vllm-python", str(broken)))
    result = check.measure(check.prepare(asked), page)
    assert result["failed"] == ["vllm-standalone"] and result["versions"]["vllm"] == "9.9"
    assert "exit 3" in page.file.getvalue() and "no engine here" in page.file.getvalue()
    assert set(result["engines"]) == {"transformers"}


def test_an_engine_that_ignores_the_draft_has_failed(world, monkeypatch):
    engine = check.ENGINES["transformers"]
    idle = lambda job, case: {"draft": [figures.row("a", [1], 1.0, [], [], 3)]}  # noqa: E731
    monkeypatch.setitem(check.ENGINES, "transformers", type(engine)(**(vars(engine) | {"answer": idle})))
    page = console()
    result = check.measure(check.prepare(options(world)), page)
    assert result["failed"] == ["transformers-standalone"] and "drafted nothing" in page.file.getvalue()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engines", "transformers,tgi"], "unknown engine 'tgi'"),
        (["--gamma", "0"], "at least 1"),
        (["--max-new-tokens", "1"], "at least 2"),
    ],
)
def test_bad_arguments_are_one_line(words, message):
    with pytest.raises(UserError, match=message):
        check.parse(["--draft", "x", *words])


def test_prompts_that_leave_no_room_and_two_drafts_of_one_name_are_refused(world):
    with pytest.raises(UserError, match="raise --context"):
        check.prepare(options(world, more=("--context", "32")))
    with pytest.raises(UserError, match="two drafts are called standalone"):
        check.measure(check.prepare(options(world, "half", "whole")), console())
