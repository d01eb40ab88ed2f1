"""Standalone drafts: shapes and starts, private experts, files, lossless decoding, exact simulation, export."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from redraft.acceptance.simulate import expected_rounds_sampled, simulate_greedy_chain
from redraft.adaptation.models import open_any
from redraft.artifact import tensors_hash
from redraft.data.store import Row
from redraft.decode.auto import make_decoder
from redraft.decode.engine import ChainDecoder, PlainDecoder
from redraft.decode.static import StaticTarget
from redraft.drafts.base import is_private
from redraft.drafts.files import load_draft, load_private, save_draft, save_private
from redraft.drafts.groups import attach_private, prepare
from redraft.drafts.standalone import StandaloneDraft, untrained
from redraft.drafts.standalone.shapes import fresh_standalone, parameters_of, projected, shape_for
from redraft.drafts.walks import run_lengths
from redraft.errors import UserError
from redraft.loading import check_tokenizers
from redraft.registries import EXPORTERS
from redraft.sampling import warp
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import parse_shape
from redraft.settings.training import PrivateSize

TOYS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toys.py"))))
prompts = TOYS.prompts
IDS = torch.arange(4, 24)[None]


@pytest.fixture
def target(tiny_target):
    return tiny_target("llama", num_hidden_layers=2)


def make(kind: str, target) -> StandaloneDraft:
    """Drafts of every temper: new, the target itself, sure of the wrong token, and half the target."""
    if kind in ("copy", "half"):
        return fresh_standalone(target, layers=range(target.layers if kind == "copy" else 1))
    draft = fresh_standalone(target, shape_for(target, "1/3"), seed=1, tied=False)
    if kind == "wrong":
        with torch.no_grad():
            draft.model.lm_head.weight.mul_(-400)
    return draft


def rows_of(target, found, sampler=None) -> list[Row]:
    sampler = sampler or Sampler()
    return [
        Row(str(i), prompt, ids, sampler.temperature, sampler.top_k, sampler.top_p, i, "length", "hash")
        for i, (prompt, ids) in enumerate(found)
    ]


# -- shapes and starts -------------------------------------------------------------------------------------------------
def test_a_shape_keeps_within_its_size_and_counts_what_the_model_has(tiny_target):
    target = tiny_target("llama", hidden_size=64, intermediate_size=256, tie_word_embeddings=True)
    for size in ("1/3", 0.5, "80k"):
        shape = shape_for(target, size)
        draft = fresh_standalone(target, shape)
        budget = {"1/3": target.parameters_per_token / 3, 0.5: target.parameters_per_token / 2, "80k": 80_000}[size]
        assert parameters_of(shape) == draft.parameters_per_token <= budget
        assert shape.tie_word_embeddings and shape.eos_token_id == target.config.eos_token_id
        assert shape.rope_parameters["rope_theta"] == target.config.rope_parameters["rope_theta"]
        assert shape.max_position_embeddings == target.context
    assert shape_for(target, "1/2", layers=1).num_hidden_layers == 1


def test_the_preset_is_the_papers_shape(target):
    shape = shape_for(target, "goel", tied=False)
    assert (shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size) == (4, 1024, 2816)
    assert shape.num_attention_heads == 8 and not shape.tie_word_embeddings


@pytest.mark.parametrize(
    ("size", "message"), [("1/500", "no shape meets"), ("tiny", "neither a share"), ("1/1", "not smaller")]
)
def test_a_size_that_cannot_be_is_refused(size, message, target):
    with pytest.raises(UserError, match=message):
        shape_for(target, size)


def test_all_layers_of_the_target_are_the_target(tiny_target):
    for architecture in ("llama", "qwen2", "qwen3"):
        target = tiny_target(architecture, num_hidden_layers=3)
        with torch.no_grad():
            assert torch.equal(make("copy", target)(IDS), target.model(IDS).logits)
    half = fresh_standalone(target, layers=[0, 2])
    expected = target.backbone.layers[2].mlp.up_proj.weight
    assert torch.equal(half.model.model.layers[1].mlp.up_proj.weight, expected)
    with pytest.raises(UserError, match="layers 0 to 2"):
        fresh_standalone(target, layers=[3])


def test_starts_follow_the_seed_and_the_targets_tables(target):
    shape = shape_for(target, "1/3")
    one, same, other = (fresh_standalone(target, shape, seed) for seed in (0, 0, 1))
    assert tensors_hash(one.state_dict()) == tensors_hash(same.state_dict()) != tensors_hash(other.state_dict())
    table = target.embedding.weight
    small = one.model.get_input_embeddings().weight
    assert torch.equal(small, projected(table, shape.hidden_size, 0.02)) and not small.equal(table)
    random = fresh_standalone(target, shape, embeddings="random").model.get_input_embeddings().weight
    assert not torch.equal(small, random)
    # The best approximation of its rank keeps the most of the table's inner products.
    gram, rank = table @ table.T, shape.hidden_size
    kept = torch.linalg.eigvalsh(table.T @ table)
    best = projected(table, rank, 1.0)
    scale = kept[-rank:].sum().sqrt() / best.norm()
    assert (gram - scale**2 * best @ best.T).norm() == pytest.approx(kept[:-rank].norm().item(), rel=1e-3)
    assert projected(table, 40, 0.02).shape == (128, 40)


# -- private experts and files -----------------------------------------------------------------------------------------
def trained_split(draft: StandaloneDraft) -> StandaloneDraft:
    split = attach_private(draft, 24, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in split.named_parameters():
            if is_private(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return split


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_private_experts_start_at_nothing_and_merge_into_a_plain_model(architecture, tiny_target):
    draft = make("half", tiny_target(architecture, num_hidden_layers=2, tie_word_embeddings=True))
    with torch.no_grad():
        assert torch.equal(attach_private(draft, 24)(IDS), draft(IDS))
        split = trained_split(draft)
        merged = split.merged()
        assert not torch.allclose(split(IDS), draft(IDS), atol=1e-2)
        assert torch.allclose(merged(IDS), split(IDS), atol=1e-4)
    assert merged.model.config.intermediate_size == 64 + 24 and not merged.config.private_width
    assert type(merged.model) is type(draft.model) and merged.parameters_per_token == split.parameters_per_token
    assert not any(is_private(name) for name in merged.state_dict())
    with pytest.raises(UserError, match="already"):
        attach_private(split, 8)


@pytest.mark.parametrize("tied", [True, False])
def test_a_draft_is_a_plain_folder_and_comes_back_bit_for_bit(tied, target, tmp_path):
    draft = fresh_standalone(target, shape_for(target, "1/3"), tied=tied).to(torch.bfloat16)
    save_draft(tmp_path / "d", draft, {"method": "pretrain", "provenance": {"a": 1}})
    back, meta = load_draft(tmp_path / "d")
    assert meta["family"] == "standalone" and meta["method"] == "pretrain" and back.dtype == torch.bfloat16
    assert tensors_hash(back.state_dict()) == tensors_hash(draft.state_dict())
    head, table = back.model.get_output_embeddings().weight, back.model.get_input_embeddings().weight
    assert (head is table) == tied
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "d", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, back(IDS)) and torch.equal(back(IDS), draft(IDS))
    check_tokenizers(back.tokenizer, target.tokenizer)
    opened = open_any(tmp_path / "d", target).draft
    assert opened.dtype == torch.float32
    path = tmp_path / "d" / "redraft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"content_hash": "0" * 16}))
    with pytest.raises(UserError, match="content hash"):
        load_draft(tmp_path / "d")


def test_rotary_frequencies_stay_exact_in_bfloat16(target):
    draft = make("copy", target)
    before = draft.model.model.rotary_emb.inv_freq.clone()
    assert torch.equal(draft.to(torch.bfloat16).model.model.rotary_emb.inv_freq, before)


@pytest.mark.parametrize("ours", [False, True])
def test_a_model_whose_tokens_cannot_be_taken_back_is_no_draft(ours, target, tmp_path):
    """A convolution's state keeps no keys: refused when it is opened, not in the midst of a round."""
    sizes = {name: getattr(target.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "full_attn_idxs": [1]}
    draft = StandaloneDraft(untrained(AutoConfig.for_model("lfm2", **sizes, **heads)), target.tokenizer)
    if ours:
        save_draft(tmp_path / "d", draft, {})
    else:
        draft.model.save_pretrained(tmp_path / "d")
        target.tokenizer.save_pretrained(tmp_path / "d")
    with pytest.raises(UserError, match="d cannot be a draft: Lfm2ForCausalLM cannot take tokens back"):
        open_any(tmp_path / "d", target)


def test_a_draft_whose_logits_are_not_its_heads_is_refused(target, tmp_path):
    draft = fresh_standalone(target, shape_for(target, "1/3"))
    draft.model.config.logits_scaling = 1.5  # what a Llama does not know
    save_draft(tmp_path / "d", StandaloneDraft(draft.model, target.tokenizer), {})
    with pytest.raises(UserError, match="cannot be a draft: the logits of LlamaForCausalLM are not its head"):
        open_any(tmp_path / "d", target)


def test_private_experts_are_a_file_of_their_own(target, tmp_path):
    base = make("half", target)
    split = trained_split(base)
    base_hash = base.base_hash()
    save_private(tmp_path / "p", split, [n for n in split.state_dict() if is_private(n)], base_hash, {"method": "eda"})
    save_draft(tmp_path / "base", base, {})
    back, _ = load_private(tmp_path / "p", base, base_hash)
    opened = open_any(tmp_path / "p", target, base=tmp_path / "base").draft
    with torch.no_grad():
        assert torch.equal(back(IDS), split(IDS)) and torch.equal(opened(IDS), split(IDS))
    copied = make("copy", target)
    with pytest.raises(UserError, match="belongs to the base draft"):
        load_private(tmp_path / "p", copied, copied.base_hash())
    with pytest.raises(UserError, match="--base-draft"):
        open_any(tmp_path / "p", target)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["eda", "eda-moe", "lora", "lora-peer", "norms", "head", "full"])
