"""The paired benchmark on a tiny model: what it says must be what its generations say."""

from __future__ import annotations

import functools
import io
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from redraft.decode.auto import make_decoder
from redraft.decode.engine import PlainDecoder
from redraft.decode.static import StaticChainDecoder, StaticTarget
from redraft.drafts.eagle3 import fresh_draft
from redraft.errors import UserError
from redraft.evaluate import speed
from redraft.evaluate.divergence import plain_text
from redraft.evaluate.figures import costs, gains, tally
from redraft.evaluate.speed import BenchConfig, Measured, Prompt, bench
from redraft.reports.load import BenchResult, parse
from redraft.reports.sections import slower
from redraft.reports.tables import bench_table
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape, DynamicTree, parse_shape

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


class Paced:
    """Decoders that answer as the real ones do, and take the seconds that a table names for contestant and type."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[tuple[str, str], float]) -> None:
        self.seconds, self.order = seconds, []
        real = speed._decoder
        self.names: dict[int, str] = {}

        def decoder(target, draft, config):
            made = real(target, draft, config)
            name = self.names.get(id(draft), "plain")
            made.generate = self.paced(made.generate, name, str(target.dtype).removeprefix("torch."))
            return made

        monkeypatch.setattr(speed, "_decoder", decoder)

    def paced(self, generate, name: str, dtype: str):
        def run(ids, max_new_tokens, seed):
            found = generate(ids, max_new_tokens, seed)
            if max_new_tokens == TOKENS:
                self.order.append((name, dtype, ids[0]))
            # Seconds for every token, whatever the machine does meanwhile.
            return replace(found, prefill_seconds=0.0, decode_seconds=self.seconds[name, dtype] * len(found.ids))

        return run


TOKENS = 20  # more than a warm-up decodes


@pytest.fixture
def contest(tiny_target, monkeypatch) -> Callable[..., tuple[Measured, Paced]]:
    """``contest({(contestant, type): seconds a token})`` -> a benchmark of two drafts and the order of its turns."""

    def run(seconds: dict[tuple[str, str], float], **options) -> tuple[Measured, Paced]:
        targets = {name: tiny_target("llama", **SMALL) for name in ("float32", "bfloat16")}
        targets["bfloat16"].model.to(torch.bfloat16)
        drafts = {name: fresh_draft(targets["float32"], range(100), seed) for seed, name in enumerate(("old", "new"))}
        paced = Paced(monkeypatch, seconds)
        paced.names = {id(draft): name for name, draft in drafts.items()}
        config = BenchConfig(ChainShape(2), max_new_tokens=TOKENS, alpha_prompts=1, **options)
        return bench(targets, drafts, PROMPTS, config, {}), paced

    return run


# At one row a pass bfloat16 is the faster, at several float32: a processor without AVX512.
SPLIT = {
    ("plain", "float32"): 0.010, ("plain", "bfloat16"): 0.009,
    ("old", "float32"): 0.012, ("old", "bfloat16"): 0.030,
    ("new", "float32"): 0.006, ("new", "bfloat16"): 0.008,
}  # fmt: skip


def test_every_contestant_runs_in_the_type_that_is_fastest_for_it(contest):
    measured, _ = contest(SPLIT)
    result = measured.result
    assert result["plain"]["fastest"] == result["setup"]["dtype"] == "bfloat16"
    assert {name: found["dtype"] for name, found in result["drafts"].items()} == {"old": "float32", "new": "float32"}
    assert {name: str(target.dtype) for name, target in measured.targets.items()} == {
        "plain": "torch.bfloat16", "old": "torch.float32", "new": "torch.float32",
    }  # fmt: skip
    # Speed-ups are over the fastest plain decoding, whatever the draft's type.
    assert result["drafts"]["new"]["speedup"]["value"] == pytest.approx(0.009 / 0.006)
    assert result["drafts"]["old"]["speedup"]["value"] == pytest.approx(0.009 / 0.012)
    assert result["plain"]["float32"]["relative"]["value"] == pytest.approx(0.9)
    assert result["contest"]["new"]["bfloat16"]["tokens_per_second"] == pytest.approx(125)


def test_a_type_that_is_clearly_beaten_is_left_out_of_further_prompts(contest):
    measured, paced = contest(SPLIT, contest_prompts=3)
    prompts = {n: {t: v["prompts"] for t, v in by.items()} for n, by in measured.result["contest"].items()}
    assert prompts == {
        "plain": {"float32": 3, "bfloat16": 3},  # 1.1 apart: all prompts
        "old": {"float32": 1, "bfloat16": 1},  # 2.5 apart: clear at once
        "new": {"float32": 2, "bfloat16": 2},  # 1.3 apart: clear after two
    }
    assert measured.result["setup"]["contest_prompts"] == {"bfloat16": len(PROMPTS), "float32": 3}
    # In turns: who begins rotates, and every prompt is decoded by all before the next.
    held = paced.order[:12]
    assert [ids for _, _, ids in held] == [5] * 6 + [6] * 4 + [7] * 2
    assert held[0][:2] != held[6][:2]


def test_texts_are_held_against_plain_decoding_in_the_drafts_own_type(contest):
    """In float32 all are equal to it, also where plain decoding of the contest's winner rounds otherwise."""
    measured, _ = contest(SPLIT)
    assert all(found["identical_to_plain"] == len(PROMPTS) for found in measured.result["drafts"].values())
    for name in ("old", "new"):
        target = measured.targets[name]
        assert measured.expected[name] == [PlainDecoder(target).generate(p.ids, TOKENS).ids for p in PROMPTS]
    # A wrong token is seen, and what should stand there.
    prompt, text = PROMPTS[0], list(measured.runs["new"][0].ids)
    spoiled = [*text[:7], (text[7] + 1) % 100, *text[8:]]
    assert plain_text(prompt.ids, spoiled, measured.targets["new"]) == text[:8]


