"""The offline estimate of a sampled chain: proved by enumeration on a toy, and against real decoding."""

from __future__ import annotations

import functools
import itertools
import math
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from redraft.acceptance.simulate import (
    expected_rounds_sampled,
    simulate_greedy_chain,
    tau_of,
    visits,
)
from redraft.data.store import REFERENCE, Row
from redraft.decode.engine import ChainDecoder, PlainDecoder
from redraft.decode.requests import Generation
from redraft.decode.tree import TreeDecoder, simulate_tree
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.errors import UserError
from redraft.features import FeatureStore
from redraft.rows import anchors
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import DynamicTree, StaticTree
from redraft.target import Target

SMALL = runpy.run_path(str(Path(__file__).with_name("toys.py")))["SMALL"]
GAMMA, TOKENS, DECODINGS = 3, 12, 120
SAMPLERS = (Sampler(1.0), Sampler(0.7, top_k=20, top_p=0.9))


# -- the toy: every outcome of the rule, counted -----------------------------------------------------------------------
WORDS, LENGTH, WIDTH = 3, 4, 2


def toy(seed: int) -> tuple[dict[tuple[int, ...], np.ndarray], dict[tuple[int, tuple[int, ...]], np.ndarray]]:
    """Random target(text) and draft(start of the round, text); the draft cannot say the last word."""
    random = np.random.default_rng(seed)
    target, draft = {}, {}
    for size in range(LENGTH):
        for text in itertools.product(range(WORDS), repeat=size):
            target[text] = random.dirichlet(np.ones(WORDS))
            for start in range(size + 1):
                draft[start, text] = np.append(random.dirichlet(np.ones(WORDS - 1)), 0.0)
    return target, draft


def outcomes(target, draft, text: tuple[int, ...], start: int, step: int):
    """Every way a round can end: (probability, text behind it), by the acceptance rule as it is written down."""
    if len(text) == LENGTH:
        yield 1.0, text  # what the round may add here, nobody sees
        return
    t, d = target[text], draft.get((start, text))
    if step == WIDTH:
        for token in range(WORDS):
            yield float(t[token]), (*text, token)
        return
    residual = np.maximum(t - d, 0)
    residual = residual / residual.sum()
    for token in range(WORDS):
        if d[token] == 0:
            continue
        keep = min(1.0, float(t[token] / d[token]))
        for chance, after in outcomes(target, draft, (*text, token), start, step + 1):
            yield float(d[token]) * keep * chance, after
        for other in range(WORDS):
            yield float(d[token]) * (1 - keep) * float(residual[other]), (*text, other)


def joint(target, draft) -> dict[tuple[int, ...], dict[int, float]]:
    """Probability of every (finished text, number of rounds)."""
    open_, found = {((), 0): 1.0}, {}
    while open_:
        (text, rounds), mass = open_.popitem()
        if len(text) == LENGTH:
            counts = found.setdefault(text, {})
            counts[rounds] = counts.get(rounds, 0.0) + mass
            continue
        for chance, after in outcomes(target, draft, text, len(text), 0):
            key = (after, rounds + 1)
            open_[key] = open_.get(key, 0.0) + mass * chance
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_walk_is_the_distribution_of_rounds_given_the_text(seed):
    target, draft = toy(seed)
    found = joint(target, draft)
    assert len(found) == WORDS**LENGTH
    for text, counts in found.items():
        alone = math.prod(target[text[:i]][text[i]] for i in range(LENGTH))
        assert sum(counts.values()) == pytest.approx(alone)  # lossless
        chances = np.zeros((LENGTH, WIDTH))
        for start, step in itertools.product(range(LENGTH), range(WIDTH)):
            if start + step < LENGTH:
                prefix, token = text[: start + step], text[start + step]
                chances[start, step] = min(1.0, draft[start, prefix][token] / target[prefix][token])
        expected = sum(rounds * mass for rounds, mass in counts.items()) / alone
        assert visits(chances).sum() == pytest.approx(expected)


def test_visits_of_certain_rounds_are_the_walk():
    runs = [2, 0, 1, 0, 3, 2, 1]
    chances = np.array([[1.0] * min(run, 3) + [0.0] * (3 - min(run, 3)) for run in runs])
    assert visits(chances).tolist() == [1, 0, 0, 1, 1, 0, 0]
    assert visits(np.zeros((4, 2))).tolist() == [1, 1, 1, 1]
    assert visits(np.zeros((0, 2))).tolist() == []


# -- real decoding -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def target(tiny_target) -> Target:
    return tiny_target("llama", **SMALL)


def usual_draft(target: Target) -> Eagle3Draft:
    """Starts from the target's own late features and head, which is enough for some acceptance; 120 of 128 words."""
    return fresh_draft(target, range(0, 120), seed=2)


