"""The paired benchmark on a tiny model: what it says must be what its generations say."""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from redraft.decode import make_decoder
from redraft.decode.engine import PlainDecoder
from redraft.decode.static import StaticChainDecoder, StaticTarget
from redraft.decode.tree import ChainShape, DynamicTree, parse_shape
from redraft.drafts.eagle3 import fresh_draft
from redraft.errors import UserError
from redraft.evaluate.costs import costs
from redraft.evaluate.speed import BenchConfig, Measured, Prompt, bench
from redraft.evaluate.summary import gains
from redraft.report.load import BenchResult, parse
from redraft.sampling import Sampler

PROMPTS = [Prompt(f"p{i}", [5 + i, 9, 40 + i, 7], task="odd" if i % 2 else "even") for i in range(5)]
SHAPES = ["chain:3", "[[0],[1],[0,0]]", "tree:3x2x5"]
SMALL = runpy.run_path(str(Path(__file__).with_name("toys.py")))["SMALL"]


def measure(target, shape="chain:3", prompts=PROMPTS, **options) -> Measured:
    drafts = {name: fresh_draft(target, range(0, 120), seed) for seed, name in enumerate(("old", "new"))}
    config = BenchConfig(parse_shape(shape), max_new_tokens=20, contest_prompts=1, alpha_prompts=2, **options)
    return bench({"float32": target}, drafts, prompts, config, {})


@pytest.fixture(scope="module")
def measured(tiny_target) -> Callable[[str], Measured]:
    """``measured(shape)`` -> a benchmark with drafts of that shape, run once."""
    return functools.cache(
        lambda shape: measure(tiny_target("llama" if shape == SHAPES[0] else "qwen2", **SMALL), shape)
    )


def test_data_types_compete_in_turns_on_the_same_prompts(tiny_target):
    """A loser's speed stands beside the winner's of the same minutes, not beside its speed later on."""
    targets = {name: tiny_target("llama", **SMALL) for name in ("float32", "bfloat16")}
    targets["bfloat16"].model.to(torch.bfloat16)
    config = BenchConfig(ChainShape(2), max_new_tokens=8, contest_prompts=2, alpha_prompts=1)
    draft = {"new": fresh_draft(targets["float32"], range(100))}
    result = bench(targets, draft, PROMPTS, config, {}).result
    plain, won = result["plain"], result["plain"]["fastest"]
    (lost,) = targets.keys() - {won}
    assert "relative" not in plain[won] and plain[lost]["relative"]["value"] <= 1
    assert result["setup"]["contest_prompts"] == {won: len(PROMPTS), lost: 2}
    assert parse(BenchResult, result, "result").plain.relative[lost].value == plain[lost]["relative"]["value"]


@pytest.mark.parametrize("shape", SHAPES)
def test_figures_are_those_of_the_generations(shape, measured):
    found = measured(shape)
    result = found.result
    for name, figures in result["drafts"].items():
        runs = found.runs[name]
        rounds = sum(len(run.rounds) for run in runs)
        assert figures["rounds"] == rounds and figures["tokens"] == sum(len(run.ids) - 1 for run in runs)
        assert figures["tau_pooled"]["value"] == pytest.approx(figures["tokens"] / rounds)
        assert figures["identical_to_plain"] == len(PROMPTS)
        assert len(figures["acceptance_conditional"]) == parse_shape(shape).depth
        assert sum(task["prompts"] for task in figures["by_task"].values()) == len(PROMPTS)
        decoding = sum(run.decode_seconds for run in runs)
        assert figures["time"]["draft"] + figures["time"]["verify"] + figures["time"]["other"] == pytest.approx(
            decoding
        )
        tau, mbsu = figures["tau_pooled"]["value"], figures["mbsu"]["bytes"]
        mean_depth = sum(record.depth for run in runs for record in run.rounds) / rounds
        assert mbsu["value"] == pytest.approx(tau / (1 + mean_depth * mbsu["cost"]))
    assert set(result["gains"]) == {"new over old"}
    assert [entry["task"] for entry in result["per_prompt"]] == [p.task for p in PROMPTS]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_report_reads_the_result(shape, measured):
    read = parse(BenchResult, measured(shape).result, "result")
    assert read.setup.gamma == 3 if shape != SHAPES[1] else 2
    assert read.drafts["new"].by_task["odd"].prompts == 2


def test_sampled_decoding_is_named_with_its_drafts(tiny_target):
    target, few = tiny_target("llama", **SMALL), PROMPTS[:2]
    setup = measure(target, prompts=few, sampler=Sampler(0.8, 0, 0.9)).result["setup"]
    assert setup["sampler"] == "temperature 0.8, top-p 0.9" and setup["draft_tokens"] == "sampled"
    setup = measure(target, "tree:2x2x3", few, sampler=Sampler(0.8), greedy_drafts=True).result["setup"]
    assert setup["draft_tokens"] == "greedy" and setup["shape"] == DynamicTree(2, 2, 3).describe()


def test_prompts_without_a_task_have_no_tasks(tiny_target):
    prompts = [Prompt("a", [4, 5, 6]), Prompt("b", [9, 8, 7])]
    result = measure(tiny_target("llama", **SMALL), prompts=prompts).result
    assert result["drafts"]["old"]["by_task"] == {} and "task" not in result["per_prompt"][0]


def test_a_draft_against_itself_gains_nothing_in_tau(measured):
    runs = measured(SHAPES[0]).runs
    assert gains({"a": runs["old"], "b": runs["old"]}, ["a", "b"])["b over a"]["tau"]["value"] == 0


def test_costs_say_nothing_about_a_run_without_rounds(tiny_target):
    target = tiny_target("llama")
    plain = [PlainDecoder(target).generate([5, 6, 7], 4)]
    assert costs(target, fresh_draft(target, range(9)), plain, plain) == {"mbsu": {}}


def test_nothing_to_measure_is_refused(tiny_target):
    with pytest.raises(UserError, match="no prompts"):
        measure(tiny_target("llama"), prompts=[])


def test_the_default_shape_is_a_chain():
    assert BenchConfig().shape == ChainShape(5) and BenchConfig().depth == 5


def test_steps_of_fixed_shapes_are_measured_like_others(tiny_target):
    target = tiny_target("llama", **SMALL)
    static = StaticTarget(target, (1, 4), 40)
    drafts = {"new": fresh_draft(target, range(0, 120), 1)}
    config = BenchConfig(ChainShape(3), max_new_tokens=20, contest_prompts=1)
    found = bench({"float32": static}, drafts, PROMPTS, config, {})
    assert isinstance(make_decoder(static, drafts["new"], ChainShape(3)), StaticChainDecoder)
    usual = bench({"float32": target}, drafts, PROMPTS, config, {})
    for name in ("plain", "new"):
        assert [run.ids for run in found.runs[name]] == [run.ids for run in usual.runs[name]]
