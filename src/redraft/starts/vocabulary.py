"""The draft's vocabulary against the text of the fine-tuned target: coverage, and a refresh at constant size.

A draft that speaks a part of the vocabulary cannot propose the rest, whatever it is trained on. Coverage is counted
where a draft is asked: at every response token after the first, which prefill gives. For text drawn from the target,
the share of covered tokens is also the expected share of the target's probability that the draft can reach, so it
caps alpha; a draft that is right wherever it can be gives the cap on tau.

A refresh swaps the ids that the text uses least for those that it misses. Kept rows of the head go along to their
new places; new ones are mapped from the target's by what is fitted on the rows that both have
(:func:`redraft.starts.leastsquares.fit_row_map`).

Shape legend: V target vocabulary, D draft vocabulary, F target width, H draft width.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from redraft.acceptance.simulate import walk
from redraft.data.store import Row
from redraft.drafts.layers import norm_weight
from redraft.drafts.walks import run_lengths
from redraft.errors import UserError
from redraft.registries import STARTS
from redraft.rows import anchors
from redraft.starts.apply import Start, StartContext, StartResult
from redraft.starts.leastsquares import RowMap, fit_row_map


def token_counts(rows: Sequence[Row], size: int) -> Tensor:
    """How often a draft is asked for each id, [size]. Raises ``UserError`` for ids beyond the vocabulary."""
    counts = Counter[int]()
    for row in rows:
        counts.update(row.response_ids[1:])
    if (highest := max(counts, default=0)) >= size:
        raise UserError(
            f"the responses hold token id {highest}, the draft knows a vocabulary of {size}; "
            "give responses of this draft's own target"
        )
    found = torch.zeros(size, dtype=torch.long)
    found[list(counts)] = torch.tensor(list(counts.values()), dtype=torch.long)
    return found


@dataclass(frozen=True)
class Coverage:
    """What share of a text a draft vocabulary can say, and what that allows.

    ``share`` caps alpha. ``positions[j]`` is the share of rounds whose first j + 1 tokens can all be said, among
    anchors with so many tokens left (None where there is none): the cap on the unconditional acceptance of position j
    of a chain. ``tau_cap`` is the tau of a chain of ``gamma`` that is right wherever it can be, ``tau_whole`` that of
    one with every token.
    ``missing`` lists (id, count) of the tokens that cannot be said, most frequent first.
    """

    size: int
    tokens: int
    share: float
    positions: tuple[float | None, ...]
    gamma: int
    tau_cap: float
    tau_whole: float
    missing: tuple[tuple[int, int], ...]

    def to_dict(self, tokenizer: Any = None, worst: int = 50) -> dict[str, Any]:
        """For JSON: the ``worst`` missing tokens, with their text where a tokenizer is given."""
        listed = [
            {"id": id, "count": count, "share": count / self.tokens}
            | ({} if tokenizer is None else {"text": tokenizer.decode([id])})
            for id, count in self.missing[:worst]
        ]
        return asdict(self) | {"positions": list(self.positions), "missing": listed, "missing_ids": len(self.missing)}


def coverage(draft: Any, rows: Sequence[Row], gamma: int = 5) -> Coverage:
    """Coverage of the draft's vocabulary on ``rows``. Raises ``UserError`` when no row has a second token."""
    member_V = _member(draft)
    used = [row for row in rows if anchors(row)]
    if not used:
        raise UserError("the responses hold no token that a draft is asked for; give longer ones")
    counts_V = token_counts(used, len(member_V))
    total, said = int(counts_V.sum()), int(counts_V[member_V].sum())
    able, asked = [0] * gamma, [0] * gamma
    rounds = whole = 0
    for row in used:
        left = list(range(anchors(row), 0, -1))
        runs = run_lengths(member_V[torch.tensor(row.response_ids[1:])].tolist(), gamma)
        for step in range(gamma):
            asked[step] += sum(many > step for many in left)
            able[step] += sum(run > step for run in runs)
        rounds += len(walk(runs))
        whole += len(walk([min(many, gamma) for many in left]))
    missing = [(id, int(counts_V[id])) for id in (counts_V * ~member_V).nonzero().flatten().tolist()]
    return Coverage(
        size=draft.config.draft_vocab_size,
        tokens=total,
        share=said / total,
        positions=tuple(n / of if of else None for n, of in zip(able, asked, strict=True)),
        gamma=gamma,
        tau_cap=total / rounds,
        tau_whole=total / whole,
        missing=tuple(sorted(missing, key=lambda pair: (-pair[1], pair[0]))),
    )


def _member(draft: Any) -> Tensor:
    """Membership [V] of the target's ids in the draft's vocabulary, on the CPU."""
    member = torch.zeros(draft.config.target_vocab_size, dtype=torch.bool)
    member[draft.vocabulary().cpu()] = True
    return member


