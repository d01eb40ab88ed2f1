"""The shift scorer against its definition, written out row by row.

Shape legend: N tokens, H hidden size, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from redraft.errors import UserError
from redraft.selection import ScoringContext
from redraft.selection.shift import METRICS, POOLINGS, Shift, ledoit_wolf
from redraft.selection.states import batches
from redraft.target import Target

MakeTarget = Callable[..., Target]
MARKED = 100  # fine-tuning changes the embeddings of ids from here on


@dataclass(frozen=True)
class Sample:
    key: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def samples() -> list[Sample]:
    """Twelve rows of random lengths; rows 2, 5 and 8 answer with tokens that fine-tuning moved."""
    generator = torch.Generator().manual_seed(2)

    def text(low: int, high: int, longest: int) -> tuple[int, ...]:
        length = int(torch.randint(4, longest, (), generator=generator))
        return tuple(torch.randint(low, high, (length,), generator=generator).tolist())

    special = {2, 5, 8}
    return [
        Sample(f"r{i}", text(4, MARKED, 12), text(MARKED, 128, 30) if i in special else text(4, MARKED, 30))
        for i in range(12)
    ]


def pair(make: MakeTarget, architecture: str = "llama") -> tuple[Target, Target]:
    base, target = make(architecture, seed=0), make(architecture, seed=0)
    generator = torch.Generator().manual_seed(1)
    for weight in target.model.parameters():
        weight.data += 0.002 * torch.randn(weight.shape, generator=generator)
    moved = target.embedding.weight.data[MARKED:]
    moved += 0.5 * torch.randn(moved.shape, generator=generator)
    return target, base


def moved_states(
    target: Target, base: Target, rows: list[Sample], layer: str | int = "final"
) -> list[tuple[Tensor, Tensor]]:
    """(fine-tuned, base) states [T, H] at each row's response, one row at a time through transformers alone."""

    def states(model: Target, ids: Tensor) -> Tensor:
        # transformers puts the final norm in the place of the last layer's stream: run the layers below alone
        below = -1 if layer == "final" else int(layer)
        if below == model.layers:
            stream: list[Tensor] = []
            hook = model.model.model.norm.register_forward_pre_hook(lambda module, args: stream.append(args[0]))
            model.model.model(ids)
            hook.remove()
            return stream[0][0].detach()
        return model.model.model(ids, output_hidden_states=True).hidden_states[below][0].detach()

    found = []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        first = len(row.prompt_ids)
        found.append((states(target, ids)[first:], states(base, ids)[first:]))
    return found


def ledoit_wolf_by_hand(x_NH: Tensor) -> tuple[Tensor, float]:
    """Covariance and shrinkage with one matrix a vector, as the paper states them."""
    count, width = x_NH.shape
    x_NH = x_NH - x_NH.mean(0)
    outer_NHH = x_NH[:, :, None] * x_NH[:, None, :]
    sample = outer_NHH.mean(0)
    identity = torch.eye(width, dtype=x_NH.dtype)
    scale = sample.trace() / width
    spread = (sample - scale * identity).square().sum() / width
    error = (outer_NHH - sample).square().sum() / width / count**2
    shrinkage = float(min(error, spread) / spread)
    return shrinkage * scale * identity + (1 - shrinkage) * sample, shrinkage


