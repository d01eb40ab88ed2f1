"""Standalone drafts in the commands that take a draft: opening, measuring, the shape auto, probe, merge, export."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from batched import BatchedChainDecoder
from transformers import AutoModelForCausalLM

from redraft.adaptation.bench import auto_shape
from redraft.adaptation.models import open_any, open_draft
from redraft.adaptation.probe import greedy_answers, probe, walked
from redraft.api.steps import export, merge
from redraft.artifact import tensors_hash
from redraft.decode.auto import chain_tau, make_decoder, measure_costs, pick_shape
from redraft.decode.engine import ChainDecoder
from redraft.drafts.base import is_private
from redraft.drafts.files import load_draft, save_draft, save_private
from redraft.drafts.groups import attach_private
from redraft.drafts.opening import family_at, open_checkpoint
from redraft.drafts.standalone import StandaloneDraft
from redraft.drafts.standalone.shapes import fresh_standalone, shape_for
from redraft.errors import UserError
from redraft.evaluate.speed import BenchConfig, Prompt, bench
from redraft.registries import EXPORTERS
from redraft.reports.load import BenchResult, parse
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape

TOYS = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "unit" / "toys.py")))
PROMPTS = [Prompt(f"p{i}", ids) for i, ids in enumerate(TOYS.prompts(4))]
IDS = torch.arange(4, 24)[None]


@pytest.fixture
def target(tiny_target):
    return tiny_target("llama", num_hidden_layers=2, initializer_range=0.1)


@pytest.fixture
def half(target) -> StandaloneDraft:
    """The target's first layer alone: right now and then."""
    return fresh_standalone(target, layers=[0])


# -- opening -----------------------------------------------------------------------------------------------------------
def test_every_kind_of_folder_is_told_apart(tiny_target, tmp_path):
    target = tiny_target("llama", taps=(1, 3, 5))
    half = fresh_standalone(target, layers=[0])
    eagle = TOYS.make_draft("fresh", target)
    save_draft(tmp_path / "own", half, {})
    save_draft(tmp_path / "eagle", eagle, {})
    EXPORTERS.get("hf")(half, tmp_path / "plain", target)
    for name in ("vllm", "plain", "sglang"):
        EXPORTERS.get(name)(eagle, tmp_path / f"eagle-{name}", target)
    alone = {path.name for path in tmp_path.iterdir() if not family_at(path).reads_states}
    assert alone == {"own", "plain"} and len(list(tmp_path.iterdir())) == 6
    assert not family_at("embedded:any-name").reads_states
    with pytest.raises(UserError, match="does not exist"):
        family_at(tmp_path / "no" / "such" / "folder")


def test_any_causal_lm_is_opened_as_a_draft_in_float32(target, half, tmp_path):
    EXPORTERS.get("hf")(half.to(torch.bfloat16), tmp_path / "plain", target)
    save_draft(tmp_path / "own", half, {"method": "pretrain"})
    for folder in ("plain", "own"):
        kept = open_checkpoint(str(tmp_path / folder), None).draft
        assert kept.dtype == torch.bfloat16
        found = open_any(tmp_path / folder, target)
        opened, meta = found.draft, found.meta
        assert isinstance(opened, StandaloneDraft) and opened.dtype == torch.float32
        assert meta["family"] == "standalone"
    eagle = TOYS.make_draft("fresh", target)
    save_draft(tmp_path / "eagle", eagle, {})
    opened = open_any(tmp_path / "eagle", target).draft
    assert tensors_hash(opened.state_dict()) == tensors_hash(eagle.state_dict())


def test_commands_that_need_the_targets_states_say_what_to_use_instead(target, half, tmp_path):
    save_draft(tmp_path / "own", half, {})
    with pytest.raises(UserError, match="language model of its own.*redraft distill --draft"):
        open_draft(tmp_path / "own", target)


def test_a_draft_of_another_tokenizer_is_refused(target, half, tmp_path):
    spoiled = copy.deepcopy(half.tokenizer)
    spoiled.add_tokens(["extra"])
    save_draft(tmp_path / "own", StandaloneDraft(half.model, spoiled), {})
    with pytest.raises(UserError, match="another tokenizer"):
        open_any(tmp_path / "own", target)
    save_draft(tmp_path / "bare", StandaloneDraft(half.model), {"tokenizer_hash": "0" * 16})
    with pytest.raises(UserError, match="made for another tokenizer"):
        open_any(tmp_path / "bare", target)


# -- measuring ---------------------------------------------------------------------------------------------------------
def test_the_benchmark_says_of_it_what_it_says_of_other_drafts(target, half):
    drafts = {"eagle": TOYS.make_draft("fresh", target), "half": half}
    config = BenchConfig(ChainShape(3), max_new_tokens=20, contest_prompts=1, alpha_prompts=2)
    found = bench({"float32": target}, drafts, PROMPTS, config, {})
    runs, figures = found.runs["half"], found.result["drafts"]["half"]
    rounds = sum(len(run.rounds) for run in runs)
    tau = sum(len(run.ids) - 1 for run in runs) / rounds
    assert figures["tau_pooled"]["value"] == pytest.approx(tau) and tau > 1
    assert figures["identical_to_plain"] == len(PROMPTS)
    assert set(figures) == set(found.result["drafts"]["eagle"])
    cost = half.parameters_per_token / target.parameters_per_token
    mean_depth = sum(record.depth for run in runs for record in run.rounds) / rounds
    assert figures["mbsu"]["bytes"]["cost"] == pytest.approx(cost)
    assert figures["mbsu"]["bytes"]["value"] == pytest.approx(tau / (1 + mean_depth * cost))
    assert 0 < figures["alpha"]["value"] <= 1
    assert all(figures["time"][part] > 0 for part in ("draft", "verify", "prefill"))
    read = parse(BenchResult, found.result, "result")
    assert read.drafts["half"].tau_pooled.value == pytest.approx(tau)


