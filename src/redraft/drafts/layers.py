"""Building blocks of a draft: rotary positions, attention over any store of keys, gated MLPs of one or many experts.

A layer knows how to make queries, keys and values; *which* keys a query sees is the business of the ``attend``
callable that the caller passes: a fixed buffer while decoding, the training-time-test pattern while training.

Several experts in one SwiGLU (the general form of EDA, arXiv 2603.09527) are equal blocks of its inner width: block e
of the rows of gate and up and of the columns of down is expert e. ``sum_e weight_e(x) * expert_e(x)`` is then one
SwiGLU whose inner activations are scaled block by block. All blocks are computed and those of experts that were not
chosen are scaled by zero: every shape is fixed, whatever the router says, and at the width of a draft reading the
weights costs more than the products that a gather would save.

Shape legend: N packed tokens (any leading shape), H hidden size, A query heads, K key heads, D head width,
I inner width of an MLP, R rank of an update, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


# What the settings of each kind of angles must hold beside the base.
ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}


ORIGINAL = "original_max_position_embeddings"
# Keys of rotary settings that are lists of numbers, and those that are numbers.
ROPE_LISTS = ("short_factor", "long_factor")
ROPE_NUMBERS = (
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"),
    *("mscale", "mscale_all_dim", "partial_rotary_factor", ORIGINAL),
)


class Rotary:
    """Cosines and sines of rotary positions, from transformers' own initialisers, tabulated once.

    The table is not part of the module's state: it follows from the configuration. Kinds whose angles follow the length
    of the text (``dynamic``, ``longrope``) have those of texts within their original length, whatever was asked before:
    no longer text is ever given to a target of such a kind. That is what drafts are trained with. Engines tabulate once
    as well, and not all the same (vLLM 0.32 and 0.33, SGLang 0.5.23; ``linear``, ``llama3`` and ``default`` are alike):

    =============  ==================================================================================================
    ``dynamic``    vLLM as here, unless ``max_trained_positions`` is below the length; SGLang stretches the base by
                   (factor^2 - factor + 1)^(W / (W - 2)) at any length
    ``longrope``   vLLM takes the long factors as soon as it serves more than the original length; SGLang those of the
                   longest text in the batch; neither reads ``attention_factor`` or ``factor``
    ``yarn``       vLLM as here; SGLang reads ``attn_factor`` in place of ``attention_factor``
    partial        vLLM as here; SGLang looks for ``partial_rotary_factor`` where transformers no longer keeps it, and
                   turns the whole head
    =============  ==================================================================================================
    """

    def __init__(self, rope_parameters: dict[str, Any], head_dim: int, max_position_embeddings: int) -> None:
        # A part of the head turns by the angles of a head that is as wide as the part.
        rope, self.width = dict(rope_parameters), rotary_width(rope_parameters, head_dim)
        rope.pop("partial_rotary_factor", None)
        config = LlamaConfig(
            head_dim=self.width,
            hidden_size=self.width,
            num_attention_heads=1,
            max_position_embeddings=max_position_embeddings,
            rope_parameters=rope,
        )
        with torch.device("cpu"):  # also where the draft around it is built without numbers
            self.embedding = LlamaRotaryEmbedding(config=config)
        self.table: tuple[Tensor, Tensor] | None = None

    def __call__(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, W] in float32 for integer positions [N]; W numbers of a head turn."""
        return self.below(int(positions_N.max()) + 1 if positions_N.numel() else 1, positions_N)

    def below(self, length: int, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """As the call, of positions that are all below ``length``: who knows that spares a wait for the device."""
        if self.table is None or len(self.table[0]) < length or self.table[0].device != positions_N.device:
            self.grow(max(512, 2 * length), positions_N.device)
        assert self.table is not None
        return self.table[0][positions_N], self.table[1][positions_N]

    @property
    def usable(self) -> bool:
        """Whether the settings told angles that can be computed with."""
        scale = float(self.embedding.attention_scaling)
        return bool(self.embedding.original_inv_freq.isfinite().all()) and math.isfinite(scale) and scale > 0

    def grow(self, length: int, device: torch.device) -> None:
        """Tabulate positions 0 to ``length`` - 1."""
        # Not by the embedding's own forward: it takes the table's length for the text's, and that bends the angles of
        # every position where they follow the length.
        frequencies = self.embedding.original_inv_freq.to(device, torch.float32)
        angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
        angles, scale = torch.cat([angles, angles], -1), self.embedding.attention_scaling
        self.table = (angles.cos() * scale, angles.sin() * scale)


def told_angles(rope_parameters: Any, head_dim: int) -> bool:
    """Whether these settings tell the angles of heads of this width."""
    if not isinstance(rope_parameters, dict):
        return False
    kind = rope_parameters.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in ROPE_KINDS or rope_parameters.get(ORIGINAL, 1) is None:
        return False
    given = {key: value for key, value in rope_parameters.items() if value is not None}
    lists = [given[key] for key in ROPE_LISTS if key in given]
    if not all(isinstance(listed, list) and all(map(_is_number, listed)) for listed in lists):
        return False
    if not all(_is_number(given[key]) for key in ROPE_NUMBERS if key in given):
        return False
    needed = [given.get(key, 0) for key in ("rope_theta", *ROPE_KINDS[kind])]
    if not all(min(value if isinstance(value, list) else [value], default=0) > 0 for value in needed):
        return False
    try:
        return rotary_width(rope_parameters, head_dim) > 0
    except (ValueError, TypeError):
        return False


def _is_number(value: Any) -> bool:
    """Whether it is a finite number within what floats hold; true is none."""
    return type(value) in (int, float) and abs(value) < 1e300


def rotary_width(rope_parameters: dict[str, Any], head_dim: int) -> int:
    """How many numbers of a head turn, the first ones: all, or the share that ``partial_rotary_factor`` names.

    Raises ``ValueError`` for a share that is none, or that leaves no even number of them.
    """
    share = rope_parameters.get("partial_rotary_factor") or 1.0
    width = int(head_dim * share)
    if not 0 < share <= 1 or width < 2 or width % 2:
        raise ValueError(f"partial_rotary_factor {share} of a head of {head_dim}")
    return width


def rotate(x_NHD: Tensor, cosines_NW: Tensor, sines_NW: Tensor) -> Tensor:
    """Rotate pairs (i, i + W/2) of the first W numbers of every head by its position's angle, in float32."""
    width = cosines_NW.shape[-1]
    half = width // 2
    x = x_NHD[..., :width].float()
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    x = (x * cosines_NW[..., None, :] + turned * sines_NW[..., None, :]).to(x_NHD.dtype)
    return x if width == x_NHD.shape[-1] else torch.cat([x, x_NHD[..., width:]], -1)


# Queries that are compared with keys at once where only so many keys back are seen.
BLOCK = 1024


def attend_causally(query: Tensor, key: Tensor, value: Tensor, window: int = 0) -> Tensor:
    """Mixed values [B, A, T, D] of a text of T positions over itself: queries [B, A, T, D] on keys [B, K, T, D].

    Each position sees itself and those before it, with a ``window`` only so many. Those of a long text are then taken
    in blocks, so that no mask is as large as the text squared.
    """
    length = query.shape[2]
    if not window or window >= length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    mixed, position_T = [], torch.arange(length, device=query.device)
    for start in range(0, length, BLOCK):
        stop, first = min(length, start + BLOCK), max(0, start + 1 - window)
        back = position_T[start:stop, None] - position_T[first:stop]
        part = (query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop])
        mixed.append(F.scaled_dot_product_attention(*part, attn_mask=(back >= 0) & (back < window), enable_gqa=True))
    return torch.cat(mixed, 2)


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


