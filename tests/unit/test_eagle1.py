"""The Eagle1 family: its forward against transformers, lossless decoding, exact simulation, its own objective."""

from __future__ import annotations

import copy
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from batched import BatchedChainDecoder
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from redraft.acceptance.simulate import expected_rounds_sampled, row_alphas, simulate_greedy_chain
from redraft.adaptation.models import open_draft
from redraft.adaptation.probe import probe
from redraft.artifact import tensors_hash
from redraft.data.store import Row
from redraft.decode.auto import make_decoder
from redraft.decode.engine import ChainDecoder, PlainDecoder
from redraft.decode.static import StaticChainDecoder
from redraft.drafts.base import fresh
from redraft.drafts.eagle.unroll import collate, unroll
from redraft.drafts.eagle1 import Eagle1Config, Eagle1Draft, fresh_eagle1
from redraft.drafts.eagle1.objective import CHUNK, Recipe, RegressionObjective, row_lengths
from redraft.drafts.files import load_draft, load_private, save_draft, save_private
from redraft.drafts.groups import attach_private, group_of, prepare
from redraft.errors import UserError
from redraft.evaluate.speed import BenchConfig, Prompt, bench
from redraft.features import FeatureStore
from redraft.registries import EXPORTERS
from redraft.rows import anchors
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape, parse_shape
from redraft.settings.training import PrivateSize, TrainConfig
from redraft.target import FINAL, Target
from redraft.training.optimizer import make_optimizers
from redraft.training.trainer import Trainer

TOYS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toys.py"))))
TOKENS, GAMMA = 16, 3


# Nothing below changes the target, its answers or their features: they are made once.
@pytest.fixture(scope="module")
def target(tiny_target) -> Target:
    return tiny_target("llama", num_hidden_layers=3, taps=(FINAL,))


