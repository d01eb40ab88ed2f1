"""What gives features, and what takes them: the seam between training and whatever runs the target."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol

from torch import Tensor

from redraft.rows import AnyRow, TokenRow


class RowFeatures(NamedTuple, Generic[AnyRow]):
    """The features of a row: ``taps`` [P + R - 2, K*H] and final-norm states ``hidden`` [R - 1, H], on the CPU."""

    row: AnyRow
    taps: Tensor
    hidden: Tensor


class FeatureSource(Protocol):
    """Gives the features of any stored response: a store on disk, or the target in this process."""

    def get(self, row: TokenRow) -> tuple[Tensor, Tensor]:
        """Taps and final-norm states of one row (:class:`RowFeatures`). Raises ``KeyError`` where it has none."""
        ...


class FeatureProducer(Protocol):
    """Makes the features of many responses, for a store to keep: the target in this process, later a serving engine."""

    def row_bytes(self, row: TokenRow) -> int:
        """Bytes that the features of a row take."""
        ...

    def batches(
        self, rows: Sequence[TokenRow], have: Collection[str] = (), batch_tokens: int = 2048
    ) -> Iterator[list[RowFeatures]]:
        """The features of ``rows``, in the order that suits the maker. Batches of rows that are all in ``have`` are
        left out; how rows are put together follows from all of them, so that a resumed pass gives the same bits."""
        ...


class FeatureKeeper(Protocol):
    """Takes features as they come; false when it has no room for them and wants no more."""

    def put(self, found: Sequence[RowFeatures]) -> bool: ...