@pytest.fixture
def draft(target) -> Eagle3Draft:
    return usual_draft(target)


def prompt(index: int) -> list[int]:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(4, 120, (3 + index % 5,), generator=generator).tolist()


def as_row(index: int, done: Generation, prompt_ids: list[int], sampler: Sampler) -> Row:
    fields = (sampler.temperature, sampler.top_k, sampler.top_p, index, done.finish_reason, "hash")
    return Row(f"p{index}", prompt_ids, done.ids, *fields)


def features(target: Target, rows: list[Row], folder) -> FeatureStore:
    store = FeatureStore(folder, {})
    store.build(target, rows)
    return store


@pytest.fixture(scope="module")
def decoded(target) -> Callable[[Sampler], list[Generation]]:
    """``decoded(sampler)`` -> what a chain decoder makes of the prompts, made once."""

    @functools.cache
    def decode(sampler: Sampler) -> list[Generation]:
        decoder = ChainDecoder(target, usual_draft(target), GAMMA, sampler)
        return [decoder.generate(prompt(i % 8), TOKENS, seed=i) for i in range(DECODINGS)]

    return decode


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.describe())
def test_expected_rounds_are_those_of_real_decoding(sampler, target, draft, decoded, tmp_path):
    """Given each decoded text, rounds minus their expectation has mean 0; the bound is 4 standard errors."""
    rows, rounds = [], {}
    for i, done in enumerate(decoded(sampler)):
        row = as_row(i, done, prompt(i % 8), sampler)
        rows.append(row)
        rounds[row.key] = len(done.rounds)
    rows = [row for row in rows if anchors(row)]
    expected = expected_rounds_sampled(draft, target, rows, features(target, rows, tmp_path), GAMMA, sampler)
    differences = np.array([rounds[row.key] - expected[row.key] for row in rows])
    error = differences.std(ddof=1) / math.sqrt(len(rows))
    assert error > 0 and abs(differences.mean()) < 4 * error
    # The bound is of use: it would notice an estimate that counted accepted and rejected tokens the wrong way.
    tau = sum(map(anchors, rows)) / sum(expected.values())
    assert 1.1 < tau < GAMMA + 1
    assert 4 * error < 0.15 * np.mean(list(expected.values()))


def test_texts_of_plain_decoding_give_the_same_tau(target, draft, decoded, tmp_path):
    sampler = Sampler(1.0)
    plain = PlainDecoder(target, sampler)
    rows = [
        as_row(i, plain.generate(prompt(i % 8), TOKENS, seed=1000 + i), prompt(i % 8), sampler)
        for i in range(DECODINGS)
    ]
    rows = [row for row in rows if anchors(row)]
    expected = expected_rounds_sampled(draft, target, rows, features(target, rows, tmp_path), GAMMA, sampler)
    pairs = np.array([[len(g.ids) - 1, len(g.rounds)] for g in decoded(sampler) if g.rounds], dtype=float)
    ours = np.array([[anchors(row), expected[row.key]] for row in rows])

    def ratio_and_error(values: np.ndarray) -> tuple[float, float]:
        ratio = values[:, 0].sum() / values[:, 1].sum()
        residual = values[:, 0] - ratio * values[:, 1]
        return ratio, residual.std(ddof=1) / values[:, 1].mean() / math.sqrt(len(values))

    (decoding, error), (offline, error_offline) = ratio_and_error(pairs), ratio_and_error(ours)
    assert abs(decoding - offline) < 4 * math.hypot(error, error_offline)
    assert error_offline < error  # what the dice of acceptance add is integrated out


def test_greedy_drafts_under_a_sampling_target_are_exact(target, draft, tmp_path):
    sampler = Sampler(0.8)
    plain = PlainDecoder(target, sampler)
    chain = ChainDecoder(target, draft, GAMMA, sampler, greedy_drafts=True)
    rows, rounds = [], {}
    for i in range(24):
        text = plain.generate(prompt(i), TOKENS, seed=i)
        done = chain.generate(prompt(i), TOKENS, seed=i)
        assert done.ids == text.ids  # the uniforms are used as in plain decoding
        if len(text.ids) > 1:
            rows.append(as_row(i, text, prompt(i), sampler))
            rounds[rows[-1].key] = float(len(done.rounds))
    store = features(target, rows, tmp_path)
    assert expected_rounds_sampled(draft, target, rows, store, GAMMA, sampler, greedy_drafts=True) == rounds
    assert sum(rounds.values()) < sum(anchors(row) for row in rows)


