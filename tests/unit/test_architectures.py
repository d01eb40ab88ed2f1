"""Targets of every architecture: what redraft does for them is the model's own text, or refused by name.

The jobs are those of ``benchmarks/architectures.py`` on shorter texts; what it wrote down must still hold.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batched import BatchedChainDecoder
from transformers import AutoConfig, AutoModelForCausalLM

from redraft.data.generate import Request, generate
from redraft.decode.engine import PlainDecoder
from redraft.decode.static import StaticTarget
from redraft.drafts.eagle1 import fresh_eagle1
from redraft.drafts.eagle3 import fresh_draft
from redraft.errors import UserError
from redraft.loading import quiet
from redraft.settings.sampler import Sampler
from redraft.target import KeyValueCache, OwnCache, Target
from redraft.target import cache as cache_module

ROOT = Path(__file__).resolve().parents[2]
TABLE = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "architectures.py"), run_name="loaded"))
ZOO = TABLE.ZOO
RECORD = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text())
JOBS = ["features", "regenerate", "chain", "tree", "batch"]


@pytest.mark.parametrize("name", ZOO.ARCHITECTURES)
def test_every_job_is_the_models_own_text_or_refused(name: str) -> None:
    """48 tokens behind prompts of 24 to 30: past every window, each round accepted whole, in part or not at all."""
    rows = TABLE.table([name], JOBS, 48, say=lambda line: None)
    written = {row["job"]: row["verdict"] for row in RECORD["rows"] if row["model_type"] == name}
    found = {row["job"]: row["verdict"] for row in rows}
    assert "wrong" not in found.values()
    assert found == {job: written[job] for job in JOBS}
    for row in rows:
        if row["verdict"] == "refused":
            assert "would not be lossless here" in row["says"] and "--s" in row["says"]


def test_the_page_is_the_record() -> None:
    assert RECORD["wrong"] == sum(row["verdict"] == "wrong" for row in RECORD["rows"]) == 0
    assert {row["model_type"] for row in RECORD["rows"]} == set(ZOO.ARCHITECTURES)
    assert (ROOT / "docs" / "architectures.md").read_text() == TABLE.page(RECORD["rows"])


def make(name: str, **changes: Any) -> Target:
    with quiet():
        model = ZOO.build(name)
    for key, value in changes.items():
        setattr(model.config.get_text_config(), key, value)
    return Target(model, None, name=name)


# -- passes that are wrong on purpose are found out ---------------------------------------------------------------
def test_a_mask_without_its_window_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module.MaskPlan, "plain", property(lambda self: True))
    paths = make("mistral").paths
    assert paths.cached and not (paths.masked or paths.slots or paths.kernel)
    assert paths.why.startswith("passes over several texts at once move its states by")


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss, sinks alone"])
def test_attention_that_leaves_something_out_is_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were its soft cap or its sinks dropped, a target's text in slots would be another from the first token."""
    target = make(name)
    assert target.paths.slots and not target.paths.kernel
    with cache_module.slot_attention(target, True), torch.inference_mode():
        cache = target.new_buffers(8)
        wrong = target.forward(torch.tensor([[5, 6, 7]]), cache, taps=False).hidden_BTH if name != "gemma2" else None
    if wrong is not None:
        assert not torch.allclose(wrong, target.forward(torch.tensor([[5, 6, 7]]), taps=False).hidden_BTH, atol=1e-2)


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = cache_module._slot_attention

    def doubled(*args: Any, **kwargs: Any) -> Any:
        mixed, weights = stock(*args, **kwargs)
        return 2 * mixed, weights

    monkeypatch.setitem(cache_module.AttentionInterface._global_mapping, "redraft_slots", doubled)
    paths = make("llama").paths
    assert not paths.kernel and paths.slots and paths.masked, "the model's own attention is still there"


def test_in_a_short_type_a_pass_counts_by_what_stands_behind_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most states of the trial are a prompt's, and right: a mask that shows everything must be seen all the same."""
    half = Target(make("llama").model.to(torch.bfloat16)).paths
    assert half.masked and half.slots
    monkeypatch.setattr(cache_module.MaskPlan, "masks", lambda self, allowed, *rest: torch.ones_like(allowed))
    wrong = Target(make("llama").model.to(torch.bfloat16)).paths
    assert wrong.cached and not (wrong.masked or wrong.slots or wrong.kernel)