@pytest.mark.parametrize("count", [3, 20, 400])
def test_ledoit_wolf_equals_the_paper_in_any_chunks(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    x_NH = torch.randn(count, 6, generator=generator, dtype=torch.float64) @ mixing + 5
    expected, shrinkage = ledoit_wolf_by_hand(x_NH)
    for chunk in (1, 7, 1000):
        found = ledoit_wolf(lambda chunk=chunk: x_NH.split(chunk))
        assert torch.allclose(found.covariance_HH, expected)
        assert found.shrinkage == pytest.approx(shrinkage)
        assert torch.allclose(found.mean_H, x_NH.mean(0))


def test_ledoit_wolf_shrinks_less_with_more_data_and_survives_degenerate_data() -> None:
    generator = torch.Generator().manual_seed(0)
    x_NH = torch.randn(4000, 5, generator=generator, dtype=torch.float64) * torch.tensor([1, 2, 3, 4, 5.0])
    assert ledoit_wolf(lambda: [x_NH]).shrinkage < ledoit_wolf(lambda: [x_NH[:10]]).shrinkage < 1
    line_NH = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert torch.isfinite(next(iter(ledoit_wolf(lambda: [line_NH]).distances([line_NH])))).all()
    still_NH = torch.ones(4, 2)
    assert not next(iter(ledoit_wolf(lambda: [still_NH]).distances([still_NH]))).any()
    with pytest.raises(ValueError):
        ledoit_wolf(lambda: [])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_metric_equals_its_definition(tiny_target: MakeTarget, architecture: str) -> None:
    target, base = pair(tiny_target, architecture)
    rows, context = samples(), ScoringContext(target=target, base_target=base, batch_tokens=90)
    states = moved_states(target, base, rows)
    differences = [(f - b).double() for f, b in states]
    covariance, _ = ledoit_wolf_by_hand(torch.cat(differences))
    inverse, centre = torch.linalg.inv(covariance), torch.cat(differences).mean(0)

    def mahalanobis(d_TH: Tensor) -> float:
        x = d_TH - centre
        return float(((x @ inverse) * x).sum(-1).sqrt().mean())

    expected = {
        "mahalanobis": [mahalanobis(d) for d in differences],
        "l2": [float(d.norm(dim=-1).mean()) for d in differences],
        "cosine": [float((1 - torch.cosine_similarity(f, b, dim=-1)).mean()) for f, b in states],
    }
    assert set(expected) == set(METRICS)
    for metric, values in expected.items():
        tolerance = 0.01 if metric == "mahalanobis" else 1e-4  # differences are kept in bfloat16
        assert Shift(metric).score(rows, context) == pytest.approx(values, rel=tolerance, abs=1e-5)


@pytest.mark.parametrize("layer", [0, 2, 6, "final"])
def test_layers_and_poolings_are_what_they_say(tiny_target: MakeTarget, layer: str | int) -> None:
    target, base = pair(tiny_target)
    rows, context = samples(), ScoringContext(target=target, base_target=base, batch_tokens=90)
    distances = [
        [float((f - b).norm()) for f, b in zip(*both, strict=True)] for both in moved_states(target, base, rows, layer)
    ]
    means = [(f.mean(0) - b.mean(0)).norm() for f, b in moved_states(target, base, rows, layer)]
    expected = {
        "mean": [sum(part) / len(part) for part in distances],
        "max": [max(part) for part in distances],
        "last": [part[-1] for part in distances],
        "state": [float(mean) for mean in means],
    }
    assert set(expected) == set(POOLINGS)
    for pooling, values in expected.items():
        assert Shift("l2", layer, pooling).score(rows, context) == pytest.approx(values, rel=1e-3, abs=1e-5)


def test_the_covariance_is_that_of_the_vectors_that_are_measured(tiny_target: MakeTarget) -> None:
    target, base = pair(tiny_target)
    rows = samples()
    last_NH = torch.stack([(f - b)[-1].double() for f, b in moved_states(target, base, rows, 4)])
    covariance, _ = ledoit_wolf_by_hand(last_NH)
    x = last_NH - last_NH.mean(0)
    expected = ((x @ torch.linalg.inv(covariance)) * x).sum(-1).sqrt().tolist()
    found = Shift(layer=4, pooling="last").score(rows, ScoringContext(target=target, base_target=base))
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("layer", [0, 3, 6, "final"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_fine_tuning_moved_rank_first(
    tiny_target: MakeTarget, metric: str, pooling: str, layer: str | int
) -> None:
    target, base = pair(tiny_target)
    scores = Shift(metric, layer, pooling).score(samples(), ScoringContext(target=target, base_target=base))
    assert set(sorted(range(12), key=lambda i: -scores[i])[:3]) == {2, 5, 8}


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_moved_scores_zero(tiny_target: MakeTarget, metric: str) -> None:
    base = tiny_target()
    assert Shift(metric).score(samples(), ScoringContext(target=base, base_target=base)) == pytest.approx([0.0] * 12)


def test_file_and_memory_give_the_same_scores_and_the_file_goes(tiny_target: MakeTarget, tmp_path: Path) -> None:
    target, base = pair(tiny_target)
    scratch = tmp_path / "scratch"
    context = ScoringContext(target=target, base_target=base, scratch=scratch)
    in_memory = Shift().score(samples(), context)
    assert not scratch.exists()
    assert Shift(memory_bytes=0).score(samples(), context) == in_memory
    assert scratch.is_dir() and not any(scratch.iterdir())


def test_each_model_sees_each_row_once(tiny_target: MakeTarget) -> None:
    target, base = pair(tiny_target)
    seen: dict[str, int] = {"target": 0, "base": 0}
    for name, model in (("target", target), ("base", base)):
        forward = model.forward

        def counted(ids: Tensor, name: str = name, forward: Callable[..., object] = forward, **kw: object) -> object:
            seen[name] += len(ids)
            return forward(ids, **kw)

        model.forward = counted  # type: ignore[method-assign, assignment]
    Shift().score(samples(), ScoringContext(target=target, base_target=base, batch_tokens=90))
    assert seen == {"target": 12, "base": 12}


def test_batches_hold_every_row_once_within_the_limit() -> None:
    lengths = [5, 50, 7, 7, 120, 1, 30]
    found = batches(lengths, 60)
    assert sorted(i for batch in found for i in batch) == list(range(7))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 60 for b in found)
    assert len(found) < 7


def test_models_and_rows_that_do_not_fit_are_refused(tiny_target: MakeTarget) -> None:
    target = tiny_target()
    fits = ScoringContext(target=target, base_target=tiny_target())
    with pytest.raises(UserError, match="width 32 and 16"):
        Shift().score(samples(), ScoringContext(target=target, base_target=tiny_target(hidden_size=16)))
    with pytest.raises(UserError, match="layers 6 and 4"):
        Shift().score(samples(), ScoringContext(target=target, base_target=tiny_target(num_hidden_layers=4)))
    with pytest.raises(UserError, match="layer 7 does not exist: the target has 6 layers"):
        Shift(layer=7).score(samples(), fits)
    with pytest.raises(UserError, match="long has 600 tokens, more than the models' context of 512"):
        Shift().score([Sample("long", (5,) * 300, (6,) * 300)], fits)
    with pytest.raises(UserError, match="strange has token ids outside the models' vocabulary of 128"):
        Shift().score([Sample("strange", (5,), (128,))], fits)
    with pytest.raises(UserError, match="mahalanobis, l2, cosine"):
        Shift("euclid")
    with pytest.raises(UserError, match="mean, max, last, state"):
        Shift(pooling="median")
    for layer in ("top", -1, True):
        with pytest.raises(UserError, match="write final"):
            Shift(layer=layer)


def test_a_layer_leaves_the_taps_of_others_alone(tiny_target: MakeTarget) -> None:
    target, base = pair(tiny_target)
    before = target.taps, base.taps
    context = ScoringContext(target=target, base_target=base)
    Shift(layer=1).score(samples(), context)
    with pytest.raises(UserError):
        Shift(layer=1).score([Sample("strange", (5,), (128,))], context)
    assert (target.taps, base.taps) == before