def test_every_method_that_adds_or_trains_parts_works_on_a_language_model(name, tied, tiny_target, tmp_path):
    base = make("half", tiny_target("llama", num_hidden_layers=2, tie_word_embeddings=tied))
    split, names = prepare(copy.deepcopy(base), name, PrivateSize(width=8, rank=4, experts=2, active=1), seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        assert torch.equal(split(IDS), base(IDS))
        for part in names:
            weight = split.get_parameter(part)
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
        assert not torch.allclose(split(IDS), base(IDS), atol=1e-3)
        save_private(tmp_path / "p", split, names, base.base_hash(), {"method": name})
        back, _ = load_private(tmp_path / "p", base, base.base_hash())
        assert back.config == split.config and torch.equal(back(IDS), split(IDS))
        if name == "eda-moe":
            with pytest.raises(UserError, match="cannot be merged"):
                split.merged()
        else:
            dense = split.merged()
            assert type(dense.model) is type(base.model) and torch.allclose(dense(IDS), split(IDS), atol=1e-4)
            assert set(dense.state_dict()) == set(base.state_dict())


def test_another_tokenizer_is_refused_with_the_first_difference(target):
    draft = make("fresh", target)
    draft.tokenizer = copy.deepcopy(target.tokenizer)
    draft.tokenizer.add_tokens(["extra"])
    with pytest.raises(UserError, match="another tokenizer"):
        ChainDecoder(target, draft)
    wide = copy.deepcopy(target.config)
    wide.vocab_size = 4096
    with pytest.raises(UserError, match="the target's own tokenizer"):
        ChainDecoder(target, StandaloneDraft(AutoModelForCausalLM.from_config(wide)))


# -- decoding ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["fresh", "wrong", "half", "copy"])
def test_greedy_output_is_plain_decoding_token_for_token(kind, target):
    plain, chain = PlainDecoder(target), ChainDecoder(target, make(kind, target), gamma=3)
    for prompt in prompts(4):
        expected, got = plain.generate(prompt, 30), chain.generate(prompt, 30)
        assert got.ids == expected.ids and got.finish_reason == expected.finish_reason
        full = [r.accepted == len(r.proposed) for r in got.rounds]
        assert all(full) if kind == "copy" else kind != "wrong" or not any(full)


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [("half", Sampler(1.0)), ("wrong", Sampler(0.7, 12, 0.9))],
    ids=lambda x: x if isinstance(x, str) else x.describe(),
)
def test_sampled_output_follows_the_target(kind, sampler, target):
    decoder = ChainDecoder(target, make(kind, target), gamma=2, sampler=sampler)
    assert TOYS.pairs_misfit(decoder, [5, 9, 70], 300) < 4.5


