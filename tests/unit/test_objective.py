"""The unrolled objective in portions: the same numbers as written out at once, and memory that does not grow.

Shape legend: M anchors, D draft vocabulary, J draft steps.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from redraft.data.store import Row
from redraft.drafts.eagle.unroll import Batch, collate, supervised, unroll
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.drafts.eagle3.objective import UnrollObjective
from redraft.drafts.groups import prepare
from redraft.features import FeatureStore
from redraft.losses.portions import portions, sum_over_portions
from redraft.registries import LOSSES
from redraft.settings.training import PrivateSize, TrainConfig
from redraft.target import Target
from redraft.training.trainer import Trainer

J, WORDS, WIDTH = 3, 120, 32
EXACT = [name for name, loss in LOSSES.items() if not getattr(loss, "sampled", False)]


@pytest.fixture(scope="module")
def target(tiny_target) -> Target:
    return tiny_target("llama")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(4, 128, (30,), generator=generator).tolist() for _ in range(6)]
    return [Row(f"r{i}", t[:5], t[5 : 12 + 3 * i], 0.0, 0, 1.0, 0, "length", "hash") for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def store(target, rows, tmp_path_factory) -> FeatureStore:
    store = FeatureStore(tmp_path_factory.mktemp("objective") / "features", {"target": "tiny"})
    store.build(target, rows)
    return store


@pytest.fixture(scope="module")
def batch(rows, store) -> Batch:
    return collate(rows, store, J)


def ready(target: Target, method: str = "full") -> Eagle3Draft:
    """A draft with a trained head; with ``lora``, one with low-rank updates that are not zero."""
    draft, _ = prepare(fresh_draft(target, range(WORDS), seed=2), method, PrivateSize(16, 4))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if name.endswith("outer"):
                parameter.normal_(std=0.2, generator=generator)
    return draft


def written_out(draft: Eagle3Draft, target: Target, batch: Batch, config: TrainConfig) -> torch.Tensor:
    """The objective over the whole batch at once, through plain autograd."""
    loss = LOSSES.get(config.loss)
    teacher_MD = target.scale_logits(F.linear(batch.hidden_M, target.head.weight[draft.vocabulary()]))
    inside_MJ = supervised(draft, batch)
    pairs = []
    for step, states in enumerate(unroll(draft, target.embedding, batch, config.unroll)):
        index = inside_MJ[:, step].nonzero().squeeze(-1)
        pairs.append((draft.logits(states[index]), teacher_MD[index + step]))
    if hasattr(loss, "chain"):
        weight_MJ = inside_MJ.double() / inside_MJ.sum()
        return loss.chain([d for d, _ in pairs], [t for _, t in pairs], weight_MJ)
    if hasattr(loss, "statistics"):
        loss = partial(loss, statistics=sum(loss.statistics(d.detach(), t) for d, t in pairs))
    decays = [config.step_decay**step for step in range(config.unroll)]
    means = [torch.div(*loss(d, t, None)) for d, t in pairs]
    return sum(decay * mean for decay, mean in zip(decays, means, strict=True)) / sum(decays)


def gradients(loss: torch.Tensor, draft: Eagle3Draft) -> dict[str, torch.Tensor]:
    trained = {n: p for n, p in draft.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def portion_of(anchors: int) -> int:
    """``portion_numbers`` that makes portions of this many anchors."""
    return (anchors + J - 1) * (J + 1) * WORDS


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", EXACT)
def test_portions_give_the_value_and_gradient_of_the_whole(name, method, target, batch) -> None:
    draft, config = ready(target, method), TrainConfig(loss=name, unroll=J)
    expected = written_out(draft, target, batch, config)
    wanted = gradients(expected, draft)
    assert any(n.startswith("lm_head.") and g.abs().max() > 1e-4 for n, g in wanted.items())
    for anchors in (1, 7, 10_000):
        loss = UnrollObjective(draft, target, config, portion_of(anchors))(batch)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        for parameter, found in gradients(3 * loss, draft).items():
            torch.testing.assert_close(found / 3, wanted[parameter], atol=1e-6, rtol=1e-4, msg=parameter)


def test_portions_under_bfloat16_autocast_agree_with_the_whole(target, batch) -> None:
    draft, config = ready(target), TrainConfig(unroll=J)
    with torch.autocast("cpu", torch.bfloat16):
        whole = gradients(written_out(draft, target, batch, config), draft)
        loss = UnrollObjective(draft, target, config, portion_of(5))(batch)
    parts = gradients(loss, draft)
    for name, found in parts.items():
        assert (found - whole[name]).norm() < 0.03 * whole[name].norm() + 1e-6, name


class TallestMatrix(TorchDispatchMode):
    """Rows of the tallest matrix of any type with one column a word that any operation gives."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            # The head's own weight, transposed, is one of the batch's width and not of its length.
            if torch.is_tensor(x) and x.ndim == 2 and x.shape[1] == WORDS and x.shape[0] != WIDTH:
                self.rows = max(self.rows, x.shape[0])
        return result


