"""What every draft family must keep, one that a plugin brings included: it inherits these tests by being registered.

Shape legend: A anchors of one response, J draft steps.
"""

from __future__ import annotations

import copy
import json
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from redraft import registries
from redraft.acceptance.simulate import (
    expected_rounds_sampled,
    row_alphas,
    simulate_greedy_chain,
    tau_of,
)
from redraft.data.store import Row
from redraft.decode.auto import make_decoder, measure_costs
from redraft.decode.engine import PlainDecoder
from redraft.decode.static import StaticTarget
from redraft.decode.tree import simulate_tree
from redraft.drafts.base import Draft, fresh
from redraft.drafts.files import load_draft, load_private, save_draft, save_private
from redraft.drafts.groups import prepare
from redraft.errors import UserError
from redraft.features import FeatureStore
from redraft.registries import FAMILIES, LOSSES
from redraft.rows import anchors
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape, DynamicTree, StaticTree
from redraft.settings.training import PrivateSize, TrainConfig
from redraft.target import Target
from redraft.training.trainer import Trainer

TOYS = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "unit" / "toys.py")))
TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "tiny_drafts.py")))
PLUGIN = str(Path(__file__).with_name("toy_family.py"))
GAMMA, TOKENS = 3, 20
SAMPLED = Sampler(0.9, 0, 0.9)
STATIC = StaticTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))
TREES = {"static": STATIC, "dynamic": DynamicTree(3, 3, 8)}
# Drafts of a family that are not as it makes them afresh: options by a name that begins with the family's.
OTHERS = {"eagle3, other layers": TINY.OTHER_LAYERS | {"norm_output": True}, "eagle1, other layers": TINY.OTHER_LAYERS}
CONFIG = TrainConfig(epochs=12, batch_anchors=64, learning_rate=5e-3, optimizer="adamw", gamma=GAMMA)


@pytest.fixture(scope="module", autouse=True)
def plugin() -> Iterator[None]:
    """The toy family, while these tests run."""
    registries.load_plugin(PLUGIN)
    yield
    FAMILIES._entries.pop("toy")
    registries._loaded.pop(PLUGIN)


@pytest.fixture(scope="module")
def target(tiny_target: Any) -> Target:
    return tiny_target("llama", **TOYS.SMALL)


@pytest.fixture(scope="module", params=[*FAMILIES.names(), "toy", *OTHERS])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def answers(target: Target, count: int, sampler: Sampler) -> list[Row]:
    """Responses of the target that have positions to be supervised at."""
    plain, rows = PlainDecoder(target, sampler), []
    for i, prompt in enumerate(TOYS.prompts(count)):
        done = plain.generate(prompt, TOKENS, seed=i)
        settings = (sampler.temperature, sampler.top_k, sampler.top_p)
        rows.append(Row(f"p{i}", prompt, done.ids, *settings, i, done.finish_reason, "hash"))
    return [row for row in rows if anchors(row)]


@pytest.fixture(scope="module")
def rows(target: Target) -> list[Row]:
    return answers(target, 16, Sampler())


def stored(target: Target, draft: Draft, rows: list[Row], folder: Path) -> FeatureStore:
    """The features that the draft reads."""
    target.tap(draft.taps)
    store = FeatureStore(folder, {"taps": list(draft.taps)})
    store.build(target, rows)
    return store


