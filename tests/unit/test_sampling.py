"""Warping: the nucleus is the same whether a row is sorted whole or not."""

from __future__ import annotations

import pytest
import torch

from redraft.errors import UserError
from redraft.sampling import Sampler, nucleus, warp


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
