"""Replay: the states are those that decoding meets, sampled expectations add up, and training moves only them."""

from __future__ import annotations

import copy
import itertools
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from redraft import provenance
from redraft.acceptance.simulate import simulate_greedy_chain, tau_of
from redraft.adaptation.core import Adaptation, Plan
from redraft.adaptation.runs import Log
from redraft.data.store import REFERENCE, Row
from redraft.decode.engine import ChainDecoder, PlainDecoder
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.drafts.opening import OpenDraft
from redraft.errors import UserError
from redraft.features import FeatureStore
from redraft.registries import LOSSES
from redraft.rows import anchors
from redraft.settings.training import ReplayConfig, TrainConfig
from redraft.target import Target
from redraft.training.trainer import Trainer, lost_states, replay_settings, replay_states

GAMMA = 4
toys: dict[str, Any] = runpy.run_path(str(Path(__file__).parent / "toys.py"))


# Nothing below changes the target, its answers or their features: they are made once. The draft is trained once, and
# every test gets a copy of its own.
@pytest.fixture(scope="module")
def target(tiny_target: Callable[..., Target]) -> Target:
    return tiny_target("llama", **toys["SMALL"])


@pytest.fixture(scope="module")
def rows(target: Target) -> list[Row]:
    plain, found = PlainDecoder(target), []
    for i, prompt in enumerate(toys["prompts"](18)):
        done = plain.generate(prompt, 20)
        found.append(Row(f"p{i}", prompt, done.ids, 0.0, 0, 1.0, 0, done.finish_reason, "hash"))
    return [row for row in found if anchors(row)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replay")


@pytest.fixture(scope="module")
def store(target: Target, rows: list[Row], folder: Path) -> FeatureStore:
    store = FeatureStore(folder / "features", {"target": "tiny"})
    store.build(target, rows)
    return store


@pytest.fixture(scope="module")
def half_trained(target: Target, rows: list[Row], store: FeatureStore, folder: Path) -> Eagle3Draft:
    """Half trained, so that rounds accept something and lose often."""
    config = TrainConfig(epochs=6, batch_anchors=64, learning_rate=5e-3, optimizer="adamw", gamma=GAMMA)
    trainer = Trainer(fresh_draft(target, range(120), seed=2), target, store, rows, rows, config, folder / "first")
    trainer.run()
    return trainer.draft


@pytest.fixture
def draft(half_trained: Eagle3Draft) -> Eagle3Draft:
    return copy.deepcopy(half_trained)


# -- the states ------------------------------------------------------------------------------------------------------
def test_the_states_are_those_that_decoding_meets(
    target: Target, rows: list[Row], store: FeatureStore, draft: Eagle3Draft
) -> None:
    settings = ReplayConfig(passes=1, accepted=1.0, failed=5.0)
    found = replay_states(draft, target, rows, store, GAMMA, settings)
    decoder, lost, rounds = ChainDecoder(target, draft, gamma=GAMMA), 0, 0
    for row in rows:
        expected = torch.zeros(anchors(row), GAMMA)
        at = 0
        for one in decoder.generate(row.prompt_ids, len(row.response_ids)).rounds:
            rounds += 1
            accepted = min(one.accepted, len(one.kept))
            wrong = at + accepted + 1
            # Ended by a token of the response that the draft can say, and not by the response's end.
            if accepted < GAMMA and wrong < len(row.response_ids) and row.response_ids[wrong] < 120:
                lost += 1
                expected[at, :accepted], expected[at, accepted] = 1.0, 5.0
            at += accepted + 1
        if expected.any():
            torch.testing.assert_close(found.weights.pop(row.key), expected)
    assert not found.weights
    assert (found.rounds, found.lost_rounds) == (rounds, lost) and 3 < lost < rounds
    assert f"{lost} of {rounds} rounds" in found.summary()


def test_sampled_rounds_give_the_expectation_over_all_ways_to_decode() -> None:
    """Against every outcome of every acceptance, weighed by its probability."""
    generator = np.random.default_rng(0)
    chances, gamma = generator.uniform(0.1, 0.9, (5, 3)), 3
    steps = np.array([3, 2, 3, 2, 1])  # the last two run into the end of the response
    for anchor, sayable in enumerate(steps):
        chances[anchor, sayable:] = 0.0
    reached, failed = np.zeros((5, gamma)), np.zeros((5, gamma))

    def play(at: int, chance: float) -> None:
        if at >= 5:
            return
        through = 1.0
        for accepted in range(gamma + 1):
            stop = 1 - chances[at, accepted] if accepted < gamma else 1.0
            here = chance * through * stop
            if accepted < steps[at]:
                reached[at, : accepted + 1] += here
                failed[at, accepted] += here
            if here > 0:
                play(at + accepted + 1, here)
            through *= chances[at, accepted] if accepted < gamma else 0.0

    play(0, 1.0)
    found = lost_states(chances, steps)
    np.testing.assert_allclose(found[0], reached, atol=1e-12)
    np.testing.assert_allclose(found[1], failed, atol=1e-12)


def test_a_floor_reaches_every_state_that_can_be_right(
    target: Target, rows: list[Row], store: FeatureStore, draft: Eagle3Draft
) -> None:
    plain = replay_states(draft, target, rows, store, GAMMA, ReplayConfig())
    floored = replay_states(draft, target, rows, store, GAMMA, ReplayConfig(floor=0.5))
    for row in rows:
        if row.key not in plain.weights:
            continue
        sayable = torch.zeros(anchors(row), GAMMA)
        for a, j in itertools.product(range(anchors(row)), range(GAMMA)):
            future = row.response_ids[a + 1 : a + 2 + j]
            sayable[a, j] = len(future) == j + 1 and all(token < 120 for token in future)
        torch.testing.assert_close(floored.weights[row.key], plain.weights[row.key] + 0.5 * sayable)


def test_sampled_rows_are_walked_under_their_own_sampler(
    target: Target, rows: list[Row], store: FeatureStore, draft: Eagle3Draft, tmp_path: Path
) -> None:
    sampled = [replace(row, temperature=0.8) for row in rows]
    theirs = FeatureStore(tmp_path / "sampled", {"target": "tiny"})
    theirs.build(target, sampled)
    found = replay_states(draft, target, sampled, theirs, GAMMA, ReplayConfig())
    total = sum(map(anchors, rows))
    assert total / (GAMMA + 1) < found.rounds < total and 0 < found.lost_rounds < found.rounds
    fractions = torch.cat([w.flatten() for w in found.weights.values()])
    assert ((fractions > 0) & (fractions < 1)).any() and fractions.min() >= 0 and fractions.max() <= 1
    # Greedy drafts under a sampling target are the greedy walk over that text.
    greedy = replay_states(draft, target, sampled, theirs, GAMMA, ReplayConfig(), greedy_drafts=True)
    same = replay_states(draft, target, rows, store, GAMMA, ReplayConfig())
    assert (greedy.rounds, greedy.lost_rounds) == (same.rounds, same.lost_rounds)


def test_reference_answers_are_refused(target: Target, rows: list[Row], store: FeatureStore, draft: Any) -> None:
    strangers = [replace(rows[0], source=REFERENCE)]
    with pytest.raises(UserError, match="p0@reference is a reference answer"):
        replay_states(draft, target, strangers, store, GAMMA, ReplayConfig())


@pytest.mark.parametrize(
    "bad", [{"passes": -1}, {"epochs": 0}, {"rate": 0}, {"failed": 0}, {"accepted": 0}, {"floor": -1}]
)
def test_settings_that_cannot_be_meant_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(bad))} must be "):
        ReplayConfig(**bad)  # type: ignore[arg-type]