def test_the_drafts_cache_holds_what_a_pass_over_the_text_would_give(target):
    """Kept guesses, roll-back and refeeding leave the very keys of the verified text."""
    decoder = ChainDecoder(target, make("half", target), gamma=4)
    proposers = []
    new = decoder.new_proposer
    decoder.new_proposer = lambda tokens: proposers.append(new(tokens)) or proposers[-1]
    prompt = prompts(1)[0]
    ids = [*prompt, *decoder.generate(prompt, 25).ids]
    known = proposers[0].verified
    fresh = new(len(ids)).cache
    with torch.inference_mode():
        decoder.draft.states(torch.tensor([ids[:known]]), fresh)
    for mine, other in zip(proposers[0].cache.layers, fresh.layers, strict=True):
        assert torch.allclose(mine.keys[:, :, :known], other.keys[:, :, :known], atol=1e-5)


def test_accepted_counts_are_those_of_assisted_generation(target, monkeypatch):
    from transformers.generation.candidate_generator import AssistedCandidateGenerator as Generator

    gamma, counts = 3, []
    draft = make("half", target)
    decoder = ChainDecoder(target, draft, gamma)
    assistant = draft.model
    assistant.generation_config.num_assistant_tokens = gamma
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    record = lambda self, ids, scores, matches: counts.append(int(matches))  # noqa: E731
    monkeypatch.setattr(Generator, "update_candidate_strategy", record)
    seen = 0
    for prompt in prompts(4):
        counts.clear()
        got = decoder.generate(prompt, 31)
        # Our first token comes from prefill, before any round: theirs starts behind it.
        start = torch.tensor([[*prompt, got.ids[0]]])
        theirs = target.model.generate(
            start,
            attention_mask=torch.ones_like(start),
            assistant_model=assistant,
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=list(target.eos_ids),
        )
        assert theirs[0, start.shape[1] :].tolist() == got.ids[1:]
        # In the last round each cuts at the limit in its own way.
        ours = [r.accepted for r in got.rounds]
        assert counts[: len(ours) - 1] == ours[:-1]
        seen += sum(ours)
    assert seen > 5