def test_one_type_alone_holds_no_contest(tiny_target, monkeypatch):
    monkeypatch.setattr(speed, "contest", lambda *given: pytest.fail("a contest"))
    result = measure(tiny_target("llama", **SMALL), prompts=PROMPTS[:2]).result
    assert result["contest"] == {} and result["setup"]["contest_prompts"] == {"float32": 2}
    assert {found["dtype"] for found in result["drafts"].values()} == {"float32"}


def test_what_is_slower_than_plain_decoding_is_called_so(contest):
    result = contest(SPLIT)[0].result
    read = parse(BenchResult, result, "result")
    (line,) = slower(read)
    assert line.startswith("old is slower than plain decoding: 0.75")
    shown = io.StringIO()
    Console(file=shown, width=150).print(bench_table(result))
    text = " ".join(shown.getvalue().split())
    assert line.replace("\N{MULTIPLICATION SIGN}", "") in text.replace("\N{MULTIPLICATION SIGN}", "")
    assert "new float32" in text and "plain bfloat16" in text and "fastest data type" in text
    read.drafts["old"].speedup.high = 1.02
    assert slower(read)[0].startswith("old was not faster than plain decoding here")
    read.drafts["old"].speedup.value = 1.0
    assert slower(read) == []


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
    assert gains(dict.fromkeys("ab", tally(runs["old"])))["b over a"]["tau"]["value"] == 0


def test_costs_say_nothing_about_a_run_without_rounds(tiny_target):
    target = tiny_target("llama")
    plain = [PlainDecoder(target).generate([5, 6, 7], 4)]
    assert costs(target, fresh_draft(target, range(9)), plain, plain) == {"mbsu": {}}


def test_nothing_to_measure_is_refused(tiny_target):
    with pytest.raises(UserError, match="no prompts"):
        measure(tiny_target("llama"), prompts=[])


def test_the_default_shape_is_a_chain():
    assert BenchConfig().shape == ChainShape(5)


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