class Linear(nn.Linear):
    """torch's, with room for a private low-rank update beside the shared matrix."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.low_rank: LowRank | None = None
        self.cast: tuple[Tensor, ...] | None = None  # see cast_once

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
        shared = super().forward(x) if self.cast is None else F.linear(x, self.cast[0], self.bias)
        return shared if self.low_rank is None else shared + self.low_rank(x)


@contextmanager
def cast_once(*modules: nn.Module) -> Iterator[None]:
    """Frozen matrices are brought to autocast's type here once, where autocast would make a copy at every use, each of
    which the graph keeps. To the bit the same. Those that are trained autocast itself copies once."""
    inside = {layer: None for module in modules for layer in module.modules() if isinstance(layer, Linear)}
    layers = [layer for layer in inside if layer.cast is None and not layer.weight.requires_grad]
    kind = next((m.weight.device.type for m in layers), "cpu")
    if not torch.is_autocast_enabled(kind):
        yield
        return
    dtype = torch.get_autocast_dtype(kind)
    try:
        for layer in layers:
            # In a tuple it is no part of the module's state.
            layer.cast = (layer.weight.detach().to(dtype),)
        yield
    finally:
        for layer in layers:
            layer.cast = None


class Attention(nn.Module):
    """Grouped-query attention of a decoder layer whose input may be wider than its output."""

    def __init__(self, inputs: int, config: Any) -> None:
        """``inputs`` is the width of what is read; ``config`` a :class:`redraft.drafts.eagle.module.EagleConfig`."""
        super().__init__()
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, bias = config.head_dim, config.attention_bias
        self.q_proj = Linear(inputs, self.heads * self.head_dim, bias=bias)
        self.k_proj = Linear(inputs, self.key_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(inputs, self.key_heads * self.head_dim, bias=bias)
        behind = bias if config.output_bias is None else config.output_bias
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=behind)
        # Over each head's numbers, before they are rotated (Qwen3, arXiv 2505.09388).
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [N, K, D]; positions that nothing is predicted from need no more than these."""
        shape = (*x.shape[:-1], self.key_heads, self.head_dim)
        keys = self.k_proj(x).view(shape)
        keys = keys if self.k_norm is None else self.k_norm(keys)
        return rotate(keys, *rope), self.v_proj(x).view(shape)

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        queries = self.q_proj(x).view(*x.shape[:-1], self.heads, self.head_dim)
        return rotate(queries if self.q_norm is None else self.q_norm(queries), *rope)