TREES = {
    "dynamic": DynamicTree(depth=3, top_k=3, nodes=8),
    "static": StaticTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))),
}


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.8)], ids=lambda s: s.describe())
@pytest.mark.parametrize("shape", TREES)
def test_a_tree_of_greedy_drafts_goes_through_the_rounds_of_decoding(shape, sampler, target, draft, tmp_path):
    tree = TreeDecoder(target, draft, TREES[shape], sampler, greedy_drafts=True)
    done = [tree.generate(prompt(i), TOKENS, seed=i) for i in range(24)]
    rows = [as_row(i, found, prompt(i), sampler) for i, found in enumerate(done)]
    told = list[int]()
    walked = simulate_tree(draft, target, rows, features(target, rows, tmp_path), TREES[shape], TOKENS, told.append)
    kept = {row.key: [len(r.kept) for r in found.rounds] for row, found in zip(rows, done, strict=True) if anchors(row)}
    assert {key: len(rounds) for key, rounds in walked.items()} == {key: len(rounds) for key, rounds in kept.items()}
    for key, rounds in walked.items():
        # The last round may end with an accepted token: an end, or the limit.
        assert [accepted + 1 for accepted in rounds[:-1]] == kept[key][:-1]
        assert kept[key][-1] in (rounds[-1], rounds[-1] + 1)
    assert told[-1] == len(walked) and max(map(max, walked.values())) > 0
    # Another draft goes through other rounds: it is the draft that is walked.
    other = simulate_tree(
        fresh_draft(target, range(0, 120), seed=9), target, rows, features(target, rows, tmp_path), TREES[shape], TOKENS
    )
    assert other.keys() == walked.keys() and other != walked


def test_a_tree_that_is_a_chain_is_the_chains_walk(target, draft, tmp_path):
    plain = PlainDecoder(target)
    rows = [as_row(i, plain.generate(prompt(i), TOKENS), prompt(i), Sampler()) for i in range(12)]
    store = features(target, rows, tmp_path)
    chain = StaticTree(tuple((0,) * depth for depth in range(1, GAMMA + 1)))
    assert simulate_tree(draft, target, rows, store, chain, TOKENS) == simulate_greedy_chain(
        draft, target, rows, store, GAMMA
    )


def test_a_tree_is_not_walked_over_reference_answers(target, draft, tmp_path):
    row = replace(as_row(0, PlainDecoder(target).generate(prompt(0), TOKENS), prompt(0), Sampler()), source=REFERENCE)
    with pytest.raises(UserError, match="reference answer"):
        simulate_tree(draft, target, [row], features(target, [row], tmp_path), TREES["dynamic"], TOKENS)


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_no_temperature_is_the_greedy_walk(temperature, target, draft, tmp_path):
    sampler = Sampler(temperature)
    plain = PlainDecoder(target)
    rows = [as_row(i, plain.generate(prompt(i), TOKENS), prompt(i), sampler) for i in range(12)]
    rows = [row for row in rows if anchors(row)]
    store = features(target, rows, tmp_path)
    walked = simulate_greedy_chain(draft, target, rows, store, GAMMA)
    expected = expected_rounds_sampled(draft, target, rows, store, GAMMA, sampler)
    assert expected == pytest.approx({key: len(rounds) for key, rounds in walked.items()}, abs=1e-3)
    assert sum(map(anchors, rows)) / sum(expected.values()) == pytest.approx(tau_of(walked, rows), rel=1e-3)
    assert any(max(rounds) for rounds in walked.values())


def test_portions_do_not_matter(target, draft, tmp_path, monkeypatch):
    sampler = Sampler(1.0)
    plain = PlainDecoder(target, sampler)
    rows = [as_row(i, plain.generate(prompt(i), TOKENS, seed=i), prompt(i), sampler) for i in range(8)]
    store = features(target, rows, tmp_path)
    whole = expected_rounds_sampled(draft, target, rows, store, GAMMA, sampler)
    monkeypatch.setattr("redraft.drafts.walks.CHUNK", 3)
    monkeypatch.setattr("redraft.drafts.eagle.walk.EagleWalk.batch_anchors", 20)
    assert expected_rounds_sampled(draft, target, rows, store, GAMMA, sampler) == pytest.approx(whole, rel=1e-5)


def test_rows_of_another_sampler_are_refused(target, draft, tmp_path):
    row = Row("a", [5, 6], [7, 8, 9], 0.7, 0, 1.0, 0, "length", "hash")
    store = features(target, [row], tmp_path)
    with pytest.raises(UserError, match="drawn with temperature 0.7, the chain samples with temperature 1"):
        expected_rounds_sampled(draft, target, [row], store, GAMMA, Sampler(1.0))


def test_rows_without_an_anchor_are_left_out(target, draft, tmp_path):
    row = Row("a", [5, 6], [7], 1.0, 0, 1.0, 0, "length", "hash")
    expected = expected_rounds_sampled(draft, target, [row], FeatureStore(tmp_path, {}), GAMMA, Sampler(1.0))
    assert expected == {} and tau_of({}, [row]) == 0.0
