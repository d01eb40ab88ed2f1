"""Attention of anchors over a long text by torch's flex attention, in one fused kernel that skips what is masked.

Own keys stand behind the text's: number i of anchor a is key T + i * A + a, and a block mask leaves of these the
diagonal alone. Used on CUDA, and there only where a trial gives what plain attention gives, forward and backward; on a
CPU torch has no backward pass of it. The trial is made once for each device, data type and head width.

Shape legend: B rows, E key heads, G query heads a key head, A most anchors a row, T positions of a row, S keys in all,
W head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Own = Sequence[tuple[Tensor, ...]]

# What two ways of computing attention may differ by, of the largest number, in each data type.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def fused_attention(
    query: Tensor, keys: Tensor, values: Tensor, first_BA: Tensor, last_BA: Tensor, own: Own
) -> Tensor | None:
    """Mixed values [B, E, G, A, W] of scaled queries [B, E, G, A, W] on keys and values [B, E, T, W] of the positions
    ``first_BA`` to ``last_BA``, and on own keys and values [B, E, A, W]; None where no fused kernel can be trusted."""
    if (
        query.device.type != "cuda"
        or query.dtype not in ROUNDING
        or not usable(query.device, query.dtype, keys.shape[-1])
    ):
        return None
    return flex(query, keys, values, first_BA, last_BA, own, compiled())


@cache
def compiled() -> Callable[..., Any]:
    """Flex attention as a kernel for any number of anchors and keys."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    first_BA: Tensor,
    last_BA: Tensor,
    own: Own,
    attention: Callable[..., Any],
) -> Tensor:
    """See :func:`fused_attention`; ``attention`` is torch's function, compiled or not."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, key_heads, groups, most, _ = query.shape
    length = keys.shape[2]
    keys = torch.cat([keys, *(pair[0] for pair in own)], 2)
    values = torch.cat([values, *(pair[1] for pair in own)], 2)
    sees = sees_of(first_BA, last_BA, length)
    mask = create_block_mask(sees, rows, None, most, keys.shape[2], device=str(query.device))
    mixed = attention(query.flatten(1, 2), keys, values, block_mask=mask, scale=1.0, enable_gqa=groups > 1)
    return mixed.unflatten(1, (key_heads, groups))


def sees_of(first_BA: Tensor, last_BA: Tensor, length: int) -> Callable[..., Tensor]:
    """The mask as a function of row, head, anchor and key."""
    most = first_BA.shape[1]

    def sees(row: Tensor, head: Tensor, anchor: Tensor, key: Tensor) -> Tensor:
        text = (key < length) & (key >= first_BA[row, anchor]) & (key <= last_BA[row, anchor])
        return text | ((key >= length) & ((key - length) % most == anchor))

    return sees


def plain(query: Tensor, keys: Tensor, values: Tensor, first_BA: Tensor, last_BA: Tensor, own: Own) -> Tensor:
    """As :func:`flex`, with the mask written out."""
    length, most = keys.shape[2], query.shape[3]
    keys = torch.cat([keys, *(pair[0] for pair in own)], 2)
    values = torch.cat([values, *(pair[1] for pair in own)], 2)
    position_S = torch.arange(keys.shape[2], device=query.device)
    anchor_A1 = torch.arange(most, device=query.device)[:, None]
    text_BAS = (position_S >= first_BA[..., None]) & (position_S <= last_BA[..., None]) & (position_S < length)
    seen_BAS = text_BAS | ((position_S >= length) & ((position_S - length) % most == anchor_A1))
    parts = (query, keys.unsqueeze(2), values.unsqueeze(2))
    return F.scaled_dot_product_attention(*parts, attn_mask=seen_BAS[:, None, None], scale=1.0)


@cache
def usable(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether flex attention compiles on this device and gives, at heads of this width, what plain attention does."""
    with torch.enable_grad(), torch.random.fork_rng([device]):
        torch.manual_seed(0)
        shapes = [(2, 2, 2, 150, width), (2, 2, 300, width), (2, 2, 300, width), (2, 2, 150, width), (2, 2, 150, width)]
        inputs = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
        last_BA = torch.arange(150, 300, device=device).expand(2, -1)
        query, keys, values, *own = inputs
        parts: Any = (query, keys, values, last_BA - 200, last_BA, [tuple(own)])
        try:
            fused = partial(flex, attention=compiled())
            found = [attend_all(inputs, mixed) for mixed in (plain(*parts), fused(*parts))]
        except Exception:  # whatever a compiler or a kernel may raise: then there is the other way
            return False
        return all(_near(a, b, ROUNDING[dtype]) for a, b in zip(*found, strict=True))


def attend_all(inputs: Sequence[Tensor], mixed: Tensor) -> list[Tensor]:
    """The values and their gradients with respect to ``inputs``."""
    return [mixed.detach(), *torch.autograd.grad(mixed.float().sin().sum(), inputs)]


def _near(a: Tensor, b: Tensor, rounding: float) -> bool:
    return float((a - b).abs().max()) <= rounding * float(a.abs().max())
