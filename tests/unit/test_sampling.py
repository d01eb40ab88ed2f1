"""Warping: the nucleus is the same whether a row is sorted whole or not."""

from __future__ import annotations

import pytest
import torch

from redraft.errors import UserError
from redraft.sampling import nucleus, token_probability, warp
from redraft.settings.sampler import Sampler


def by_sorting(probs: torch.Tensor, mass: float) -> torch.Tensor:
    """One row, written out: the likeliest tokens until their mass is reached."""
    kept, total = torch.zeros_like(probs), 0.0
    for token in probs.sort(descending=True, stable=True).indices.tolist():
        if total >= mass:
            break
        kept[token], total = probs[token], total + float(probs[token])
    return kept / kept.sum()


@pytest.mark.parametrize("first", [4, 32, 1000])
@pytest.mark.parametrize("mass", [0.05, 0.6, 0.97])
def test_flat_rows_among_peaked_ones(first, mass):
    scale = torch.tensor([0.01, 8.0, 1.0, 0.3, 20.0])[:, None]
    probs = (torch.randn(5, 200, generator=torch.Generator().manual_seed(3)) * scale).double().softmax(-1)
    got = nucleus(probs, mass, first)
    for row, expected in zip(got, probs, strict=True):
        torch.testing.assert_close(row, by_sorting(expected, mass))


def test_the_likeliest_token_always_stays():
    probs = warp(torch.tensor([[0.0, 5.0, 1.0]]), Sampler(1.0, 0, 1e-6))
    assert probs.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}])
def test_senseless_samplers_are_refused(wrong):
    with pytest.raises(UserError, match="must"):
        Sampler(**wrong)


@pytest.mark.parametrize("top_k", [0, 7])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.4])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 8.0])
def test_one_tokens_probability_is_that_of_the_whole_row(temperature, top_k, top_p):
    """Peaked and flat rows, likely tokens and such as are cut off."""
    generator = torch.Generator().manual_seed(3)
    sampler = Sampler(temperature, top_k, top_p)
    logits_NV = torch.randn(60, 3000, generator=generator) * torch.linspace(0.1, 9, 60)[:, None]
    warped_NV = warp(logits_NV, sampler)
    ranks = logits_NV.argsort(-1, descending=True)
    for rank in (0, 1, 5, 90, 2999):
        index_N = ranks[:, rank]
        expected_N = warped_NV.gather(-1, index_N[:, None]).squeeze(-1)
        # In a flat row rounding may move the cut by one token of some thousands.
        torch.testing.assert_close(token_probability(logits_NV, index_N, sampler), expected_N, rtol=1e-3, atol=1e-8)