@pytest.fixture(scope="module")
def trained(family: str, target: Target, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A draft that was trained a little, so that rounds keep something; its store, and the trainer's folder."""
    place = tmp_path_factory.mktemp(family)
    target.tap((1, 2, 3))
    new = fresh(family.split(",")[0], target, range(target.vocab_size - 8), seed=1)
    if family in OTHERS:
        plain, new = new, type(new)(replace(new.config, **OTHERS[family]))
        new.share_vocabulary(plain)
        new.start(target, seed=1)
        new.bind(target)
    store = stored(target, new, rows, place / "features")
    draft, _ = prepare(new, "full", PrivateSize())
    trainer = Trainer(draft, target, store, rows, rows, CONFIG, place / "run")
    result = trainer.run()
    return SimpleNamespace(draft=trainer.draft.requires_grad_(False), store=store, result=result, folder=place / "run")


@pytest.fixture
def draft(trained: Any) -> Draft:
    return copy.deepcopy(trained.draft)


# -- training --------------------------------------------------------------------------------------------------------
def test_training_lowers_the_loss_and_keeps_the_best(trained: Any) -> None:
    lines = [json.loads(line) for line in (trained.folder / "curve.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"]
    assert trained.result.best_tau == max(figure for _, figure in trained.result.history) > 1


@pytest.mark.parametrize("loss", ["kl", "tvdpp", "acceptance"])
def test_the_objective_is_a_scalar_of_the_batch(
    loss: str, trained: Any, draft: Draft, target: Target, rows: Any
) -> None:
    """The same for the same batch, shared by workers where there are some, and with a gradient for what is trained."""
    draft.requires_grad_(True)
    settings = replace(CONFIG, loss=loss)
    objective = draft.objective(target, settings)
    batch = objective.collate(rows[:4], trained.store).to(target.device)
    value = objective(batch)
    value.backward()
    assert value.ndim == 0 and torch.equal(value.detach(), objective(batch).detach())
    assert any(p.grad is not None and bool(p.grad.any()) for p in draft.parameters())
    halved = draft.objective(target, settings, lambda sums: 2 * sums)
    torch.testing.assert_close(2 * halved(batch).detach(), value.detach())


def test_an_unknown_loss_is_named(draft: Draft, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    if draft.family == "eagle1":
        pytest.skip("its objective has losses of its own")
    with pytest.raises(UserError, match="unknown loss 'nonsense'"):
        draft.objective(target, SimpleNamespace(**vars(CONFIG) | {"loss": "nonsense"}))
    assert "kl" in LOSSES


def test_weights_of_states_are_taken_where_a_family_says_so(
    trained: Any, draft: Draft, target: Target, rows: Any
) -> None:
    """Twice the weights are the same mean; all of the weight on one row is that row's own loss."""
    if not draft.weighable:
        pytest.skip("its objective weighs positions by itself")
    objective = draft.objective(target, CONFIG)
    weights = {row.key: torch.ones(anchors(row), CONFIG.unroll) for row in rows[:3]}
    whole = objective(objective.collate(rows[:3], trained.store, weights))
    torch.testing.assert_close(
        objective(objective.collate(rows[:3], trained.store, {k: 2 * w for k, w in weights.items()})), whole
    )
    only = {k: w * (k == rows[1].key) for k, w in weights.items()}
    alone = objective(objective.collate(rows[1:2], trained.store, weights))
    torch.testing.assert_close(objective(objective.collate(rows[:3], trained.store, only)), alone)


# -- decoding --------------------------------------------------------------------------------------------------------
def shapes(draft: Draft) -> list[Any]:
    return [ChainShape(GAMMA), *(TREES.values() if draft.grows_trees else ())]


def test_greedy_output_is_plain_decoding(draft: Draft, target: Target) -> None:
    plain = PlainDecoder(target)
    for shape in shapes(draft):
        decoder, kept = make_decoder(target, draft, shape), 0
        for prompt in TOYS.prompts(8):
            expected, got = plain.generate(prompt, TOKENS), decoder.generate(prompt, TOKENS)
            assert got.ids == expected.ids and got.finish_reason == expected.finish_reason
            kept += sum(record.accepted for record in got.rounds)
        assert kept, "nothing was accepted, so nothing was tried"


def test_steps_of_static_shapes_decode_the_same(draft: Draft, target: Target) -> None:
    quick = make_decoder(StaticTarget(target, (1, GAMMA + 1)), draft, ChainShape(GAMMA))
    slow = make_decoder(target, draft, ChainShape(GAMMA))
    for prompt in TOYS.prompts(4):
        one, two = quick.generate(prompt, TOKENS), slow.generate(prompt, TOKENS)
        assert one.ids == two.ids and [r.proposed for r in one.rounds] == [r.proposed for r in two.rounds]


def test_a_family_without_trees_says_so(draft: Draft, target: Target) -> None:
    if draft.grows_trees:
        pytest.skip("it grows trees")
    with pytest.raises(UserError, match=f"a {draft.family} draft proposes chains, not a dynamic tree.*use chain:3"):
        make_decoder(target, draft, TREES["dynamic"])


def test_sampled_output_follows_the_target(draft: Draft, target: Target) -> None:
    for shape in (ChainShape(2), *([STATIC] if draft.grows_trees else [])):
        assert TOYS.pairs_misfit(make_decoder(target, draft, shape, SAMPLED), [5, 9, 70], 250) < 4.5


def test_greedy_drafts_give_the_very_tokens_of_plain_sampling(draft: Draft, target: Target) -> None:
    plain = PlainDecoder(target, SAMPLED)
    for shape in shapes(draft):
        decoder = make_decoder(target, draft, shape, SAMPLED, greedy_drafts=True)
        for seed, prompt in enumerate(TOYS.prompts(3)):
            assert decoder.generate(prompt, TOKENS, seed).ids == plain.generate(prompt, TOKENS, seed).ids


def test_a_proposer_forgets_what_it_is_told_to(draft: Draft, target: Target) -> None:
    """After a roll-back to nothing it serves another request; rounds that are timed start from the same state."""
    decoder = make_decoder(target, draft, ChainShape(GAMMA))
    one, two = (decoder.prefill(prompt, TOKENS) for prompt in TOYS.prompts(2))
    expected = decoder.propose(two)
    decoder.propose(one)
    assert one.proposer.verified and one.proposer.capacity >= len(one.prompt_ids) + TOKENS
    one.proposer.rollback(0)
    two.proposer = one.proposer
    assert decoder.propose(two)[0] == expected[0]
    costs = measure_costs(target, draft, TOYS.prompts(1)[0], (1, 2), shapes(draft)[1:], repeats=1)
    assert len(costs.rounds) == 1 + len(shapes(draft)) and all(cost.seconds > 0 for cost in costs.rounds.values())


# -- walks over stored text --------------------------------------------------------------------------------------------
def decoded(decoder: Any, rows: list[Row]) -> dict[str, list[int]]:
    """Accepted tokens of every round of decoding, cut where the response ends, as nobody sees what is behind it."""
    found = {}
    for row in rows:
        done = decoder.generate(row.prompt_ids, len(row.response_ids))
        assert done.ids == row.response_ids
        found[row.key] = [min(record.accepted, len(record.kept)) for record in done.rounds]
    return found


def test_the_greedy_walk_is_the_decoding(draft: Draft, trained: Any, target: Target, rows: list[Row]) -> None:
    walked = simulate_greedy_chain(draft, target, rows, trained.store, GAMMA)
    assert walked == decoded(make_decoder(target, draft, ChainShape(GAMMA)), rows)
    assert tau_of(walked, rows) == pytest.approx(trained.result.best_tau)
    if not draft.taps:
        assert walked == simulate_greedy_chain(draft, target, rows, None, GAMMA)
    if draft.grows_trees:
        for shape in TREES.values():
            tree = simulate_tree(draft, target, rows, trained.store, shape, TOKENS)
            assert tau_of(tree, rows) > 1
            for key, rounds in decoded(make_decoder(target, draft, shape), rows).items():
                assert len(tree[key]) == len(rounds) and tree[key][:-1] == rounds[:-1]


def test_a_chain_proposes_what_the_walk_predicts(draft: Draft, target: Target, tmp_path: Path) -> None:
    """In a text that goes on as proposed, the walk keeps the whole round, its later steps too."""
    decoder, rows = make_decoder(target, draft, ChainShape(GAMMA)), []
    for i, prompt in enumerate(TOYS.prompts(6)):
        first = PlainDecoder(target).generate(prompt, 1).ids
        proposed = decoder.propose(decoder.prefill(prompt, TOKENS))[0]
        rows.append(Row(f"c{i}", prompt, [*first, *proposed, 5, 6], 0.0, 0, 1.0, i, "length", "hash"))
    walked = simulate_greedy_chain(draft, target, rows, stored(target, draft, rows, tmp_path), GAMMA)
    assert {key: rounds[0] for key, rounds in walked.items()} == {row.key: GAMMA for row in rows}


def test_expected_rounds_are_those_of_sampled_decoding(draft: Draft, target: Target, tmp_path: Path) -> None:
    """Rounds minus their expectation given the text are zero on average over decodings."""
    decoder = make_decoder(target, draft, ChainShape(GAMMA), SAMPLED)
    settings = (SAMPLED.temperature, SAMPLED.top_k, SAMPLED.top_p)
    runs = [decoder.generate([5, 9, 70], 12, seed=seed) for seed in range(50)]
    rows = [Row(f"s{i}", [5, 9, 70], run.ids, *settings, i, "length", "hash") for i, run in enumerate(runs)]
    store = stored(target, draft, rows, tmp_path)
    expected = expected_rounds_sampled(draft, target, rows, store, GAMMA, SAMPLED)
    if not draft.taps:
        assert expected == pytest.approx(expected_rounds_sampled(draft, target, rows, None, GAMMA, SAMPLED))
    rest = [len(run.rounds) - expected[row.key] for run, row in zip(runs, rows, strict=True) if run.rounds]
    off = torch.tensor(rest, dtype=torch.float64)
    assert off.abs().max() > 0.05
    assert abs(float(off.mean() / (off.std() / len(off) ** 0.5))) < 4
    assert set(expected) == {row.key for row in rows if anchors(row)}


def test_alpha_is_the_overlap_that_decoding_measures(draft: Draft, target: Target, tmp_path: Path) -> None:
    """Rounds of one token that start at every anchor, measured along the text, against one pass over it."""
    rows = answers(target, 3, Sampler(1.0))
    store = stored(target, draft, rows, tmp_path)
    found = row_alphas(draft, target, rows, store)
    assert all(0 < alpha <= 1.0001 for alpha in found)
    decoder = make_decoder(target, draft, ChainShape(1), Sampler(1.0), measure_overlap=True)
    for row, alpha in zip(rows, found, strict=True):
        request, overlaps = decoder.prefill(row.prompt_ids, TOKENS + 1), []
        known = torch.tensor([*row.prompt_ids, *row.response_ids])
        request.ids, request.new_ids_T = list(row.response_ids[:1]), known[: len(row.prompt_ids) + 1]
        with torch.inference_mode():
            for at in range(1, len(row.response_ids)):
                record = decoder.round(request)
                overlaps += record.overlap
                # Whatever the round kept, the text goes on as it is stored, one token at a time.
                request.cache.rollback(len(row.prompt_ids) + at)
                request.ids.append(row.response_ids[at])
                request.new_ids_T = known[len(row.prompt_ids) + at :][:1]
                request.new_taps_T = request.new_taps_T[:1]
        assert alpha == pytest.approx(sum(overlaps) / len(overlaps), abs=1e-4)
    assert row_alphas(draft, target, [replace(rows[0], response_ids=[7])], store) == [0.0]


# -- files and private parts -------------------------------------------------------------------------------------------
def proposals(draft: Draft, target: Target) -> list[list[int]]:
    decoder = make_decoder(target, draft, ChainShape(GAMMA))
    return [record.proposed for prompt in TOYS.prompts(3) for record in decoder.generate(prompt, TOKENS).rounds]


def test_a_draft_is_saved_and_loaded(draft: Draft, target: Target, tmp_path: Path) -> None:
    save_draft(tmp_path / "draft", draft, {"method": "full"})
    back, meta = load_draft(tmp_path / "draft")
    assert meta["family"] == draft.family and back.config == draft.config
    assert proposals(back.bind(target), target) == proposals(draft, target)


def test_a_private_part_is_trained_saved_and_merged(
    draft: Draft, trained: Any, target: Target, rows: list[Row], tmp_path: Path
) -> None:
    split, names = prepare(copy.deepcopy(draft), "lora", PrivateSize(rank=2), seed=1)
    steps = replace(CONFIG, epochs=4, evaluate_every=10**6)
    objective = split.objective(target, steps)
    optimizer = torch.optim.Adam([p for p in split.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        objective(objective.collate(rows, trained.store)).backward()
        optimizer.step()
    split.requires_grad_(False)
    save_private(tmp_path / "part", split, names, draft.base_hash(), {"method": "lora"})
    back, _ = load_private(tmp_path / "part", draft, draft.base_hash())
    merged = split.merged().bind(target)
    assert merged.config == draft.config and set(merged.state_dict()) == set(draft.state_dict())
    changed = proposals(split, target)
    assert proposals(back.bind(target), target) == changed == proposals(merged, target)
    assert changed != proposals(draft, target), "the part changes nothing, so nothing was tried"
