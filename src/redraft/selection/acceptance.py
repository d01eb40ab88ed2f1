"""What scorers may ask of models: the target, its base, and the present draft's acceptance row by row."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from redraft.acceptance.simulate import row_alphas
from redraft.features import FeatureStore
from redraft.progress import Progress
from redraft.selection import Scorer, ScoringContext
from redraft.target import Target

# Tokens whose features lie on the disk at once: 220 MB for three taps of width 576 in bfloat16.
PORTION_TOKENS = 2**16


def scoring_context(
    scorer: Scorer,
    target: Target | None,
    draft: Any,
    base: Callable[[], Target | None],
    seed: int,
    scratch: Path,
    progress: Progress | None = None,
    store: FeatureStore | None = None,
) -> ScoringContext:
    """The context of ``scorer``; ``base`` opens the base target where that is asked for.

    ``store`` holds the features of the rows. Without one they are computed in portions, in a folder of ``scratch``.
    """

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress.update(done)

    def alpha_of(rows: Sequence[Any]) -> list[float]:
        assert target is not None
        own = copy.deepcopy(draft).to(target.device)
        if store is not None:
            return row_alphas(own, target, rows, store)
        return alpha_measurer(own, target, scratch, tell)(rows)

    return ScoringContext(
        target=target,
        base_target=base() if "base_target" in scorer.needs else None,
        draft=draft,
        alpha_of=alpha_of if "alpha_of" in scorer.needs else None,
        device="cpu" if target is None else target.device,
        seed=seed,
        progress=tell,
        scratch=scratch,
    )


def alpha_measurer(
    draft: Any, target: Target, scratch: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Callable[[Sequence[Any]], list[float]]:
    """What ``ScoringContext.alpha_of`` takes: rows -> mean acceptance of ``draft`` at each row's drafted positions.

    Features are computed in portions in a temporary folder of ``scratch``, so the disk holds ``PORTION_TOKENS`` of
    them however many rows there are. ``progress(done, total)`` counts rows.
    """

    def measure(rows: Sequence[Any]) -> list[float]:
        found: dict[str, float] = {}
        target.tap(draft.config.taps)
        for portion in _portions(sorted(rows, key=lambda r: (len(r.prompt_ids) + len(r.response_ids), r.key))):
            with tempfile.TemporaryDirectory(prefix="redraft-select-", dir=scratch) as folder:
                store = FeatureStore(Path(folder), {})
                store.build(target, portion)
                alphas = row_alphas(draft.to(target.device), target, portion, store)
            found.update((row.key, alpha) for row, alpha in zip(portion, alphas, strict=True))
            if progress is not None:
                progress(len(found), len(rows))
        return [found[row.key] for row in rows]

    return measure


def _portions(rows: Sequence[Any]) -> Iterator[list[Any]]:
    portion: list[Any] = []
    tokens = 0
    for row in rows:
        size = len(row.prompt_ids) + len(row.response_ids)
        if portion and tokens + size > PORTION_TOKENS:
            yield portion
            portion, tokens = [], 0
        portion.append(row)
        tokens += size
    if portion:
        yield portion