def test_the_registered_way_to_a_decoder_takes_standalone_drafts(target):
    draft = make("half", target)
    decoder = make_decoder(target, draft, parse_shape("chain:4"), measure_overlap=True)
    assert isinstance(decoder, ChainDecoder) and decoder.gamma == 4
    found = decoder.generate(prompts(1)[0], 12)
    assert all(len(r.overlap) == len(r.proposed) for r in found.rounds)
    assert all(0 <= x <= 1.0001 for r in found.rounds for x in r.overlap)
    with pytest.raises(UserError, match="proposes chains, not a .*chain:3"):
        make_decoder(target, draft, parse_shape("tree:3x4x10"))


def test_a_target_of_static_shapes_takes_a_standalone_draft(target):
    draft, prompt = make("half", target), prompts(1)[0]
    expected = PlainDecoder(target).generate(prompt, 20)
    static = StaticTarget(target, (1, 4), capacity=64)
    assert make_decoder(static, draft, parse_shape("chain:3")).generate(prompt, 20).ids == expected.ids


# -- simulation --------------------------------------------------------------------------------------------------------
def test_run_lengths_count_what_follows():
    assert run_lengths([True, True, True, False, True], 2) == [2, 2, 1, 0, 1]


@pytest.mark.parametrize("kind", ["half", "wrong", "copy"])
def test_the_simulation_is_the_decoding(kind, target):
    decoder = ChainDecoder(target, make(kind, target), gamma=3)
    found = [(prompt, decoder.generate(prompt, 24)) for prompt in prompts(5)]
    rows = rows_of(target, [(prompt, generation.ids) for prompt, generation in found])
    simulated = simulate_greedy_chain(decoder.draft, target, rows, None, 3)
    for row, (_, generation) in zip(rows, found, strict=True):
        if not generation.rounds:
            assert row.key not in simulated
            continue
        decoded, mine = [r.accepted for r in generation.rounds], simulated[row.key]
        # Verification may accept behind the end of the response, which the simulation does not see.
        assert mine[:-1] == decoded[:-1] and mine[-1] <= decoded[-1]