@pytest.mark.parametrize("name", ["kl", "tvdpp", "acceptance"])
def test_no_matrix_of_the_whole_batch_times_the_vocabulary_is_made(name, target, batch) -> None:
    draft, config = ready(target, "fc"), TrainConfig(loss=name, unroll=J)
    anchors, tallest = len(batch.anchor_M), {}
    assert anchors > 60 and target.hidden_size == WIDTH
    for size in (4, 16, anchors):
        objective = UnrollObjective(draft, target, config, portion_of(size))
        with TallestMatrix() as seen:
            objective(batch).backward()
        tallest[size] = seen.rows
    # A portion needs the teacher of J - 1 anchors more.
    assert tallest == {4: 4 + J - 1, 16: 16 + J - 1, anchors: anchors}


def test_the_teacher_and_the_head_run_once(target, batch, monkeypatch) -> None:
    draft, config = ready(target, "fc"), TrainConfig(unroll=J)
    objective, seen = UnrollObjective(draft, target, config, portion_of(20)), {"teacher": 0, "head": 0}
    teacher, head = objective.teacher_logits, draft.lm_head.forward

    def teacher_logits(batch: Batch, anchors: slice = slice(None)) -> torch.Tensor:
        seen["teacher"] += len(batch.hidden_M[anchors])
        return teacher(batch, anchors)

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen["head"] += len(x)
        return head(x)

    monkeypatch.setattr(objective, "teacher_logits", teacher_logits)
    monkeypatch.setattr(draft.lm_head, "forward", forward)
    objective(batch).backward()
    anchors = len(batch.anchor_M)
    assert seen["head"] == int(supervised(draft, batch).sum())
    # Behind the end of every portion but the last, whose batch ends there.
    assert seen["teacher"] == sum(min(part.stop + J - 1, anchors) - part.start for part in portions(anchors, 20))
    assert seen["teacher"] < 1.1 * anchors


def test_a_step_that_nothing_reaches_leaves_the_others_as_they_are(target, batch) -> None:
    draft = ready(target)
    short = replace(batch, future_MJ=torch.cat([batch.future_MJ[:, :1], -torch.ones_like(batch.future_MJ[:, 1:])], 1))
    one = replace(batch, future_MJ=batch.future_MJ[:, :1])
    found = UnrollObjective(draft, target, TrainConfig(unroll=J))(short)
    assert torch.equal(found, UnrollObjective(draft, target, TrainConfig(unroll=1))(one))
    # Nothing at all to learn from is a loss of zero, and no gradient.
    none = replace(batch, future_MJ=-torch.ones_like(batch.future_MJ))
    loss = UnrollObjective(draft, target, TrainConfig(unroll=J))(none)
    loss.backward()
    assert float(loss.detach()) == 0 and not any(p.grad.any() for p in draft.parameters() if p.grad is not None)


def test_the_value_needs_no_gradient(target, batch) -> None:
    objective = UnrollObjective(ready(target), target, TrainConfig(unroll=J), portion_of(9))
    tracked = objective(batch)
    with torch.no_grad():
        assert torch.equal(objective(batch), tracked.detach())


def test_portions_cover_every_position_once() -> None:
    for count, size in ((10, 3), (9, 3), (1, 5), (0, 4), (4, 1)):
        parts = portions(count, size)
        assert [i for part in parts for i in range(count)[part]] == list(range(count))
        assert all(part.stop - part.start <= size for part in parts)