# -- training --------------------------------------------------------------------------------------------------------
def test_equal_weights_without_decay_are_plain_training(
    target: Target, rows: list[Row], store: FeatureStore, draft: Eagle3Draft
) -> None:
    """At one draft step the objective is the trainer's own; a weight of zero takes a state out."""
    config = TrainConfig(unroll=1, batch_anchors=64)
    objective = draft.objective(target, config)
    plain = objective(objective.collate(rows, store))
    weighted = objective.collate(rows, store, {row.key: torch.ones(anchors(row), 1) for row in rows})
    torch.testing.assert_close(objective(weighted), plain)
    torch.testing.assert_close(objective(replace(weighted, weight_MJ=3 * weighted.weight_MJ)), plain)
    first = torch.zeros_like(weighted.weight_MJ)
    first[: anchors(rows[0])] = 1.0
    alone = objective.collate(rows[:1], store, {rows[0].key: torch.ones(anchors(rows[0]), 1)})
    torch.testing.assert_close(objective(replace(weighted, weight_MJ=first)), objective(alone))


@pytest.mark.parametrize("loss", LOSSES.names())
def test_every_loss_sees_the_weighed_states_alone(
    loss: str, target: Target, rows: list[Row], store: FeatureStore, draft: Eagle3Draft
) -> None:
    """The rest of the batch changes neither the value nor the gradient of a loss without randomness."""
    objective = draft.objective(target, TrainConfig(loss=loss, unroll=GAMMA))
    states = replay_states(draft, target, rows, store, GAMMA, ReplayConfig(failed=3.0)).weights
    chosen = [row for row in rows if row.key in states][:3]
    silent = {row.key: torch.zeros(anchors(row), GAMMA) for row in rows if row not in chosen}

    def gradient(part: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        draft.zero_grad()
        torch.manual_seed(0)
        value = objective(objective.collate(part, store, states | silent))
        value.backward()
        return value.detach(), draft.fc.weight.grad.clone()

    alone, among = gradient(chosen), gradient([*chosen, *(row for row in rows if row not in chosen)])
    assert alone[0] > 0 and alone[1].abs().max() > 0
    torch.testing.assert_close(alone[0], among[0])
    torch.testing.assert_close(alone[1], among[1], atol=1e-5, rtol=1e-3)


def test_replay_trains_on_lost_rounds_and_never_ends_worse(
    target: Target, rows: list[Row], store: FeatureStore, draft: Eagle3Draft, tmp_path: Path
) -> None:
    config = TrainConfig(batch_anchors=64, learning_rate=5e-3, optimizer="adamw", gamma=GAMMA, evaluate_every=4)
    settings = ReplayConfig(passes=2, epochs=6, rate=0.6, failed=2.0)
    before = tau_of(simulate_greedy_chain(draft, target, rows, store, GAMMA), rows)
    ledger, said = provenance.Ledger(), list[str]()

    def replay() -> Adaptation:
        job = Adaptation(
            target,
            OpenDraft(copy.deepcopy(draft), {}, "old"),
            Plan("full", train=config, replay=settings),
            tmp_path,
            Log(ledger, said.append),
            store,
        )
        job.replay(rows, rows)
        return job

    job = replay()
    replayed, results = job.draft, job.results
    after = tau_of(simulate_greedy_chain(replayed, target, rows, store, GAMMA), rows)
    assert results[0].start_tau == pytest.approx(before) and after == pytest.approx(results[-1].best_tau)
    assert after > before
    assert [entry.stage for entry in ledger.stages] == ["replay walk", "train"]
    assert ledger.stages[0].tokens == 2 * GAMMA * sum(map(anchors, rows))
    assert sum("rounds ended early" in line for line in said) == 2
    # The same call again: nothing is walked or trained, and the same weights come out.
    assert all(torch.equal(a, b) for a, b in zip(replay().draft.parameters(), replayed.parameters(), strict=True))
    assert sum("rounds ended early" in line for line in said) == 2


def test_off_is_the_default(
    target: Target, rows: list[Row], store: FeatureStore, draft: Eagle3Draft, tmp_path: Path
) -> None:
    job = Adaptation(target, OpenDraft(draft, {}, ""), Plan("full"), tmp_path, Log(provenance.Ledger()), store)
    job.replay(rows, rows)
    assert job.draft is draft and job.results == [] and not (tmp_path / "replay").exists()
    with pytest.raises(UserError, match="nothing to replay"):
        Trainer(draft, target, store, rows, rows, TrainConfig(), tmp_path / "none", weights={})


def test_a_pass_unrolls_as_far_as_a_round_goes() -> None:
    config = replay_settings(TrainConfig(unroll=3, gamma=6, learning_rate=0.1), ReplayConfig(1, epochs=2, rate=0.5))
    assert (config.unroll, config.epochs, config.learning_rate) == (6, 2, 0.05)