def test_expected_rounds_are_those_of_sampled_decoding(target):
    """Rounds minus their expectation given the text is zero on average, and the probabilities are the models' own."""
    sampler, draft = Sampler(1.0, 0, 0.9), make("half", target)
    decoder = ChainDecoder(target, draft, gamma=3, sampler=sampler)
    found = [([5, 9, 70], decoder.generate([5, 9, 70], 12, seed=seed)) for seed in range(80)]
    rows = rows_of(target, [(prompt, generation.ids) for prompt, generation in found], sampler)
    expected = expected_rounds_sampled(draft, target, rows, None, 3, sampler)
    walk = draft.walk(target)
    hidden = {row.key: states for row, states in walk.hidden(rows, None)}
    stored = SimpleNamespace(get=lambda row: (None, hidden[row.key]))
    assert expected == expected_rounds_sampled(draft, target, rows, stored, 3, sampler)
    rest = torch.tensor(
        [len(g.rounds) - expected[row.key] for row, (_, g) in zip(rows, found, strict=True) if g.rounds]
    ).double()
    assert rest.abs().max() > 0.1
    assert abs(float(rest.mean() / (rest.std() / len(rest) ** 0.5))) < 4
    row = next(row for row in rows if len(row.response_ids) > 3)
    text = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    probs = warp(target.model(text).logits[0], sampler)
    wanted = [probs[len(row.prompt_ids) + i, token] for i, token in enumerate(row.response_ids[1:])]
    known = walk.target_chances(row, hidden[row.key], sampler)
    assert torch.allclose(known.float(), torch.stack(wanted).float(), atol=1e-5)
    with pytest.raises(UserError, match="same sampler"):
        expected_rounds_sampled(draft, target, rows, None, 3, Sampler(0.5))


# -- export ------------------------------------------------------------------------------------------------------------
def test_the_export_is_a_causal_lm_that_any_engine_loads(target, tmp_path):
    split = trained_split(make("half", target))
    report = EXPORTERS.get("hf")(split, tmp_path / "out", target, speculative_tokens=3)
    assert report.merged_private and "draft_model" in report.serve and '"num_speculative_tokens": 3' in report.serve
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, split(IDS), atol=1e-4)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert model.generation_config.eos_token_id == target.model.generation_config.eos_token_id


def test_each_format_takes_its_own_families(target, tmp_path):
    with pytest.raises(UserError, match="vllm, sglang or gguf"):
        EXPORTERS.get("hf")(TOYS.make_draft("fresh", target), tmp_path / "a", target)
    for name in ("plain", "sglang", "vllm"):
        with pytest.raises(UserError, match="hf"):
            EXPORTERS.get(name)(make("fresh", target), tmp_path / "b", target)
