"""What scorers may ask of models: the target, its base, and the present draft's acceptance row by row."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from redraft.acceptance.simulate import row_alphas
from redraft.features import FeatureStore
from redraft.progress import Progress
from redraft.rows import groups, whole_length
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
        return (
            measured_alphas(own, target, rows, scratch, tell) if store is None else row_alphas(own, target, rows, store)
        )

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


def measured_alphas(
    draft: Any, target: Target, rows: Sequence[Any], scratch: Path, progress: Callable[[int, int], None]
) -> list[float]:
    """The mean acceptance of ``draft`` at the drafted positions of each row.

    Features are computed in portions in a temporary folder of ``scratch``, so the disk holds ``PORTION_TOKENS`` of
    them however many rows there are. ``progress(done, total)`` counts rows.
    """
    found: dict[str, float] = {}
    target.tap(draft.config.taps)
    by_length = sorted(rows, key=lambda row: (whole_length(row), row.key))
    for portion in groups(by_length, PORTION_TOKENS, whole_length):
        with tempfile.TemporaryDirectory(prefix="redraft-select-", dir=scratch) as folder:
            store = FeatureStore(Path(folder), {})
            store.build(target, portion)
            found |= dict(zip((row.key for row in portion), row_alphas(draft, target, portion, store), strict=True))
        progress(len(found), len(rows))
    return [found[row.key] for row in rows]