def test_a_number_of_little_effect_is_judged_by_its_own() -> None:
    """Attention that grows with the place is lost in slots; beside chunks its effect is small, and rounding nearly as
    large."""
    exact = make("llama4_text")
    assert not exact.paths.slots and exact.paths.cached
    half = Target(exact.model.to(torch.bfloat16)).paths
    assert not half.slots and (half.cached or half.own_cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_factor_on_the_logits_is_seen_in_every_type(dtype: torch.dtype) -> None:
    target = Target(make("llama", logits_scaling=1.06).model.to(dtype))
    with pytest.raises(UserError, match="logits of LlamaForCausalLM are not its head over the states"):
        target.paths  # noqa: B018


def test_a_target_that_does_not_read_its_head_from_its_states_is_refused() -> None:
    target = make("llama", logits_scaling=3.0)
    with pytest.raises(UserError, match="logits of LlamaForCausalLM are not its head over the states"):
        target.paths  # noqa: B018


def test_a_target_that_chooses_its_keys_is_refused() -> None:
    target = make("llama", index_topk=2048)
    with pytest.raises(UserError, match="chooses the keys of its attention by an index"):
        target.new_cache(8)


def test_windows_are_narrow_for_the_trial_alone() -> None:
    target = make("gemma3")
    assert target.paths.masked and target.config.sliding_window == 16
    assert {getattr(module, "sliding_window", None) for module in target.backbone.modules()} <= {None, 16}


# -- the model's own path -------------------------------------------------------------------------------------------
def test_sampled_answers_by_the_models_own_path_are_those_of_its_own_probabilities() -> None:
    """A request's uniforms and the one place that warps decide, whoever runs the model; penalties play no part."""
    target, sampler = make("qwen3_5_text"), Sampler(0.9, 20, 0.95)
    target.model.generation_config.repetition_penalty = 1.5
    requests = [Request(str(i), prompt, sampler, 3) for i, prompt in enumerate(ZOO.texts(3, 6))]
    found = {done.request.key: done.response_ids for done in generate(target, requests, 12, stop_ids=(9,))}
    assert not target.paths.slots
    assert target.model.generation_config.repetition_penalty == 1.5
    from redraft.sampling import draw, warp

    for request in requests:
        chances, ids = request.uniforms(12), list(request.prompt_ids)
        for token in found[request.key]:
            logits = target.model(torch.tensor([ids]), use_cache=False).logits[0, -1:]
            assert int(draw(warp(logits, sampler), chances[len(ids) - len(request.prompt_ids)][None])) == token
            ids.append(token)


@torch.inference_mode()
def test_the_models_own_cache_rolls_back_to_any_length() -> None:
    target, ids = make("qwen3_next"), torch.tensor([ZOO.texts(1, 20)[0]])
    whole = target.forward(ids, taps=False).hidden_BTH
    cache = target.new_cache(20)
    assert isinstance(cache, OwnCache)
    target.forward(ids[:, :8], cache, taps=False)
    target.forward(ids[:, 8:14], cache, taps=False)
    for length in (14, 11, 4):  # none, some of the last pass, more than it
        cache.rollback(length)
        again = target.forward(ids[:, length:], cache, taps=False).hidden_BTH
        torch.testing.assert_close(again, whole[:, length:], atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match="cannot roll a cache of 20 tokens back to 21"):
        cache.rollback(21)


def test_plain_decoding_of_a_recurrent_target_is_its_own() -> None:
    target, prompts = make("qwen3_next"), ZOO.texts(2, 9)
    target.model.generation_config.eos_token_id = target.config.eos_token_id = None
    with quiet():
        own = ZOO.own_answers(ZOO.build("qwen3_next"), prompts, 20)
    assert [PlainDecoder(target).generate(prompt, 20).ids for prompt in prompts] == own


# -- numbers --------------------------------------------------------------------------------------------------------
def test_parameters_of_routed_experts_count_as_a_token_meets_them() -> None:
    target = make("qwen3_moe")
    experts = sum(p.numel() for name, p in target.backbone.named_parameters() if ".experts." in name)
    everything = sum(p.numel() for p in target.model.parameters()) - target.embedding.weight.numel()
    assert experts and target.parameters_per_token == everything - experts // 2


def test_a_scaled_table_is_read_as_it_lies_in_the_file() -> None:
    target = make("gemma3")
    ids = torch.tensor([[5, 6]])
    assert torch.equal(target.embedding(ids), target.model.get_input_embeddings().weight[ids])
    assert not torch.allclose(target.embedding(ids), target.model.get_input_embeddings()(ids))


def test_an_export_names_the_whole_model_and_has_its_text_parts_sizes() -> None:
    target = make("gemma3")
    target.model.config.architectures = ["Gemma3ForConditionalGeneration"]
    info = target.facts
    assert info.architectures == ("Gemma3ForConditionalGeneration",)
    assert (info.hidden_size, info.layers, info.vocab_size, info.context) == (64, 8, 128, 512)


def test_a_rope_that_follows_the_length_ends_where_its_angles_change() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
    assert make("llama", rope_parameters=rope).context == 128
    kinds = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    assert make("llama", rope_parameters=kinds).context == 128
    assert make("llama").context == 512


def test_a_mask_needs_to_know_where_its_columns_stand() -> None:
    target = make("llama")
    with pytest.raises(ValueError, match="a mask needs positions, a cache"):
        target.forward(torch.tensor([[5]]), KeyValueCache(8, 4), mask_B1TC=torch.ones(1, 1, 1, 1, dtype=torch.bool))


def test_a_new_draft_takes_plain_angles_where_the_targets_follow_the_length() -> None:
    """Engines read such angles in ways of their own; within the context they are the plain ones."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}
    for fresh in (fresh_eagle1, lambda target: fresh_draft(target, range(100))):
        found = fresh(make("llama", rope_parameters=rope)).config.rope_parameters
        assert found == {"rope_type": "default", "rope_theta": 500.0}


def test_a_new_draft_starts_where_the_final_norm_has_no_weight() -> None:
    with quiet():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo", **ZOO.SHAPE))
    assert torch.allclose(fresh_draft(Target(model), range(100)).norm.weight, torch.ones(64), atol=1e-3)


def test_a_new_draft_takes_the_first_layers_heads_where_layers_differ() -> None:
    changes = {"global_head_dim": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
    with quiet():
        config = AutoConfig.for_model("gemma4_text", **ZOO.SHAPE | ZOO.WINDOW | changes)
        target = Target(AutoModelForCausalLM.from_config(config))
    assert fresh_draft(target, range(100)).config.head_dim == fresh_eagle1(target).config.head_dim == 16


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_texts_that_fill_the_context_are_decoded_together_as_alone(kind: str) -> None:
    """Short rows are padded to the widest: behind the context that would bend the angles of all rows."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 40}
    config = AutoConfig.for_model("llama", **ZOO.SHAPE | {"max_position_embeddings": 40, "rope_parameters": rope})
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        config.initializer_range, config.eos_token_id = 0.3, None
        target = Target(AutoModelForCausalLM.from_config(config).eval())
    assert target.context == 40
    prompts = [text[:20] for text in ZOO.texts(4, 20)]
    alone = [PlainDecoder(target).generate(prompt, 20).ids for prompt in prompts]
    decoder = BatchedChainDecoder(target, fresh_draft(target, range(100)), 4, slots=3)
    ZOO.Planted(decoder, prompts, alone)
    assert [found.ids for found in decoder.generate(prompts, 20)] == alone
    with pytest.raises(UserError, match=f"{kind} rope, which static steps cannot follow"):
        StaticTarget(target, (4,))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma3n_text", {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "laurel_rank": 8}),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
    ],
)
def test_layers_that_keep_more_than_a_vector_a_token_have_no_taps(kind: str, changes: dict[str, Any]) -> None:
    """Of Gemma 3n's four streams, row i would have been given number i; OPT may have layers wider than its states."""
    sizes = ZOO.SHAPE | {"layer_types": ["full_attention"] * 8, "activation_sparsity_pattern": [0.0] * 8}
    with quiet():
        config = AutoConfig.for_model(kind, **sizes | {"num_kv_shared_layers": 2} | changes)
        target = Target(AutoModelForCausalLM.from_config(config).eval())
    assert target.paths.cached, "it still writes its own text"
    with pytest.raises(UserError, match="has states .* where one vector a token is needed"):
        target.forward(torch.tensor([[5, 6, 7]]))
