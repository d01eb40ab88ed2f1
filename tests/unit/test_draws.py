"""The harness of sampled draws: right decoding passes its tests, and every planted fault fails them."""

from __future__ import annotations

import pytest
import torch
from faults.drawing.counting import chi_square_tail, compared, every_test, holm, independent, whole
from faults.drawing.drawn import ACCEPTED, BONUS, DECODERS, WRITER, Draws, draws_of, written
from faults.drawing.plants import PLANTS, chains
from faults.drawing.world import DRAFTS, END, LIMIT, PROMPTS, SAMPLERS, V, make_draft, make_world

from redraft.decode.accept import accept_chains
from redraft.sampling import warp

# Of the benchmark's target, and of every decoder few enough draws for a test.
WORLD, SEED, FEW, MANY = make_world(6), 77_000_000, 250, 1500


def drawn(decoder: str, sampler: int = 0, draft: str = "uniform", count: int = FEW) -> Draws:
    if decoder == WRITER:
        return written(WORLD, count, LIMIT, SEED)[SAMPLERS[sampler]]
    return draws_of(decoder, WORLD, SAMPLERS[sampler], draft, count, LIMIT, SEED)


def ps_of(draws: Draws, sampler: int = 0) -> dict[str, float]:
    return {found.test: found.p for found in every_test(draws, WORLD.probs(SAMPLERS[sampler]))}


def test_what_is_enumerated_is_what_the_target_says():
    for prompt, ids in enumerate(PROMPTS):
        step = WORLD.target.forward(torch.tensor([[*ids, 4, 10]]), taps=False)
        logits = WORLD.target.logits(step.hidden_BTH[:, -1])
        for sampler in SAMPLERS:
            exact = WORLD.probs(sampler)[2][prompt, 4 * V + 10]
            torch.testing.assert_close(warp(logits, sampler)[0].double(), exact, atol=1e-5, rtol=1e-4)


def test_the_drafts_are_wrong():
    table = {kind: make_draft(kind, WORLD).table.softmax(-1) for kind in DRAFTS}
    assert float(table["adversarial"][WORLD.likeliest].max()) == 0
    assert bool((table["point mass"].max(-1).values == 1).all())
    assert table["uniform"].shape == (V, V - 2)
    overlap = torch.minimum(WORLD.probs(SAMPLERS[0])[1], table["adversarial"].double()).sum(-1)
    assert 0 < float(overlap.mean()) < 0.2


def test_the_statistics_are_those_of_the_tables():
    assert chi_square_tail(3.841459, 1) == pytest.approx(0.05, abs=1e-6)
    assert chi_square_tail(18.307038, 10) == pytest.approx(0.05, abs=1e-6)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    seen, probs = torch.tensor([[60.0, 30.0, 10.0]]), torch.tensor([[0.5, 0.3, 0.2]]).double()
    (pearson, g) = compared("a test", seen, probs, g_test=True)
    assert pearson.statistic == pytest.approx(7.0) and pearson.freedom == 2
    assert g.statistic == pytest.approx(7.954, abs=1e-3) and g.test == "a test, G"
    assert next(compared("never", seen, torch.tensor([[0.6, 0.4, 0.0]]).double())).p == 0


def test_p_values_are_uniform_where_nothing_is_wrong_and_small_where_something_is():
    """Draws made by hand from the exact distribution, two hundred times."""
    _, exact = whole(drawn("batched", count=2), WORLD.probs(SAMPLERS[0]))
    cells, generator = exact[:1] / exact[:1].sum(), torch.Generator().manual_seed(0)
    ps: dict[str, list[float]] = {}
    for _ in range(200):
        draws = torch.multinomial(cells, 3000, True, generator=generator)[0]
        seen = torch.bincount(draws, minlength=cells.shape[1])[None]
        for found in compared("whole", seen, cells, g_test=True):
            ps.setdefault(found.test, []).append(found.p)
    for found in ps.values():
        assert 0.3 < sum(found) / 200 < 0.7 and 0.005 < sum(p < 0.05 for p in found) / 200 < 0.12
    rows = torch.multinomial(WORLD.probs(SAMPLERS[0])[0][0, 0], 3000, True, generator=generator)
    assert next(independent("rows", rows[::2], rows[1::2])).p > 1e-3
    assert next(independent("rows", rows[::2], rows[::2])).p < 1e-6


def made_by_hand(count: int, generator: torch.Generator) -> Draws:
    """Answers from the enumerated chances, with origins that have nothing to do with them."""
    prompts, probs = torch.arange(count) % len(PROMPTS), WORLD.probs(SAMPLERS[0])
    tokens, context = torch.full((count, LIMIT), V), torch.zeros(count, dtype=torch.long)
    for place in range(LIMIT):
        going = (context >= 0) if place == 0 else (tokens[:, place - 1] != END) & (tokens[:, place - 1] < V)
        drawn = torch.multinomial(probs[place][prompts, context.clamp(max=V**place - 1)], 1, generator=generator)[:, 0]
        tokens[:, place] = torch.where(going, drawn, V)
        context = context * V + drawn
    return Draws(prompts, tokens, torch.randint(ACCEPTED, BONUS + 1, tokens.shape, generator=generator), 0, (1, 2))


def test_every_test_is_right_about_how_sure_it_is():
    """Of draws by hand a test is below 0.05 as often as that: the tests of many draws would alarm for nothing else."""
    generator, ps = torch.Generator().manual_seed(5), dict[str, list[float]]()
    for _ in range(80):
        for found in every_test(made_by_hand(1200, generator), WORLD.probs(SAMPLERS[0])):
            ps.setdefault(found.test, []).append(found.p)
    assert len(ps) == 13
    for name, found in ps.items():
        assert 0.35 < sum(found) / len(found) < 0.65, name
        assert sum(p < 0.05 for p in found) / len(found) < 0.15, name
    everything = [p for found in ps.values() for p in found]
    assert 0.03 < sum(p < 0.05 for p in everything) / len(everything) < 0.075


@pytest.mark.parametrize("decoder", [*DECODERS, WRITER])
def test_right_decoding_passes(decoder):
    """A few draws of every way, under the sampler that filters most; the benchmark makes many."""
    draws = drawn(decoder, 1, count=MANY if decoder in ("batched", WRITER) else FEW)
    found = ps_of(draws, 1)
    assert len(found) >= 5 and min(found.values()) * len(found) > 1e-3
    again = drawn(decoder, 1, count=4)
    assert torch.equal(again.tokens, draws.tokens[:4])


def test_the_rule_that_plants_are_made_from_is_right_without_them():
    generator = torch.Generator().manual_seed(1)
    target, draft = (torch.rand(50, n, V, generator=generator).softmax(-1) for n in (3, 2))
    ids, uniforms = torch.randint(0, V, (50, 2), generator=generator), torch.rand(50, 3, generator=generator)
    for ours, theirs in zip(
        chains()(target, draft, ids, uniforms), accept_chains(target, draft, ids, uniforms), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_seen(name):
    plant = PLANTS[name]
    # A batch where there is one, since it costs least; the subtlest fault of a tree takes a few draws more.
    decoder = plant.decoders[-1]
    single = 4 * FEW if name == "siblings not renormalised" else 2 * FEW
    with plant.planted():
        draws = drawn(decoder, plant.sampler, plant.draft, MANY if decoder in ("batched", WRITER) else single)
    found = ps_of(draws, plant.sampler)
    assert min(found.values()) < 1e-6, found
