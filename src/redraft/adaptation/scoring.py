"""What scorers of samples may ask: the target, its base, the present draft and its measured acceptance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from redraft.acceptance.simulate import row_alphas
from redraft.features import FeatureStore
from redraft.selection import Scorer, ScoringContext
from redraft.selection.acceptance import alpha_measurer
from redraft.target import Target


def scoring_context(
    scorer: Scorer,
    target: Target,
    draft: Any,
    base: Callable[[], Target | None],
    seed: int,
    scratch: Path,
    store: FeatureStore | None = None,
) -> ScoringContext:
    """The context of ``scorer``; ``base`` opens the base target where that is asked for.

    ``store`` holds the features of the rows. Without one they are computed in portions, in a folder of ``scratch``.
    """

    def alpha_of(rows: Sequence[Any]) -> list[float]:
        own = copy.deepcopy(draft).to(target.device)
        if store is not None:
            return row_alphas(own, target, rows, store)
        return alpha_measurer(own, target, scratch, context.progress)(rows)

    context = ScoringContext(
        target=target,
        base_target=base() if "base_target" in scorer.needs else None,
        draft=draft,
        alpha_of=alpha_of if "alpha_of" in scorer.needs else None,
        device=target.device,
        seed=seed,
        scratch=scratch,
    )
    return context