def test_the_probe_counts_what_decoding_counts(target, half):
    with greedy_answers(target, half.taps, PROMPTS, 24) as (rows, store):
        found = walked(target, half, rows, store, 3)
    runs = [make_decoder(target, half, ChainShape(3)).generate(prompt.ids, 24) for prompt in PROMPTS]
    decoded = sum(len(run.ids) - 1 for run in runs) / sum(len(run.rounds) for run in runs)
    assert found["value"] == pytest.approx(decoded) and found["low"] <= decoded <= found["high"]
    result = probe(target, half, PROMPTS, 3, 24, base_target=target)
    assert result.verdict == "healthy" and result.speedup_now == pytest.approx(found["value"] / result.round_cost)


# -- the shape auto ----------------------------------------------------------------------------------------------------
def test_one_pass_gives_the_acceptance_of_every_chain(target, half):
    with torch.inference_mode(), greedy_answers(target, half.taps, PROMPTS, 24) as (rows, store):
        runs = [found for _, found in half.eval().walk(target).runs(rows, store, 4)]
    taus = []
    for gamma in (1, 2, 4):
        decoded = [make_decoder(target, half, ChainShape(gamma)).generate(row.prompt_ids, 24) for row in rows]
        tokens, rounds = sum(len(g.ids) - 1 for g in decoded), sum(len(g.rounds) for g in decoded)
        taus.append(chain_tau(runs, gamma))
        assert taus[-1] == pytest.approx(tokens / rounds)
    assert taus == sorted(taus) and taus[0] < taus[-1]


def test_only_chains_are_tried(target, half):
    pick = auto_shape(target, half, PROMPTS, longest=3, max_new_tokens=16)
    assert {candidate.shape for candidate in pick.candidates} == {ChainShape(1), ChainShape(2), ChainShape(3)}
    sampled = pick_shape(
        target, half, [p.ids for p in PROMPTS], longest=2, sampler=Sampler(1.0), max_new_tokens=12, trees=()
    )
    assert len(sampled.candidates) == 2 and sampled.sentence


def test_timed_rounds_all_start_from_the_same_state(target, half, monkeypatch):
    seen: set[tuple[int, int, int]] = set()
    before = ChainDecoder.round

    def watched(self, request):
        seen.add((request.proposer.cache.length, request.proposer.verified, request.cache.length))
        return before(self, request)

    monkeypatch.setattr(ChainDecoder, "round", watched)
    prompt = PROMPTS[0].ids
    costs = measure_costs(target, half, prompt, (1, 3), repeats=3)
    assert seen == {(len(prompt), len(prompt), len(prompt))}
    assert len(costs.rounds) == 2 and all(c.draft > 0 and c.verify > 0 for c in costs.rounds.values())


def test_batched_decoding_refuses_it_in_one_line(target, half):
    with pytest.raises(UserError, match="one request at a time"):
        BatchedChainDecoder(target, half)


# -- merge and export --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_experts_are_merged_into_a_plain_folder(dtype, target, half, tmp_path):
    base = half.to(dtype)
    save_draft(tmp_path / "base", base, {})
    wide = copy.deepcopy(base).float()
    split = attach_private(wide, 16, seed=1)
    with torch.no_grad():
        for name, parameter in split.named_parameters():
            if is_private(name):
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(2))
    names = filter(is_private, split.state_dict())
    save_private(tmp_path / "private", split.to(dtype), names, wide.base_hash(), {"method": "eda"})
    found = merge(tmp_path / "private", tmp_path / "base", tmp_path / "merged")
    merged, stored = load_draft(tmp_path / "merged")
    assert found.method == stored["method"] == "eda" and merged.dtype == dtype
    assert found.parameters == sum(p.numel() for p in merged.parameters())
    with torch.no_grad():
        assert torch.allclose(merged.float()(IDS), split.float()(IDS), atol=1e-4)
    with pytest.raises(UserError, match="--base-draft"):
        open_checkpoint(str(tmp_path / "private"), None)


def test_export_from_the_command_compares_the_tokenizers(target, half, tmp_path):
    target.save(tmp_path / "target")
    save_draft(tmp_path / "own", half.to(torch.bfloat16), {})
    named = tmp_path / "target"
    report = export(tmp_path / "own", named, "hf", tmp_path / "out", gamma=3)
    assert report.bytes == 2 * report.parameters
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    path = tmp_path / "target" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokens = tokenizer["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="another tokenizer"):
        export(tmp_path / "own", named, "hf", tmp_path / "again")


def test_a_wide_draft_of_another_vocabulary_is_refused(target, tmp_path):
    shape = shape_for(target, "1/2")
    shape.vocab_size = 4096
    save_draft(tmp_path / "own", StandaloneDraft(AutoModelForCausalLM.from_config(shape)), {})
    with pytest.raises(UserError, match="the target's own tokenizer"):
        open_any(tmp_path / "own", target)
