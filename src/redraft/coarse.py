"""A matrix stored as a known one plus a change of a few bits a weight.

What training changes in a whole matrix is many small numbers of like size, which low rank cannot hold and few bits can
(BitDelta, arXiv 2402.10193, for the change of whole language models). A row's change is rounded to 2^bits evenly spaced
levels around zero, (code + 1/2 - 2^(bits - 1)) * step, with the step of least squared error for the row; one bit is the
sign times the row's mean magnitude.

Shape legend: D rows, H columns, N rows that the known matrix does not have, B bytes of a row's codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redraft.settings.training import MOST_BITS

# Steps that are tried, as shares of the one whose outermost levels reach the row's largest change.
SPANS = torch.linspace(0.3, 1.0, 15).tolist()


@dataclass
class Coarse:
    """Codes [D, B] (``bits`` each, packed row by row), steps [D], where each row stands in the known matrix [D] (-1:
    nowhere), and the rows that stand nowhere [N, H]. Without ``source`` every row stands in its own place."""

    bits: int
    columns: int
    codes: Tensor
    step: Tensor
    source: Tensor | None = None
    rows: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it, by the last part of the name."""
        given = {"codes": self.codes, "step": self.step, "source": self.source, "rows": self.rows}
        return {name: tensor for name, tensor in given.items() if tensor is not None}


def coarsen(matrix_DH: Tensor, known_DH: Tensor, bits: int, source_D: Tensor | None = None) -> Coarse:
    """``matrix`` as a quantised change of ``known``.

    Raises ``ValueError`` for bits that there are not and shapes that differ.
    """
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"{bits} bits; 1 to {MOST_BITS} are possible")
    matrix = matrix_DH.detach().float().cpu()
    known = placed(known_DH, source_D)
    if known.shape != matrix.shape:
        raise ValueError(f"a matrix {list(matrix.shape)} cannot be told by one of {list(known.shape)}")
    new = torch.zeros(len(matrix), dtype=torch.bool) if source_D is None else source_D.cpu() < 0
    change = torch.where(new[:, None], 0.0, matrix - known)
    step = _steps(change, bits)
    codes = _codes(change, step, bits)
    unpacked = np.unpackbits(codes.numpy()[..., None], axis=-1)[..., -bits:]
    packed = np.packbits(unpacked.reshape(len(codes), -1), axis=1)
    # Rows that are kept whole take the type that the whole matrix would have been stored in.
    rows = None if source_D is None else matrix_DH.detach().cpu()[new].to(known_DH.dtype).contiguous()
    return Coarse(
        bits,
        matrix.shape[1],
        torch.from_numpy(packed),
        step,
        None if source_D is None else source_D.cpu().to(torch.int32),
        rows,
    )


def told(coarse: Coarse, known_DH: Tensor) -> Tensor:
    """The matrix [D, H] that was stored, in the type of ``known`` and on the CPU.

    Raises ``ValueError`` where the two do not fit.
    """
    known = placed(known_DH, coarse.source)
    width = -(-coarse.columns * coarse.bits // 8)
    fits = known.shape == (len(coarse.step), coarse.columns) and coarse.codes.shape == (len(coarse.step), width)
    new = None if coarse.source is None else coarse.source < 0
    if not fits or (new is not None and (coarse.rows is None or coarse.rows.shape != (int(new.sum()), known.shape[1]))):
        raise ValueError(f"codes {list(coarse.codes.shape)} do not fit a matrix {list(known.shape)}")
    unpacked = np.unpackbits(coarse.codes.numpy(), axis=1, count=coarse.columns * coarse.bits)
    # The codes' bits, the highest first, filled up to bytes.
    bits = unpacked.reshape(*known.shape, coarse.bits)
    filled = np.concatenate([np.zeros((*known.shape, 8 - coarse.bits), np.uint8), bits], -1)
    codes = torch.from_numpy(np.packbits(filled, axis=-1)[..., 0])
    matrix = (known + _levels(codes, coarse.step, coarse.bits)).to(known_DH.dtype)
    if new is not None and coarse.rows is not None:
        matrix[new] = coarse.rows.to(matrix.dtype)
    return matrix


def placed(known_DH: Tensor, source_D: Tensor | None) -> Tensor:
    """The known rows in the places of the matrix, in float32 on the CPU; any row where there is none.

    They are taken as they are served, in bfloat16, whatever type they came in: the same codes then tell the same.
    """
    known = known_DH.detach().to(torch.bfloat16).float().cpu()
    return known if source_D is None else known[source_D.cpu().long().clamp(min=0)]


def _levels(codes: Tensor, step_D: Tensor, bits: int) -> Tensor:
    return (codes.float() + 0.5 - 2 ** (bits - 1)) * step_D[:, None]


def _codes(change_DH: Tensor, step_D: Tensor, bits: int) -> Tensor:
    """The nearest level's number [D, H]."""
    step = torch.where(step_D > 0, step_D, 1.0)[:, None]
    return (change_DH / step + 2 ** (bits - 1)).floor().clamp(0, 2**bits - 1).to(torch.uint8)


def _steps(change_DH: Tensor, bits: int) -> Tensor:
    if bits == 1:
        return 2 * change_DH.abs().mean(1)
    reach_D = 2 * change_DH.abs().amax(1) / (2**bits - 1)
    best_D = reach_D.clone()
    least_D = torch.full_like(reach_D, torch.inf)
    for span in SPANS:
        step_D = span * reach_D
        error_D = (_levels(_codes(change_DH, step_D, bits), step_D, bits) - change_DH).square().sum(1)
        best_D = torch.where(error_D < least_D, step_D, best_D)
        least_D = torch.minimum(error_D, least_D)
    return best_D
