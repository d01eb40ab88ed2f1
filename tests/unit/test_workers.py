"""Two processes that share every step train what one process trains, and one of them writes."""

from __future__ import annotations

import copy
import multiprocessing
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.data.packed import PackedText, TextSource
from redraft.data.store import Row
from redraft.drafts.eagle1 import fresh_eagle1
from redraft.drafts.eagle1.objective import RegressionObjective
from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.proposing import shared
from redraft.drafts.standalone.objective import CausalModel, Distillation, StateTeacher
from redraft.features import FeatureStore
from redraft.settings.training import DistilConfig, PretrainConfig, TrainConfig
from redraft.target import FINAL, Target
from redraft.training.causal import MixedSteps, text_steps
from redraft.training.loop import Step
from redraft.training.trainer import Trainer
from redraft.training.workers import SINGLE, Shares, Workers, sum_gradients

BUILDERS = runpy.run_path(str(Path(__file__).parents[1] / "tiny_models.py"))


def together(work: Callable[[Workers], None], meet: Path) -> None:
    """Run ``work`` in two processes that form a group; it must end well in both."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_member, args=(work, rank, str(meet))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]


def _member(work: Callable[[Workers], None], rank: int, meet: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    work(Workers.present())
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def target(tiny_target: Callable[..., Target]) -> Target:
    return tiny_target("llama")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(4, 128, (40,), generator=generator).tolist() for _ in range(7)]
    return [Row(f"r{i}", t[:5], t[5 : 12 + 3 * i], 0.0, 0, 1.0, 0, "length", "hash") for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def store(target: Target, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    store = FeatureStore(tmp_path_factory.mktemp("workers") / "features", {"target": "tiny"})
    store.build(target, rows)
    return store


def test_alone_and_in_a_group(tmp_path: Path) -> None:
    assert Workers.present().size == 1 and Workers.present().writes
    assert SINGLE.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]

    def work(workers: Workers) -> None:
        assert workers.size == 2 and workers.writes == (workers.rank == 0)
        assert workers.sum(torch.tensor([1.0 + workers.rank, 10.0])).tolist() == [3.0, 20.0]
        one, other, none = (torch.zeros(2, requires_grad=True) for _ in range(3))
        (one if workers.rank else other).grad = torch.ones(2)
        sum_gradients([one, other, none], workers)
        assert one.grad is not None and other.grad is not None and none.grad is None
        assert one.grad.tolist() == other.grad.tolist() == [1.0, 1.0]
        for parts, mean in (([0, 1], 1.5), ([0], 1.0)):  # the second worker has no part of the last
            shares = Shares(workers)
            shares.of(parts)
            own = torch.tensor(1.0 + workers.rank, requires_grad=True)
            assert float(workers.sum(shares.loss(shared(own, shares.sum)).detach())) == mean

    together(work, tmp_path / "meet")


def test_a_worker_without_a_part_stands_in_and_counts_for_nothing() -> None:
    class Second(Workers):
        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + 10

    shares = Shares(Second(1, 2))
    assert shares.of(range(5)) == range(1, 5, 2) and shares.sum(torch.ones(1)) == 11 and shares.loss(torch.ones(1)) == 1
    assert shares.of([7]) == [7] and shares.sum(torch.ones(1)) == 10 and shares.loss(torch.ones(1)) == 0
    assert Shares(SINGLE).of([7, 8]) == [7, 8]


# -- the gradient of a step ------------------------------------------------------------------------------------------
def same_gradient(steps_of: Callable[[Workers], tuple[Any, Step]], folder: Path) -> None:
    """``steps_of(workers)`` -> (model, this worker's share of a step): the sum is one worker's gradient and loss."""

    def gradient(workers: Workers) -> dict[str, torch.Tensor]:
        model, step = steps_of(workers)
        total = torch.zeros(1)
        for part in step.parts:
            loss = part()
            loss.backward()
            total += loss.detach()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        sum_gradients(trained.values(), workers)
        found = {name: p.grad for name, p in trained.items() if p.grad is not None}
        return found | {"<loss>": workers.sum(total), "<tokens>": torch.tensor(float(step.tokens))}

    def work(workers: Workers) -> None:
        found = gradient(workers)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        assert found.keys() == expected.keys()

    expected = gradient(SINGLE)
    assert max(float(tensor.abs().max()) for tensor in expected.values()) > 1e-3
    together(work, folder / "meet")


def one_step(draft: Any, target: Target, store: FeatureStore, rows: list[Row], loss: str, folder: Path) -> Any:
    config = TrainConfig(loss=loss, unroll=2, batch_anchors=10_000, optimizer="adamw")

    def steps_of(workers: Workers) -> tuple[Any, Step]:
        trainer = Trainer(copy.deepcopy(draft), target, store, rows, rows, config, folder / "run", workers=workers)
        return trainer.draft, next(trainer.steps(0, {}))

    return steps_of


@pytest.mark.parametrize("count", [7, 1])
@pytest.mark.parametrize("loss", ["kl", "tvdpp", "acceptance"])  # a mean, batch statistics, a loss over chains
def test_the_unrolled_objective(
    loss: str, count: int, target: Target, store: FeatureStore, rows: list[Row], tmp_path: Path
) -> None:
    """Also of a batch of one row, which leaves a worker without any."""
    draft = fresh_draft(target, range(100), seed=2)
    same_gradient(one_step(draft, target, store, rows[-count:], loss, tmp_path), tmp_path)


@pytest.mark.parametrize("count", [7, 1])
def test_the_regression_objective(
    count: int,
    tiny_target: Callable[..., Target],
    rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without its noise, which is drawn for a batch and so differs with the division."""
    monkeypatch.setattr(RegressionObjective, "noisy", lambda self, batch: batch)
    target = tiny_target("llama", taps=(FINAL,))
    store = FeatureStore(tmp_path / "features", {})
    store.build(target, rows)
    same_gradient(one_step(fresh_eagle1(target, 2), target, store, rows[-count:], "kl", tmp_path), tmp_path)


@pytest.mark.parametrize("micro", [64, 10_000])
def test_distillation_with_text(micro: int, target: Target, rows: list[Row], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the hat is on the mat and the rest is at it " * 60)
    config = DistilConfig(
        loss="tvdpp", batch_anchors=10_000, micro_tokens=micro, text_share=0.3, text_length=16, gamma=2
    )
    states = FeatureStore(tmp_path / "features", {})
    states.build(target, rows)

    def steps_of(workers: Workers) -> tuple[Any, Step]:
        causal = CausalModel(BUILDERS["build_model"](seed=1, num_hidden_layers=1))
        shares = Shares(workers)
        distillation = Distillation(causal, StateTeacher(target, states), "tvdpp", 2, shares.sum)
        packed = PackedText(TextSource([str(text)]), BUILDERS["build_tokenizer"](), 16, 0)
        return causal.model, next(MixedSteps(distillation, rows, config, packed, shares).steps(0, {}))

    same_gradient(steps_of, tmp_path)


def test_pretraining(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the hat is on the mat and the rest is at it " * 60)
    config = PretrainConfig(length=16, batch_tokens=80, micro_tokens=32)

    def steps_of(workers: Workers) -> tuple[Any, Step]:
        causal = CausalModel(BUILDERS["build_model"](seed=1, num_hidden_layers=1))
        packed = PackedText(TextSource([str(text)]), BUILDERS["build_tokenizer"](), 16, 0)
        return causal.model, next(text_steps(causal, packed, config, workers, 0, {}))

    same_gradient(steps_of, tmp_path)


# -- a whole run -----------------------------------------------------------------------------------------------------
def test_a_run_of_two_ends_where_a_run_of_one_does(
    target: Target, store: FeatureStore, rows: list[Row], tmp_path: Path
) -> None:
    config = TrainConfig(epochs=3, batch_anchors=40, evaluate_every=2, learning_rate=3e-3, patience=0, unroll=2)
    draft = fresh_draft(target, range(100), seed=2)

    def trainer(folder: str, workers: Workers = SINGLE) -> Trainer:
        return Trainer(copy.deepcopy(draft), target, store, rows, rows, config, tmp_path / folder, workers=workers)

    single = trainer("single")
    expected = single.run()

    def work(workers: Workers) -> None:
        ours = trainer("two", workers)
        found = ours.run()
        assert found.history == expected.history and found.anchors == expected.anchors
        for (name, mine), (_, theirs) in zip(ours.trained, single.trained, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=name)

    together(work, tmp_path / "meet")
    steps = [line.split(",")[0] for line in (tmp_path / "two" / "curve.jsonl").read_text().splitlines()]
    assert steps == [line.split(",")[0] for line in (tmp_path / "single" / "curve.jsonl").read_text().splitlines()]
    assert trainer("two").run().history == expected.history, "one process reads what two wrote"
