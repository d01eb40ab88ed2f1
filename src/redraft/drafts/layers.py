"""Building blocks of a draft: rotary positions, attention over any store of keys, the gated MLP.

A layer knows how to make queries, keys and values; *which* keys a query sees is the business of the ``attend``
callable that the caller passes: a fixed buffer while decoding, the training-time-test pattern while training.

Shape legend: N packed tokens (any leading shape), H hidden size, A query heads, K key heads, D head width,
I inner width of an MLP, R rank of an update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query [N, A, D], key [N, K, D], value [N, K, D]) -> mixed values [N, A, D]."""


class RMSNorm(nn.RMSNorm):
    """torch's, with its weight in the type of its input, so that the fused kernel runs under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Rotary:
    """Cosines and sines of rotary positions, from transformers' own initialisers, tabulated once.

    The table is not part of the module's state: it follows from the configuration. Kinds whose angles follow the length
    of the text (``dynamic``, ``longrope``) have those of texts within their original length, whatever was asked before:
    no longer text is ever given to a target of such a kind.
    """

    def __init__(self, rope_parameters: dict[str, Any], head_dim: int, max_position_embeddings: int) -> None:
        config = LlamaConfig(
            head_dim=head_dim,
            hidden_size=head_dim,
            num_attention_heads=1,
            max_position_embeddings=max_position_embeddings,
            rope_parameters=dict(rope_parameters),
        )
        self.embedding = LlamaRotaryEmbedding(config=config)
        self.table: tuple[Tensor, Tensor] | None = None

    def __call__(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, D] in float32 for integer positions [N]."""
        needed = int(positions_N.max()) + 1 if positions_N.numel() else 1
        if self.table is None or len(self.table[0]) < needed or self.table[0].device != positions_N.device:
            self.grow(max(512, 2 * needed), positions_N.device)
        assert self.table is not None
        return self.table[0][positions_N], self.table[1][positions_N]

    def grow(self, length: int, device: torch.device) -> None:
        """Tabulate positions 0 to ``length`` - 1."""
        # Not by the embedding's own forward: it takes the table's length for the text's, and that bends the angles of
        # every position where they follow the length.
        frequencies = self.embedding.original_inv_freq.to(device, torch.float32)
        angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
        angles, scale = torch.cat([angles, angles], -1), self.embedding.attention_scaling
        self.table = (angles.cos() * scale, angles.sin() * scale)


def rotate(x_NHD: Tensor, cosines_ND: Tensor, sines_ND: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of every head by its position's angle, in float32."""
    half = x_NHD.shape[-1] // 2
    x = x_NHD.float()
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return (x * cosines_ND[..., None, :] + turned * sines_ND[..., None, :]).to(x_NHD.dtype)


class LowRank(nn.Module):
    """scale * outer [out, R] @ inner [R, in], an update of a matrix (LoRA, arXiv 2106.09685); zero until trained.

    Without ``alpha`` the scale is one and ``inner`` is normal with variance 1 / in, so that no choice hangs on the
    rank. With it the update is peft's: scale alpha / R, and ``inner`` uniform within 1 / sqrt(in). ``aim`` says that
    training has yet to turn ``inner`` to where the gradient is (``attic/aim.py``).
    """

    aim = False

    def __init__(
        self, layer: nn.Linear, rank: int, alpha: float | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        like, spread = layer.weight, 1 / math.sqrt(layer.in_features)
        draw = torch.randn if alpha is None else torch.rand
        inner = draw(rank, layer.in_features, generator=generator)
        inner = inner * spread if alpha is None else (2 * inner - 1) * spread
        self.scale = 1.0 if alpha is None else alpha / rank
        self.inner = nn.Parameter(inner.to(like))
        self.outer = nn.Parameter(like.new_zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.inner), self.outer)
        return update if self.scale == 1.0 else update * self.scale

    def matrix(self) -> Tensor:
        """The update itself [out, in], in float32."""
        return (self.outer.float() @ self.inner.float()) * self.scale


class Linear(nn.Linear):
    """torch's, with room for a private low-rank update beside the shared matrix."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.low_rank: LowRank | None = None

    @classmethod
    def over(cls, layer: nn.Linear) -> Linear:
        """A layer of this kind with the very parameters of ``layer``."""
        with torch.device("meta"):
            new = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        new.weight, new.bias = layer.weight, layer.bias
        return new

    def attach_low_rank(self, rank: int, alpha: float | None = None, generator: torch.Generator | None = None) -> None:
        self.low_rank = LowRank(self, rank, alpha, generator)

    def forward(self, x: Tensor) -> Tensor:
        shared = super().forward(x)
        return shared if self.low_rank is None else shared + self.low_rank(x)


class Attention(nn.Module):
    """Grouped-query attention whose input is an embedding and a state side by side (EAGLE-3)."""

    def __init__(self, inputs: int, hidden: int, heads: int, key_heads: int, head_dim: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_dim = heads, key_heads, head_dim
        self.q_proj = Linear(inputs, heads * head_dim, bias=bias)
        self.k_proj = Linear(inputs, key_heads * head_dim, bias=bias)
        self.v_proj = Linear(inputs, key_heads * head_dim, bias=bias)
        self.o_proj = Linear(heads * head_dim, hidden, bias=bias)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [N, K, D]; positions that nothing is predicted from need no more than these."""
        shape = (*x.shape[:-1], self.key_heads, self.head_dim)
        return rotate(self.k_proj(x).view(shape), *rope), self.v_proj(x).view(shape)

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(self.q_proj(x).view(*x.shape[:-1], self.heads, self.head_dim), *rope)


class GatedMLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, inner, bias=False)
        self.up_proj = Linear(hidden, inner, bias=False)
        self.down_proj = Linear(inner, hidden, bias=False)

    def inner(self, x: Tensor) -> Tensor:
        """Inner activations [N, I], which ``down_proj`` reads."""
        return F.silu(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.inner(x))


def norm_weight(norm: nn.Module, width: int) -> Tensor:
    """What a norm multiplies the scaled state by, [width] in float64.

    Asked of the module itself, since some store the weight minus one, with numbers of mean 0, since some take the mean
    off. The epsilon below the root shifts all weights alike by less than one part in 10,000, which no use of the ratio
    sees. A norm without a weight multiplies by one.
    """
    like = next(norm.parameters(), torch.ones(1))
    signs = torch.ones(width, dtype=like.dtype, device=like.device)
    signs[1::2] = -1
    with torch.no_grad():
        return ((norm(signs[None]) - norm(-signs[None]))[0] * signs).double() / 2