class Router(nn.Module):
    """Weights of E experts for each token, all zero but ``active`` of them; they add up to ``total``.

    It scores experts by a matrix without bias, keeps the best, and takes the softmax among those, in float32 also under
    autocast.
    """

    def __init__(self, hidden: int, experts: int, active: int, total: float) -> None:
        super().__init__()
        self.experts, self.active, self.total = experts, active, total
        self.weight = nn.Parameter(torch.zeros(experts, hidden))
        # (times chosen [E], summed probabilities [E], tokens) of every pass since the balance was last asked for.
        self.seen: list[tuple[Tensor, Tensor, int]] = []

    def spread(self, generator: torch.Generator) -> None:
        """Start from small random scores, so that tokens do not all choose the same experts."""
        with torch.no_grad():
            drawn = torch.randn(self.weight.shape, generator=generator) * (0.5 / math.sqrt(self.weight.shape[1]))
            self.weight.copy_(drawn)

    def forward(self, x: Tensor) -> Tensor:
        """Weights [N, E] of experts for tokens [N, H]."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores_NE = F.linear(x.to(dtype), self.weight.to(dtype))
            best = scores_NE.topk(self.active, -1).indices
            chosen_NE = torch.zeros_like(scores_NE, dtype=torch.bool).scatter_(-1, best, True)
            if self.training and torch.is_grad_enabled() and self.active < self.experts:
                counts_E = chosen_NE.flatten(0, -2).sum(0)
                probs_NE = scores_NE.softmax(-1).flatten(0, -2)
                self.seen.append((counts_E, probs_NE.sum(0), len(probs_NE)))
            raised_NE = (scores_NE - scores_NE.detach().amax(-1, keepdim=True)).exp()
            raised_NE = raised_NE.masked_fill(~chosen_NE, 0.0)
            # In this order equal scores give exactly total / active, also where 1 / active is no float.
            return raised_NE * self.total / raised_NE.sum(-1, keepdim=True)

    def balance(self) -> Tensor | None:
        """Load-balancing term over the passes since the last call, which it forgets; ``None`` if there was none.

        E * sum_e share_e * probability_e (Switch Transformers, arXiv 2101.03961, equation 4), with the share of all
        choices that fell on expert e and its mean probability before the choice: one when both are even.
        """
        if not self.seen:
            return None
        counts, probs, tokens = zip(*self.seen, strict=True)
        self.seen = []
        share_E = torch.stack(counts).sum(0) / (sum(tokens) * self.active)
        return self.experts * (share_E * torch.stack(probs).sum(0) / sum(tokens)).sum()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a router starts with nothing seen: what it saw hangs on the graph of another pass."""
        return {**self.__dict__, "seen": []}


class GatedMLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``, of ``experts`` blocks of which a router gives each token ``active``."""

    def __init__(self, hidden: int, inner: int, experts: int = 1, active: int = 1, total: float = 1.0) -> None:
        """With one expert there is no router. Raises ``ValueError`` for counts that cannot be, or that divide
        nothing."""
        super().__init__()
        if experts < 1 or not 1 <= active <= experts or inner % experts:
            raise ValueError(f"{active} active of {experts} experts of an inner width of {inner}")
        self.gate_proj = Linear(hidden, inner, bias=False)
        self.up_proj = Linear(hidden, inner, bias=False)
        self.down_proj = Linear(inner, hidden, bias=False)
        self.router = Router(hidden, experts, active, total) if experts > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        if self.router is not None:
            weights = self.router(x).to(inner.dtype)
            inner = inner * weights.repeat_interleave(inner.shape[-1] // self.router.experts, -1)
        return self.down_proj(inner)


class SharedPrivateMLP(GatedMLP):
    """A SwiGLU (the shared expert or experts, under the plain names) with optional private ones beside it."""

    def __init__(self, hidden: int, inner: int, parts: Any) -> None:
        """``parts``, a draft's config, says what private experts there are and how many shared ones the old MLP is.

        Widths are divided among the experts. The shared experts are slices of one old MLP, whose sum they were: their
        weights add up to how many are active. Private ones add up to one, as in the reference's code. Raises
        ``ValueError`` for counts that divide nothing.
        """
        super().__init__(hidden, inner, parts.shared_experts, parts.shared_active, total=parts.shared_active)
        width, counts = parts.private_width, (parts.private_experts, parts.private_active)
        self.private = GatedMLP(hidden, width, *counts) if width else None

    def forward(self, x: Tensor) -> Tensor:
        shared = super().forward(x)
        return shared if self.private is None else shared + self.private(x)


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