@dataclass(frozen=True, kw_only=True)
class Refresh(StartResult):
    """What a refresh made. ``added`` and ``evicted`` are ids, most urgent first; ``rows`` made the new rows."""

    before: Coverage
    after: Coverage
    added: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()
    rows: RowMap | None = None

    @property
    def map(self) -> dict[str, Any] | None:
        """The map of new rows, for JSON."""
        return {"kind": self.rows.kind, "errors": self.rows.errors} if self.rows else None


def refresh_vocabulary(draft: Any, context: StartContext) -> Refresh:
    """A copy of ``draft`` whose vocabulary fits the context's rows (of its target) better, at the same size.

    An id leaves only for one that the text uses more often. Among ids that it uses equally, those leave first that
    general rows (text the draft must stay good at) use least, and then those with the highest numbers: byte-pair
    vocabularies number their merges from frequent to rare. Tokens that end a response always stay. The draft itself
    comes back when nothing is gained. Raises ``UserError`` for a head that carries a low-rank update.
    """
    target, rows, gamma = context.target, context.rows, context.gamma
    before = coverage(draft, rows, gamma)
    if not draft.reduced:
        note = "vocabulary: the draft has the whole of it already"
        return Refresh(draft, notes=(note,), before=before, after=before)
    old_D = draft.vocabulary().cpu()
    added, evicted = choose_swaps(_member(draft), rows, context.general_rows, target.eos_ids)
    if not added:
        note = (
            f"vocabulary: no swap of tokens covers more than the present {before.share:.2%}; the draft stays as it is"
        )
        return Refresh(draft, notes=(note,), before=before, after=before)
    if getattr(draft.lm_head, "low_rank", None) is not None:
        raise UserError("a refresh replaces rows of lm_head, which carries a low-rank update; merge the draft first")
    head, fresh = target.head.weight, torch.tensor(sorted(added))
    norm_F = norm_weight(target.norm, target.hidden_size)
    norm_H = norm_weight(draft.before_head, draft.config.hidden_size)
    weight_DH = draft.lm_head.weight.detach()
    rows_map = fit_row_map(head[old_D.to(head.device)].double() * norm_F, weight_DH, norm_H, context.seed)
    mapped = rows_map(head[fresh.to(head.device)].double() * norm_F).to(weight_DH)
    kept_D = ~torch.isin(old_D, torch.tensor(evicted))
    ids, order = torch.cat([old_D[kept_D], fresh]).sort()
    renewed = copy.deepcopy(draft)
    with torch.no_grad():
        renewed.lm_head.weight.copy_(
            torch.cat([weight_DH[kept_D.to(weight_DH.device)], mapped])[order.to(mapped.device)]
        )
    renewed.set_vocabulary(ids.to(draft.d2t.device))
    after = coverage(renewed, rows, gamma)
    left = ", ".join(f"{kind} {error:.3f}" for kind, error in rows_map.errors.items())
    note = (
        f"vocabulary: {len(added)} of {len(old_D)} tokens replaced; coverage {before.share:.2%} -> {after.share:.2%}; "
        f"new rows through the map {rows_map.kind!r} (held-out error {left})"
    )
    return Refresh(
        renewed,
        ("lm_head.weight", "d2t", "t2d"),
        (note,),
        before=before,
        after=after,
        added=tuple(added),
        evicted=tuple(evicted),
        rows=rows_map,
    )


def choose_swaps(
    member_V: Tensor, rows: Sequence[Row], general_rows: Sequence[Row], protected: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(ids to add, ids to evict), equally many, paired: the most wanted one for the least used one, and so on."""
    counts_V, general_V = token_counts(rows, len(member_V)), token_counts(general_rows, len(member_V))
    wanted = (counts_V * ~member_V).nonzero().flatten().tolist()
    wanted.sort(key=lambda id: (-int(counts_V[id]), -int(general_V[id]), id))
    spare = sorted(set(member_V.nonzero().flatten().tolist()) - set(protected))
    spare.sort(key=lambda id: (int(counts_V[id]), int(general_V[id]), -id))
    pairs = [(new, old) for new, old in zip(wanted, spare, strict=False) if counts_V[new] > counts_V[old]]
    return [new for new, _ in pairs], [old for _, old in pairs]


def start(draft: Any, context: StartContext) -> StartResult:
    """The refresh as a start."""
    found = refresh_vocabulary(draft, context)
    shares = {"before": found.before.to_dict(worst=0), "after": found.after.to_dict(worst=0)}
    return replace(found, details={"replaced": len(found.added), **shares, "map": found.map})


STARTS.register("vocabulary")(
    Start(frozenset({"rows"}), "unused tokens of the draft swapped for those the target uses", start, False)
)