def shaken(draft: Eagle1Draft, scale: float = 0.1, seed: int = 3) -> Eagle1Draft:
    """The draft with every weight moved, so that nothing is zero or the identity by construction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return draft


def answers(target: Target, count: int, temperature: float = 0.0) -> list[Row]:
    plain, rows = PlainDecoder(target, Sampler(temperature)), []
    for i, prompt in enumerate(TOYS.prompts(count)):
        done = plain.generate(prompt, TOKENS, seed=i)
        rows.append(Row(f"p/{i}", prompt, done.ids, temperature, 0, 1.0, i, done.finish_reason, "hash"))
    return [row for row in rows if anchors(row)]


@pytest.fixture(scope="module")
def rows(target) -> list[Row]:
    return answers(target, 12)


@pytest.fixture(scope="module")
def store(target, rows, tmp_path_factory) -> FeatureStore:
    store = FeatureStore(tmp_path_factory.mktemp("eagle1") / "features", {"target": "tiny", "taps": [FINAL]})
    store.build(target, rows)
    return store


# -- the model -------------------------------------------------------------------------------------------------------
def test_the_forward_is_a_llama_layer_without_its_first_norm_over_embedding_and_state(target):
    draft = shaken(fresh_eagle1(target, fc_bias=True))
    layer = LlamaDecoderLayer(target.config, 0)
    layer.input_layernorm = torch.nn.Identity()
    layer.load_state_dict(draft.midlayer.state_dict(), strict=True)
    ids, states = torch.randint(4, 128, (7,)), torch.randn(7, 32)
    embeds = draft.embed(ids, target.embedding)
    fused = torch.cat([embeds, states], -1) @ draft.fc.weight.T + draft.fc.bias
    rope = target.backbone.rotary_emb(fused[None], torch.arange(7)[None])
    mask = torch.full((7, 7), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        expected = layer(fused[None], attention_mask=mask, position_embeddings=rope)
        expected = (expected[0] if isinstance(expected, tuple) else expected)[0]

    def attend(query, keys, values):
        args = [x.transpose(0, 1)[None] for x in (query, keys, values)]
        return F.scaled_dot_product_attention(*args, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    with torch.no_grad():
        found = draft(embeds, draft.fuse(states), torch.arange(7), [attend])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert draft.carry(found) is found
    assert torch.equal(draft.logits(found), target.logits(found))


def test_the_head_is_borrowed_and_never_stored(target):
    draft = fresh_eagle1(target)
    assert draft.config.taps == (FINAL,)
    assert not any("head" in name or "embed" in name for name in draft.state_dict())
    assert copy.deepcopy(draft)._head is draft._head
    assert len(draft.state_dict()) == len(list(draft.named_parameters()))
    own = sum(p.numel() for p in draft.parameters())
    assert draft.parameters_per_token == own + target.vocab_size * target.hidden_size
    with pytest.raises(ValueError, match="bind it to its target"):
        Eagle1Draft(draft.config).logits(torch.zeros(1, 32))


def test_copies_project_with_their_own_matrix(target):
    draft = fresh_eagle1(target)
    other = copy.deepcopy(draft)
    with torch.no_grad():
        other.fc.weight.zero_()
    x, _ = other.midlayer.inputs(torch.ones(1, 32), torch.ones(1, 32))
    assert not x.any()
    assert draft.midlayer.inputs(torch.ones(1, 32), torch.ones(1, 32))[0].any()


def test_a_target_of_other_sizes_is_refused(target, tiny_target):
    draft = fresh_eagle1(target)
    with pytest.raises(UserError, match="features of width 32, target has 16"):
        draft.config.check_fit(tiny_target("llama", hidden_size=16))
    with pytest.raises(UserError, match="vocabulary of 128, target has 120"):
        ChainDecoder(tiny_target("llama", vocab_size=120), draft)
    with pytest.raises(UserError, match="unknown draft family 'medusa'"):
        fresh("medusa", target, [])
    assert fresh("eagle1", target, []).family == "eagle1"
    assert fresh("eagle3", target, range(9)).family == "eagle3"


def test_a_new_draft_of_the_same_shape(target):
    old = attach_private(shaken(fresh_eagle1(target, fc_bias=True)), 8)
    new = old.restarted(target, seed=5)
    assert new.config == old.merged().config
    torch.testing.assert_close(new.fc.weight[:, 32:], torch.eye(32), atol=0.1, rtol=0)
    assert torch.equal(new.state_dict()["fc.weight"], old.restarted(target, seed=5).state_dict()["fc.weight"])
    assert new.logits(torch.zeros(1, 32)).shape == (1, 128)


# -- decoding --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", ["chain:3", "tree:3x3x8", "batched", "static"])
def test_greedy_output_is_plain_decoding_token_for_token(shape, target):
    prompts, plain = TOYS.prompts(4), PlainDecoder(target)
    expected = [plain.generate(prompt, 20).ids for prompt in prompts]
    for draft in (fresh_eagle1(target), shaken(fresh_eagle1(target), 0.5)):
        if shape == "batched":
            found = [done.ids for done in BatchedChainDecoder(target, draft, GAMMA, slots=3).generate(prompts, 20)]
        else:
            static = shape == "static"
            decoder = StaticChainDecoder(target, draft, GAMMA) if static else make(target, draft, shape)
            found = [decoder.generate(prompt, 20).ids for prompt in prompts]
        assert found == expected


def make(target, draft, shape, sampler=None):
    return make_decoder(target, draft, parse_shape(shape), sampler)


@pytest.mark.parametrize(("noise", "sampler"), [(0.02, Sampler(1.0)), (0.5, Sampler(0.7, 12, 0.9))])
def test_sampled_output_follows_the_target(noise, sampler, tiny_target):
    target = tiny_target("llama", num_hidden_layers=2, taps=(FINAL,))
    decoder = ChainDecoder(target, shaken(fresh_eagle1(target), noise), gamma=2, sampler=sampler)
    assert TOYS.pairs_misfit(decoder, [5, 9, 70], 250) < 4.5


def test_probe_and_benchmark_take_both_families_side_by_side(target):
    drafts = {name: fresh(name, target, range(100), seed=1) for name in ("eagle1", "eagle3")}
    prompts = [Prompt(f"p{i}", ids) for i, ids in enumerate(TOYS.prompts(3))]
    found = probe(target, drafts["eagle1"], prompts, GAMMA, max_new_tokens=12)
    assert found.tau["value"] >= 1 and found.round_cost > 0
    config = BenchConfig(ChainShape(GAMMA), max_new_tokens=12, contest_prompts=1, alpha_prompts=1)
    result = bench({"float32": target}, drafts, prompts, config, {}).result
    for figures in result["drafts"].values():
        assert figures["identical_to_plain"] == len(prompts) and 0 < figures["alpha"]["value"] <= 1


# -- features and simulation -----------------------------------------------------------------------------------------
def test_the_store_holds_the_states_that_the_head_reads(target, rows, store):
    taps, hidden = store.get(rows[0])
    full = torch.tensor([[*rows[0].prompt_ids, *rows[0].response_ids]])
    states = target.forward(full).hidden_BTH[0]
    torch.testing.assert_close(taps, states[:-2])
    torch.testing.assert_close(hidden, states[len(rows[0].prompt_ids) : -1])


def learnt(target: Target, rows: list[Row], store: FeatureStore, steps: int = 80) -> Eagle1Draft:
    """A draft fitted to the rows by its own objective, so that rounds accept something."""
    draft = fresh_eagle1(target)
    objective = RegressionObjective(draft, target, TrainConfig(), Recipe(word_weight=1.0, noise=0.0))
    optimizer = torch.optim.Adam(draft.parameters(), lr=1e-2)
    batch = collate(rows, store, 1)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(batch).backward()
        optimizer.step()
    return draft


def test_the_simulated_chain_is_the_decoded_one(target, rows, store):
    draft = learnt(target, rows, store)
    simulated = simulate_greedy_chain(draft, target, rows, store, GAMMA)
    decoder = ChainDecoder(target, draft, GAMMA)
    runs = {row.key: decoder.generate(row.prompt_ids, TOKENS).rounds for row in rows}
    decoded = {key: [min(found.accepted, len(found.kept)) for found in rounds] for key, rounds in runs.items()}
    assert simulated == decoded
    assert max(max(accepted) for accepted in simulated.values()) >= 2
    assert all(0 < alpha <= 1 for alpha in row_alphas(draft, target, rows, store))


def test_the_expected_sampled_chain_lies_among_decoded_ones(target, tmp_path):
    rows = answers(target, 6, temperature=1.0)
    store = FeatureStore(tmp_path / "sampled", {})
    store.build(target, rows)
    draft = learnt(target, rows, store, steps=20)
    rounds = expected_rounds_sampled(draft, target, rows, store, GAMMA, Sampler(1.0))
    assert all(1 <= rounds[row.key] <= anchors(row) for row in rows)
    # A copy of the target's words would be accepted throughout; this draft is between that and nothing.
    assert sum(rounds.values()) < sum(map(anchors, rows))


# -- private parts ---------------------------------------------------------------------------------------------------
def chain_logits(draft: Eagle1Draft, target: Target, rows: list[Row], store: FeatureStore) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([draft.logits(s) for s in unroll(draft, target.embedding, collate(rows, store, 2), 2)])


def test_a_private_part_changes_nothing_at_first_and_merges_exactly(target, rows, store):
    draft = shaken(fresh_eagle1(target))
    before = chain_logits(draft, target, rows, store)
    for name in ("eda", "eda+fc", "lora"):
        split, names = prepare(copy.deepcopy(draft), name, PrivateSize(width=12, rank=4))
        assert torch.equal(chain_logits(split, target, rows, store), before)
        assert names and {group_of(split, n) for n in names} <= {"private", "fc", "low_rank", "norms"}
        shaken(split, 0.05)
        merged = split.merged()
        assert isinstance(merged, Eagle1Draft) and not merged.config.private_width and not merged.config.low_rank
        after = chain_logits(split, target, rows, store)
        torch.testing.assert_close(chain_logits(merged, target, rows, store), after, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(after, before, atol=1e-2)


def test_every_parameter_has_a_group(target):
    draft = fresh_eagle1(target, fc_bias=True)
    assert {group_of(draft, name) for name, _ in draft.named_parameters()} == {"fc", "attention", "shared", "norms"}
    _, names = prepare(copy.deepcopy(draft), "fc", PrivateSize())
    assert names == ["fc.weight", "fc.bias"]
    _, names = prepare(copy.deepcopy(draft), "full", PrivateSize())
    assert len(names) == len(draft.state_dict())
    with pytest.raises(UserError, match="head"):
        prepare(draft, "head", PrivateSize())


def test_save_and_load(target, tmp_path):
    draft = shaken(fresh_eagle1(target, fc_bias=True))
    save_draft(tmp_path / "whole", draft, {"method": "full"})
    back, meta = load_draft(tmp_path / "whole")
    assert meta["family"] == "eagle1" and isinstance(back, Eagle1Draft) and back.config == draft.config
    assert tensors_hash(back.state_dict()) == tensors_hash(draft.state_dict())
    split, names = prepare(copy.deepcopy(draft), "eda+fc", PrivateSize(width=8))
    shaken(split)
    save_private(tmp_path / "part", split, names, "base", {"method": "eda+fc"})
    joined, meta = load_private(tmp_path / "part", draft, "base")
    assert meta["family"] == "eagle1"
    kept = split.state_dict() | {n: t for n, t in draft.state_dict().items() if n not in names}
    assert tensors_hash(joined.state_dict()) == tensors_hash(kept)
    with pytest.raises(UserError, match="unknown keys: taps"):
        Eagle1Config.from_dict(draft.config.to_dict() | {"taps": [1]})
    with pytest.raises(UserError, match="incomplete"):
        Eagle1Config.from_dict({"hidden_size": 3})


def test_an_embedding_of_its_own_stays_unless_it_is_the_targets_to_the_last_bit(target):
    own = shaken(Eagle1Draft(replace(fresh_eagle1(target).config, own_embedding=True)))
    ids = torch.arange(5)
    assert own.borrowing(target) is own
    with torch.no_grad():
        own.embed_tokens.weight.copy_(target.embedding.weight)
    bare = own.borrowing(target)
    assert torch.equal(bare.embed(ids, target.embedding), target.embedding(ids))
    assert "embed_tokens.weight" in own.state_dict() and "embed_tokens.weight" not in bare.state_dict()


def test_opening_binds_the_draft_and_its_private_part(target, rows, store, tmp_path):
    own = shaken(Eagle1Draft(replace(fresh_eagle1(target).config, own_embedding=True)))
    with torch.no_grad():
        own.embed_tokens.weight.copy_(target.embedding.weight)
    save_draft(tmp_path / "whole", own, {"method": "full"})
    opened = open_draft(tmp_path / "whole", target)
    assert not opened.draft.config.own_embedding and opened.base_hash == tensors_hash(own.state_dict())
    split, names = prepare(copy.deepcopy(opened.draft), "eda+fc", PrivateSize(width=8))
    with torch.no_grad():
        for name in names:
            split.get_parameter(name).add_(torch.randn(split.get_parameter(name).shape) * 0.1)
    save_private(tmp_path / "part", split, names, opened.base_hash, {"method": "eda+fc"})
    joined = open_draft(tmp_path / "part", target, tmp_path / "whole").draft
    assert torch.equal(chain_logits(joined, target, rows, store), chain_logits(split, target, rows, store))
    EXPORTERS.get("vllm")(joined, tmp_path / "served", target)
    served = open_draft(tmp_path / "served", target).draft
    expected = chain_logits(split.merged(), target, rows, store)
    assert torch.equal(chain_logits(served, target, rows, store), expected)


# -- the objective ---------------------------------------------------------------------------------------------------
QUIET = Recipe(noise=0.0)


def test_the_objective_is_the_formula_value_and_gradient(target, rows, store):
    draft = shaken(fresh_eagle1(target))
    batch = collate(rows * 2, store, 1)
    assert len(batch.hidden_M) > CHUNK, "more than one portion"
    loss = RegressionObjective(draft, target, TrainConfig(), QUIET)(batch)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}
    draft.zero_grad()
    states = next(unroll(draft, target.embedding, batch, 1))
    probs = F.linear(batch.hidden_M, target.head.weight).softmax(-1)
    words = -(probs * F.linear(states, target.head.weight).log_softmax(-1)).sum(-1).mean()
    difference = (states - batch.hidden_M).abs()
    smooth = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()
    expected = smooth + 0.1 * words
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_the_noise_is_uniform_scaled_by_the_rows_length_and_new_every_step(target, rows, store):
    draft = fresh_eagle1(target)
    objective = draft.objective(target, TrainConfig())
    assert isinstance(objective, RegressionObjective) and objective.recipe == Recipe(1.0, 0.1, 0.1, 512)
    batch = collate(rows, store, 1)
    lengths = row_lengths(batch)
    sizes = [len(r.prompt_ids) + len(r.response_ids) for r in rows]
    assert lengths.unique_consecutive().tolist() == [n for i, n in enumerate(sizes) if not i or n != sizes[i - 1]]
    noise = objective.noisy(batch).taps_N - batch.taps_N
    widest = 0.1 * 512 / lengths[:, None]
    assert bool((noise.abs() <= widest * 1.001).all())
    spread = (noise / widest).flatten()
    assert abs(float(spread.mean())) < 0.03 and abs(float(spread.var()) - 1 / 3) < 0.03
    assert torch.equal(objective.noisy(batch).taps_N, objective.noisy(batch).taps_N)
    with torch.no_grad():
        draft.fc.weight[0, 0] += 1e-3
    assert not torch.equal(objective.noisy(batch).taps_N - batch.taps_N, noise)
    other = RegressionObjective(draft, target, TrainConfig(seed=1))
    assert not torch.equal(other.noisy(batch).taps_N, objective.noisy(batch).taps_N)
    assert RegressionObjective(draft, target, TrainConfig(), QUIET).noisy(batch) is batch


CONFIG = TrainConfig(epochs=6, batch_anchors=60, evaluate_every=4, learning_rate=3e-3, patience=100, optimizer="adamw")


def trainer(target, store, rows, folder) -> Trainer:
    ready, _ = prepare(fresh_eagle1(target), "full", PrivateSize())
    return Trainer(ready, target, store, rows[:9], rows[9:], CONFIG, folder)


def test_training_lowers_the_loss_and_a_killed_run_resumes_to_the_same_bits(target, store, rows, tmp_path):
    whole = trainer(target, store, rows, tmp_path / "whole")
    measured = RegressionObjective(whole.draft, target, CONFIG, QUIET)
    batch = collate(whole.rows, store, 1)
    before = float(measured(batch).detach())
    expected = whole.run()
    best = {name: parameter.detach().clone() for name, parameter in whole.trained}
    # The run hands out its best weights by held-out tau; what training does to the loss shows in its last.
    whole.loop.checkpoint.load(whole.trained, make_optimizers(whole.trained, CONFIG.optimizer, CONFIG.weight_decay))
    assert float(measured(batch).detach()) < before

    class Killed(BaseException):
        pass

    class Killer:
        def update(self, done, **fields) -> None:
            if fields["step"] == 6:
                raise Killed

    with pytest.raises(Killed):
        trainer(target, store, rows, tmp_path / "killed").run(Killer())
    again = trainer(target, store, rows, tmp_path / "killed")
    assert again.run().history == expected.history
    for name, parameter in again.trained:
        assert torch.equal(best[name], parameter), name
    again.loop.checkpoint.load(again.trained, make_optimizers(again.trained, CONFIG.optimizer, CONFIG.weight_decay))
    for (name, a), (_, b) in zip(whole.trained, again.trained, strict=True):
        assert torch.equal(a, b), name
