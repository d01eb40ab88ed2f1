"""The engines script: its own two engines on a tiny pair, counters, figures, and engines that are not there."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
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
engines = script("standalone_engines")
worker = script("llamacpp_worker")


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


def options(world: Path, draft: str = "half", *more: str) -> argparse.Namespace:
    words = ["--target", str(world / "target"), "--draft", str(world / draft), "--out", str(world / "out" / "e.json")]
    words += ["--prompts", str(world / "prompts.jsonl"), "--dtype", "float32", "--max-new-tokens", "20"]
    return engines.parse([*words, "--context", "256", *more])


def test_our_rounds_and_transformers_rounds_are_the_same(world):
    job = engines.prepare(options(world, "half", "--engines", "redraft,transformers"))
    result = engines.measure(job, console())
    ours, theirs = result["engines"]["redraft"], result["engines"]["transformers"]
    assert theirs["same_text_as_redraft"] == theirs["same_rounds_as_redraft"] == 3
    assert ours["identical_to_plain"] == theirs["identical_to_plain"] == 3
    assert ours["accepted"] >= theirs["accepted"] > 0 and not result["left_out"] and not result["failed"]
    # Where one token is left we draft one, and transformers none.
    assert [a["rounds"] - b["rounds"] for a, b in zip(ours["per_prompt"], theirs["per_prompt"], strict=True)]
    for found in (ours, theirs):
        assert found["block_efficiency"]["value"] == pytest.approx(1 + found["accepted"] / found["rounds"])
        assert sum(found["acceptance_unconditional"]) == pytest.approx(found["accepted"] / found["rounds"])
        assert found["draft"]["tok_s"] > 0 and found["speedup"]["value"] > 0


def test_a_target_that_drafts_for_itself_accepts_every_token(world):
    job = engines.prepare(options(world, "whole", "--engines", "redraft,transformers", "--counts-only"))
    result = engines.measure(job, console())
    for found in result["engines"].values():
        assert found["accepted"] == found["proposed"] > 0
        assert not {"plain", "draft", "speedup"} & set(found), "no speeds from a busy machine"
    page = console()
    engines.show(result, page)
    assert "float32" in page.file.getvalue() and "tok/s" in page.file.getvalue()


def test_watching_leaves_the_library_as_it_was():
    from transformers.generation.candidate_generator import AssistedCandidateGenerator as Generator

    before = Generator.update_candidate_strategy
    with engines.watched([]):
        assert Generator.update_candidate_strategy is not before
    assert Generator.update_candidate_strategy is before


def test_a_row_counts_what_rounds_accepted():
    proposed = [[4, 5, 6], [7, 8, 9], [1]]
    chosen = [[4, 5, 2, 0], [3, 0, 0, 0], [1, 2]]
    import torch

    accepted = [accept_greedy(torch.tensor(c), p)[0] for c, p in zip(chosen, proposed, strict=True)]
    found = engines.row("a", list(range(7)), 1.0, accepted, [len(p) for p in proposed], 3)
    assert accepted == [2, 0, 1] and (found["rounds"], found["drafted"], found["accepted"]) == (3, 7, 3)
    assert found["per_position"] == [2, 1, 0]


def test_llamacpp_counters_are_read_as_differences():
    assert worker.parse_counters("nothing of the kind 1\n")["rounds"] == 0
    first = worker.parse_counters(METRICS.format(drafts=10, drafted=27, accepted=8, first=6, second=2))
    assert first == {"rounds": 10, "drafted": 27, "accepted": 8, "per_position": [6, 2]}
    second = worker.parse_counters(METRICS.format(drafts=14, drafted=39, accepted=9, first=7, second=2))
    assert worker.difference(second, first) == {"rounds": 4, "drafted": 12, "accepted": 1, "per_position": [1, 0]}
    start = worker.parse_counters("")
    assert worker.difference(first, start) == first


def test_engines_that_are_not_there_are_left_out_with_the_reason(world):
    asked = options(world, "half", "--engines", "vllm,llamacpp", "--vllm-python", str(world / "nowhere"))
    asked.llamacpp_python = sys.executable if importlib.util.find_spec("xllamacpp") is None else str(world / "none")
    result = engines.measure(engines.prepare(asked), console())
    assert not result["engines"] and not result["failed"]
    assert "there is no" in result["left_out"]["vllm"] and "--vllm-python" in result["left_out"]["vllm"]
    assert "llamacpp" in result["left_out"]


def test_an_engine_that_fails_is_told_and_the_others_are_kept(world, monkeypatch):
    broken = lambda job: {"plain": [], "draft": []}  # noqa: E731  a server that ignored the drafter
    monkeypatch.setitem(engines.ENGINES, "transformers", broken)
    job = engines.prepare(options(world, "half", "--engines", "redraft,transformers"))
    result = engines.measure(job, console())
    assert result["failed"] == ["transformers"] and "drafted nothing" in result["left_out"]["transformers"]
    assert set(result["engines"]) == {"redraft"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engines", "redraft,tgi"], "unknown engine 'tgi'"),
        (["--gamma", "0"], "at least 1"),
        (["--max-new-tokens", "1"], "at least 2"),
    ],
)
def test_bad_arguments_are_one_line(words, message):
    with pytest.raises(UserError, match=message):
        engines.parse(["--draft", "x", *words])


def test_prompts_that_leave_no_room_are_refused(world):
    with pytest.raises(UserError, match="raise --context"):
        engines.prepare(options(world, "half", "--context", "32"))
