"""Distillation of a tiny causal LM: right losses in any portions, mixes by share, flat memory, exact resumption."""

from __future__ import annotations

import json
import math
import runpy
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from redraft.data.generate import Request, generate
from redraft.data.packed import PackedText, TextSource
from redraft.data.server import parse_top
from redraft.data.store import Row
from redraft.drafts.standalone.objective import CausalModel, Distillation, StateTeacher
from redraft.errors import UserError
from redraft.features import ComputedFeatures, FeatureStore
from redraft.registries import LOSSES
from redraft.rows import anchors
from redraft.settings.sampler import Sampler
from redraft.settings.training import DistilConfig
from redraft.target import Target
from redraft.training.causal import MixedSteps, TokenTeacher, TopTeacher, distil, step_order
from redraft.training.loop import Checkpoint

HERE = Path(__file__).parents[1]
build_model = runpy.run_path(str(HERE / "tiny_models.py"))["build_model"]
CONFIG = DistilConfig(
    batch_anchors=64, micro_tokens=64, epochs=1.0, evaluate_every=3, gamma=3, text_share=0.0, precision="float32",
    learning_rate=3e-3, save_seconds=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(build_model(num_hidden_layers=2), taps=())


@pytest.fixture(scope="module")
def rows(target: Target) -> list[Row]:
    """Greedy responses of the target, of several lengths."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(4, 128, (3 + i % 5,), generator=generator).tolist() for i in range(24)]
    requests = [Request(str(i), ids, Sampler()) for i, ids in enumerate(prompts)]
    found = []
    for done in generate(target, requests, 24, 8):
        length = 6 + 3 * (int(done.request.key) % 7)
        answer = done.response_ids[:length]
        ids = list(done.request.prompt_ids)
        found.append(Row(done.request.key, ids, answer, 0.0, 0, 1.0, 0, "length", "hash"))
    return sorted((row for row in found if anchors(row)), key=lambda row: row.key)


def live(target: Target) -> StateTeacher:
    """A teacher whose states are computed as they are needed."""
    return StateTeacher(target, ComputedFeatures(target))


def small(seed: int = 1, **overrides):
    return build_model(seed=seed, num_hidden_layers=1, initializer_range=0.1, **overrides)


def reference(model, target: Target, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft and teacher logits [M, V] of all positions, row by row, computed plainly."""
    draft, teacher = [], []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        places = slice(len(row.prompt_ids), ids.shape[1] - 1)
        draft.append(model(input_ids=ids).logits[0, places])
        with torch.no_grad():
            teacher.append(target.model(input_ids=ids).logits[0, places])
    return torch.cat(draft), torch.cat(teacher)


@pytest.mark.parametrize("loss", LOSSES.names())
def test_every_loss_is_that_of_plain_logits_in_any_portions(loss: str, target: Target, rows: list[Row]) -> None:
    model, some, entry = small(), rows[:5], LOSSES.get(loss)
    draft, teacher = reference(model, target, some)
    if hasattr(entry, "chain"):
        inside = torch.cat([torch.arange(anchors(r), 0, -1)[:, None] > torch.arange(3) for r in some])
        steps = [inside[:, j].nonzero().squeeze(-1) for j in range(3)]
        chains = ([draft[i + j] for j, i in enumerate(steps)], [teacher[i + j] for j, i in enumerate(steps)])
        expected = entry.chain(*chains, inside.float()) / inside.sum()
    else:
        total, count = entry(draft, teacher)
        expected = total / count
    parameters = list(model.parameters())
    right = torch.autograd.grad(expected, parameters, allow_unused=True)
    for numbers in (128 * 7, 10**7):
        causal = CausalModel(model, numbers)
        found = Distillation(causal, live(target), loss, 3)
        value = found(some, found.pairs(some))
        assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
        if not getattr(entry, "sampled", False):
            for one, two in zip(torch.autograd.grad(value, parameters, allow_unused=True), right, strict=True):
                if two is not None:
                    torch.testing.assert_close(one, two, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("loss", ["kl", "tvdpp", "acceptance"])
def test_micro_batches_add_up_to_the_step(loss: str, target: Target, rows: list[Row]) -> None:
    model = small()
    causal = CausalModel(model)
    distillation = Distillation(causal, live(target), loss, 3)
    values, gradients = [], []
    for limit in (32, 100_000):
        step = MixedSteps(distillation, rows, replace(CONFIG, micro_tokens=limit), None).step(rows, [], {})
        parts = [part() for part in step.parts]
        values.append(float(sum(part.detach() for part in parts)))
        gradients.append(torch.autograd.grad(sum(parts), model.lm_head.weight)[0])
        assert step.tokens == sum(map(anchors, rows))
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_batch_statistics_go_over_micro_batches_and_workers(target: Target, rows: list[Row]) -> None:
    """TVD++ on a half of the rows, with the other half's statistics added by ``reduce``, is the whole's share."""
    causal = CausalModel(small())
    whole = Distillation(causal, live(target), "tvdpp", 3)
    halves, count = (rows[:10], rows[10:]), whole.pairs(rows)
    with torch.no_grad():
        expected = float(whole(rows, count))
        sums = {}
        for name, half in enumerate(halves):
            Distillation(causal, live(target), "tvdpp", 3, lambda s, n=name: sums.setdefault(n, s))(half, 1)
        found = [
            Distillation(causal, live(target), "tvdpp", 3, lambda s, n=n: s + sums[1 - n])(half, count)
            for n, half in enumerate(halves)
        ]
    assert float(sum(found)) == pytest.approx(expected, rel=1e-5)


def test_stored_states_teach_what_live_ones_do(target: Target, rows: list[Row], tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features", {"target": "x", "taps": []})
    store.build(target, rows)
    index = torch.arange(7)
    stored = StateTeacher(target, store).of(rows[:3], torch.device("cpu"))(index)
    computed = live(target).of(rows[:3], torch.device("cpu"))(index)
    torch.testing.assert_close(stored, computed, rtol=1e-4, atol=1e-4)


def test_black_box_teachers_are_what_the_server_said(rows: list[Row]) -> None:
    some = rows[:4]
    count = sum(map(anchors, some))
    logits = TokenTeacher(128).of(some, torch.device("cpu"))(torch.arange(count))
    assert logits.argmax(-1).tolist() == [i for row in some for i in row.response_ids[1:]]
    assert (logits.softmax(-1).max(-1).values == 1).all()
    model = small()
    found = Distillation(CausalModel(model), TokenTeacher(128), "kl", 3)
    labels = [i for row in some for i in row.response_ids[1:]]
    draft, _ = reference(model, Target(build_model(), taps=()), some)
    expected = torch.nn.functional.cross_entropy(draft, torch.tensor(labels))
    assert float(found(some, found.pairs(some)).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)

    tops = {r.key: ([[i, (i + 1) % 128] for i in r.response_ids[1:]], [[-0.1, -2.5]] * anchors(r)) for r in some}
    tops[some[0].key][0][0], tops[some[0].key][1][0] = [5], [-0.2]
    probs = TopTeacher(tops, 128).of(some, torch.device("cpu"))(torch.arange(count)).softmax(-1)
    assert probs[0, 5] == 1 and (probs[1:] > 0).sum(-1).tolist() == [2] * (count - 1)
    assert float(probs[1].max() / probs[1][probs[1] > 0].min()) == pytest.approx(math.exp(2.4), rel=1e-4)
    with pytest.raises(UserError, match="no log-probabilities"):
        TopTeacher({}, 128).of(some, torch.device("cpu"))
    with pytest.raises(UserError, match="for 1 of"):
        TopTeacher({r.key: ([[1]], [[-0.1]]) for r in some}, 128).of(some, torch.device("cpu"))


def test_a_stored_top_is_checked() -> None:
    assert parse_top([[[1, 2]], [[-0.1, -3]]], 1) == ([[1, 2]], [[-0.1, -3.0]])
    for bad in (None, [[[1]], [[math.inf]]], [[[1, 2]], [[-1.0]]], [[[-1]], [[-1.0]]], [[], []], [[[]], [[]]]):
        with pytest.raises(ValueError):
            parse_top(bad, 1)


def accuracy(model, rows: list[Row]):
    """Share of response tokens that are the model's first choice."""

    def evaluate() -> float:
        with torch.no_grad():
            states = [
                CausalModel(model).states([[*r.prompt_ids, *r.response_ids[:-1]]])[len(r.prompt_ids) :] for r in rows
            ]
            best = torch.cat([CausalModel(model).logits(part).argmax(-1) for part in states]).tolist()
        return sum(a == b for a, b in zip(best, (i for r in rows for i in r.response_ids[1:]), strict=True)) / len(best)

    return evaluate


@pytest.mark.parametrize("loss", ["kl", "tvdpp"])
def test_it_learns_what_the_target_says(loss: str, target: Target, rows: list[Row], tmp_path: Path) -> None:
    model = small()
    config = replace(CONFIG, loss=loss, epochs=4.0, patience=0, learning_rate=1e-2)
    result = distil(model, live(target), rows, config, tmp_path / "run", accuracy(model, rows))
    assert result.best > result.start + 0.05
    assert accuracy(model, rows)() == pytest.approx(result.best)


@pytest.fixture
def text(tmp_path: Path, tiny_tokenizer) -> PackedText:
    (tmp_path / "a.txt").write_text("he sat there and then he sat on the stone\n" * 400)
    return PackedText(TextSource([str(tmp_path / "a.txt")]), tiny_tokenizer, 16)


def test_text_holds_its_share_of_the_supervised_tokens(target: Target, rows: list[Row], text: PackedText) -> None:
    config = replace(CONFIG, text_share=0.25, text_length=16)
    steps = MixedSteps(Distillation(CausalModel(small()), live(target), "kl", 3), rows, config, text)
    per_epoch = len(step_order(rows, config, 0))
    found = list(islice(steps.steps(0, {}), 4 * per_epoch))
    responses = 4 * sum(map(anchors, rows))
    share = 1 - responses / sum(step.tokens for step in found)
    assert share == pytest.approx(0.25, abs=0.01)
    rest = list(islice(steps.steps(3, json.loads(json.dumps(found[2].position))), 4))
    assert [step.position for step in rest] == [step.position for step in found[3:7]]
    assert [step.tokens for step in rest] == [step.tokens for step in found[3:7]]


def test_responses_and_text_weigh_by_their_tokens(target: Target, rows: list[Row], text: PackedText) -> None:
    causal = CausalModel(small())
    distillation = Distillation(causal, live(target), "kl", 3)
    config = replace(CONFIG, text_share=0.25, text_length=16)
    block = next(text.blocks())[0]
    step = MixedSteps(distillation, rows, config, text).step(rows[:4], [block], {})
    with torch.no_grad():
        found = sum(float(part()) for part in step.parts)
        count = sum(map(anchors, rows[:4]))
        expected = (float(distillation(rows[:4], 1)) + float(causal.block_loss(block[None]))) / (count + 16)
    assert step.tokens == count + 16 and found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", ["kl", "tvdpp_sampled"])
def test_a_killed_run_ends_with_the_same_bits(
    loss: str, target: Target, rows: list[Row], text: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, loss=loss, epochs=2.0, text_share=0.2, text_length=16)
    whole, resumed, teacher = small(), small(), live(target)
    first = distil(whole, teacher, rows, config, tmp_path / "a", accuracy(whole, rows[:6]), text)
    save, saves = Checkpoint.save, []

    def dying(self, trained, optimizers, state):
        save(self, trained, optimizers, state)
        saves.append(state["step"])
        if len(saves) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", dying)
    dead = small()
    with pytest.raises(KeyboardInterrupt):
        distil(dead, teacher, rows, config, tmp_path / "b", accuracy(dead, rows[:6]), text)
    monkeypatch.setattr(Checkpoint, "save", save)
    second = distil(resumed, teacher, rows, config, tmp_path / "b", accuracy(resumed, rows[:6]), text)
    assert saves[-1] == 5 < first.steps and second.history == first.history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_it_stops_when_held_out_figures_no_longer_rise(target: Target, rows: list[Row], tmp_path: Path) -> None:
    figures = iter([1.0, 2.0, 1.5, 1.4, 1.3, 1.2, 1.1])
    config = replace(CONFIG, epochs=20.0, evaluate_every=1, patience=3)
    result = distil(small(), live(target), rows, config, tmp_path / "run", lambda: next(figures))
    assert (result.steps, result.best_step, result.best, result.stopped_early) == (4, 1, 2.0, True)


@pytest.mark.parametrize("loss", ["kl", "tvdpp", "acceptance"])
def test_the_largest_matrix_is_a_portion_however_long_the_rows(
    loss: str, target: Target, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = CausalModel.logits
    monkeypatch.setattr(CausalModel, "logits", lambda self, s: (seen.append(128 * len(s)), real(self, s))[1])
    for some in (rows[:2], rows * 3):
        found = Distillation(CausalModel(small(), 128 * 12), live(target), loss, 3)
        found(some, found.pairs(some)).backward()
    assert max(seen) <= 128 * 12


def test_a_table_that_is_padded_further_is_cut(target: Target, rows: list[Row]) -> None:
    """Ids behind the smaller vocabulary are nobody's, and get no gradient."""
    model = small(vocab_size=160)
    found = Distillation(CausalModel(model), live(target), "kl", 3)
    found(rows[:3], 1).backward()
    gradient = model.lm_head.weight.grad
    assert gradient[:128].abs().sum() > 0 and gradient[128:].abs().sum() == 0


def test_bad_settings_are_refused_at_once(target: Target, rows: list[Row], text: PackedText, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown loss"):
        replace(CONFIG, loss="mse")
    with pytest.raises(UserError, match="text-share must be below 1"):
        replace(CONFIG, text_share=1.0)
    with pytest.raises(UserError, match="two or more tokens"):
        distil(small(), live(target), [], CONFIG, tmp_path / "run", lambda: 1.0)
    with pytest.raises(UserError, match="go together"):
        distil(small(), live(target), rows, replace(CONFIG, text_share=0.1), tmp_path / "run", lambda: 1.0)
    with pytest.raises(UserError, match="go together"):
        distil(small(), live(target), rows, CONFIG, tmp_path / "run", lambda: 1.0, text)