def test_portions_leave_unused_parameters_and_frozen_states_alone() -> None:
    used, unused = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    frozen, state = torch.randn(6, 3), torch.randn(6, 3, requires_grad=True)

    def value(part: slice, states: list[torch.Tensor]) -> torch.Tensor:
        return (states[0] * states[1].square() * used).sum()

    total = sum_over_portions(value, portions(6, 4), [frozen, state], [used, unused])
    found = torch.autograd.grad(total, [state, used, unused], allow_unused=True)
    torch.testing.assert_close(found[0], 2 * frozen * state.detach() * used.detach())
    torch.testing.assert_close(found[1], (frozen * state.detach().square()).sum(0))
    assert found[2] is None


# -- batch statistics ------------------------------------------------------------------------------------------------
def test_counts_and_statistics_are_of_all_workers(target, batch) -> None:
    """With three more workers of equal batches this one's share of the loss is a quarter."""
    draft, config, seen = ready(target), TrainConfig(loss="tvdpp", unroll=J), []

    def fourfold(sums: torch.Tensor) -> torch.Tensor:
        seen.append(sums.clone())
        return 4 * sums

    for size in (5, 10_000):
        loss = UnrollObjective(draft, target, config, portion_of(size), fourfold)(batch)
        whole = float(written_out(draft, target, batch, config).detach())
        assert 4 * float(loss.detach()) == pytest.approx(whole, rel=1e-5)
    counts, statistics = seen[::2], seen[1::2]
    torch.testing.assert_close(*statistics)
    assert statistics[0][1] == counts[0].sum() == supervised(draft, batch).sum()


# -- what a draft adds, and what a loss needs not have -----------------------------------------------------------------
def test_a_draft_adds_its_own_term(target, batch) -> None:
    draft, config = ready(target), TrainConfig(unroll=J)
    plain = UnrollObjective(draft, target, config)(batch)
    draft.extra_loss = lambda: draft.fc.weight.sum() * 0 + 2.0
    torch.testing.assert_close(draft.objective(target, config)(batch), plain + 2)


def plain_autograd(draft_ND: torch.Tensor, teacher_ND: torch.Tensor, weight_N: torch.Tensor | None = None):
    """A squared difference of probabilities: no gradient of its own, no statistics, no chain."""
    loss_N = (draft_ND.float().softmax(-1) - teacher_ND.float().softmax(-1)).square().sum(-1)
    weight_N = torch.ones_like(loss_N) if weight_N is None else weight_N
    return (loss_N * weight_N).sum(), weight_N.sum()


def test_a_loss_through_plain_autograd_trains(target, rows, store, batch, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(LOSSES._entries, "squares", plain_autograd)
    draft, config = ready(target), TrainConfig(loss="squares", unroll=J)
    wanted = gradients(written_out(draft, target, batch, config), draft)
    for anchors in (7, 10_000):
        for name, found in gradients(UnrollObjective(draft, target, config, portion_of(anchors))(batch), draft).items():
            torch.testing.assert_close(found, wanted[name], atol=1e-6, rtol=1e-4, msg=name)
    steps = replace(config, epochs=20, batch_anchors=60, evaluate_every=4, patience=0, learning_rate=3e-3)
    Trainer(draft, target, store, rows, rows, steps, tmp_path / "run").run()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


# -- in the loop -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["tvdpp_sampled", "acceptance"])
def test_a_run_resumes_to_the_same_bits_whatever_the_random_state(name, target, rows, store, tmp_path) -> None:
    config = TrainConfig(loss=name, epochs=3, batch_anchors=30, evaluate_every=2, patience=100, learning_rate=3e-3)
    draft = ready(target, "fc")

    def work(folder: str) -> Trainer:
        return Trainer(copy.deepcopy(draft), target, store, rows, rows, config, tmp_path / folder)

    whole = work("whole")
    expected = whole.run()
    assert expected.steps >= 4

    class Killed(BaseException):
        pass

    class Killer:
        def update(self, done: int, **fields) -> None:
            if fields["step"] == 3:
                raise Killed

    with pytest.raises(Killed):
        work("killed").run(Killer())
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = work("killed")
    assert again.run().history == expected.history
    assert torch.equal(before, torch.random.get_rng_state())
    for (name, a), (_, b) in zip(whole.trained, again.trained, strict=True):
        assert torch.equal(a, b), name
