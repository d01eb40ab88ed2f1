"""Sample selection: a scorer gives every row one number, a rule turns numbers and a budget into a manifest.

One file a scorer, found by the registry. Every scorer's numbers say the same thing: higher is more worth training
on. Rows may be answered ones or prompts alone (an empty response): a scorer then works on the prompt, before any
generation is paid for. A scorer with settings is written ``shift:metric=l2,layer=12``, see
:func:`redraft.settings.texts.parse_scorer`. Budgets are in :mod:`redraft.settings.texts`, the rule and
the record of what was chosen and why in :mod:`redraft.selection.manifest`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from redraft.errors import UserError
from redraft.rows import TokenRow, sizes
from redraft.target import Target


@dataclass(frozen=True)
class PromptRow:
    """A prompt that is scored: without an answer, or read as if its later tokens were one."""

    key: str
    prompt_ids: Sequence[int]
    response_ids: Sequence[int] = ()


@dataclass
class ScoringContext:
    """What scorers may draw on; each names in ``needs`` the fields that it cannot do without.

    ``target`` is the fine-tuned target, ``base_target`` the one the draft was aligned with, ``alpha_of`` gives the
    mean acceptance of the present draft on each row (the caller measures it; selection does not decode).
    ``device`` is where statistics over all tokens are computed, ``batch_tokens`` bounds the padded tokens of a
    batch, ``progress(done, total)`` is called with numbers of rows, ``scratch`` is the folder for temporary files.
    """

    target: Target | None = None
    base_target: Target | None = None
    draft: Any = None
    alpha_of: Callable[[Sequence[Any]], Sequence[float]] | None = None
    device: torch.device | str = "cpu"
    batch_tokens: int = 4096
    seed: int = 0
    progress: Callable[[int, int], None] | None = None
    scratch: Path | None = None


class Scorer:
    """A registered class; its instances' constructor arguments, all with defaults, are the scorer's settings.

    ``score`` gives one finite number a row, in the order of the rows. A row's number may depend on which other rows
    there are, but not on their order. ``settings`` are those that decide the numbers, as the constructor takes them.
    ``passes`` counts forward passes of a model as large as the target over every row: what scoring costs.

    A scorer may also have ``explained(rows, context) -> list[(number, note)]`` with the numbers of ``score``: the
    note says, for the manifest, what led to a number that depends on other rows.
    """

    name: str
    needs: frozenset[str] = frozenset()
    passes: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def score(self, rows: Sequence[TokenRow], context: ScoringContext) -> list[float]:
        raise NotImplementedError


# How the command line calls what a context field holds.
_FIELD_NAMES = {
    "target": "the fine-tuned target",
    "base_target": "the base target that the draft was aligned with",
    "draft": "the present draft",
    "alpha_of": "the present draft's measured acceptance",
}


def scored_ids(row: TokenRow) -> tuple[list[int], int]:
    """(token ids, index of the first token that counts): the response, or the whole prompt when there is none."""
    prompt, response = list(row.prompt_ids), list(row.response_ids)
    return prompt + response, len(prompt) if response else 0


def scored_tokens(row: TokenRow) -> int:
    """Tokens of a row that count towards a budget: those of its response, or of the prompt when there is none."""
    prompt, response = sizes(row)
    return response or prompt


def score_rows(scorer: Scorer, rows: Sequence[TokenRow], context: ScoringContext) -> list[float]:
    """The scorer's numbers, one a row; see :func:`explained_scores` for the checks and errors."""
    return [score for score, _ in explained_scores(scorer, rows, context)]


def explained_scores(
    scorer: Scorer, rows: Sequence[TokenRow], context: ScoringContext
) -> list[tuple[float, str | None]]:
    """(number, note or ``None``) a row, after every check that does not depend on the scorer.

    Raises ``UserError`` for no rows, two rows of one key, a row without tokens, a context that lacks what the
    scorer needs, and a score that is not finite.
    """
    if not rows:
        raise UserError("there are no rows to select from; regenerate some first")
    for row in rows:
        if not scored_tokens(row):
            raise UserError(f"row {row.key} has no tokens, so it cannot be scored; remove it")
    twice = [key for key, count in Counter(row.key for row in rows).items() if count > 1]
    if twice:
        raise UserError(f"{len(twice)} row keys occur more than once, first {twice[0]}; make every row's id unique")
    missing = [field for field in sorted(scorer.needs) if getattr(context, field) is None]
    if missing:
        wanted = " and ".join(_FIELD_NAMES.get(field, field) for field in missing)
        raise UserError(f"scorer {scorer.name} needs {wanted}; give it or choose another scorer")
    explained = getattr(scorer, "explained", None)
    found = explained(rows, context) if explained else [(score, None) for score in scorer.score(rows, context)]
    if len(found) != len(rows):
        raise ValueError(f"scorer {scorer.name} gave {len(found)} scores for {len(rows)} rows")
    for row, (score, _) in zip(rows, found, strict=True):
        if not math.isfinite(score):
            raise UserError(f"scorer {scorer.name} gives row {row.key} the score {score}; check the models for NaN")
    return [(float(score), note) for score, note in found]
