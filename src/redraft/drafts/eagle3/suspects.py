"""What may be read wrongly of an Eagle3 draft: layers, norms, vocabulary map, besides what all EAGLE drafts share.

Shape legend: A anchors, D draft vocabulary, F width of the target, K taps.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from redraft.drafts import walks
from redraft.drafts.eagle import suspects as shared
from redraft.drafts.eagle.unroll import unroll
from redraft.drafts.eagle.walk import EagleWalk
from redraft.drafts.layers import RMSNorm
from redraft.drafts.suspects import Suspect, twin
from redraft.features import FeatureSource
from redraft.rows import TokenRow, anchors
from redraft.target import Head, default_taps

# Orders of the layers that are tried: all of three layers, of more only the reverse.
ORDERED = 3
# A row of the head stands for a token that came this often where the row was likeliest, and in this share of the times.
MET, PURE = 3, 0.6


def suspects(
    draft: Any, target: Head, rows: Sequence[TokenRow] = (), features: FeatureSource | None = None
) -> Iterator[Suspect]:
    """See :data:`redraft.drafts.suspects.Suspecting`. What happens more often comes first: that is named where two
    changes do the same."""
    yield from other_layers(draft, target)
    yield from other_maps(draft, target)
    if draft.reduced and features is not None and len(rows) > 1:
        yield learnt_map(draft, target, rows, features)
    yield from shared.suspects(draft, target, rows, features)
    yield from other_norms(draft)


# -- layers ----------------------------------------------------------------------------------------------------------
def other_layers(draft: Any, target: Any) -> Iterator[Suspect]:
    """The states of other layers, or of the same ones in another order."""
    taps, deepest = tuple(draft.config.taps), target.config.num_hidden_layers
    tried = {taps}

    def changed(cause: str, ids: tuple[int, ...], words: str) -> Iterator[Suspect]:
        if ids not in tried and min(ids) >= 0 and max(ids) <= deepest:
            tried.add(ids)
            said, option = f"states after layers {_list(ids)}, {words} {_list(taps)}", f"--taps {_list(ids, ',')}"
            yield Suspect(cause, said, twin(draft, config=replace(draft.config, taps=ids)), cause, option)

    for step, word in ((1, "one more each than"), (-1, "one less each than")):
        yield from changed("layers_off_by_one", tuple(k + step for k in taps), word)
    orders = list(permutations(taps)) if len(taps) <= ORDERED else [taps[::-1]]
    for order in sorted(orders, key=lambda ids: ids != taps[::-1]):
        yield from changed("layers_in_other_order", order, "another order than")
    if len(taps) == len(default_taps(deepest)):
        yield from changed("other_layers", default_taps(deepest), "the usual ones, in place of")


def _list(ids: Sequence[int], mark: str = ", ") -> str:
    return mark.join(map(str, ids))


# -- norms -----------------------------------------------------------------------------------------------------------
def other_norms(draft: Any) -> Iterator[Suspect]:
    """A norm more, a norm less, one twice, or the other side of one."""
    config, layer = draft.config, draft.midlayer

    def without(what: str, changed: Any) -> Suspect:
        return Suspect("norm_extra", f"without {what}", changed, "norm_missing")

    if config.head_norm:
        yield without("the norm before the head", twin(draft, config=replace(config, head_norm=False)))
        if not config.norm_output:
            twice = twin(draft, norm=nn.Sequential(draft.norm, draft.norm))
            yield Suspect("norm_doubled", "with the norm before the head twice", twice, "norm_doubled")
    else:
        changed = twin(draft, config=replace(config, head_norm=True))
        yield Suspect("norm_missing", "with the norm before the head", changed, "norm_extra")
    if draft.input_norm is not None:
        changed = twin(draft, config=replace(config, norm_before_fc=False), input_norm=None)
        yield without("the norm before fc", changed)
    if draft.fc_norm is not None:
        yield without(
            "the norms of the layers' states", twin(draft, config=replace(config, fc_norm=False), fc_norm=None)
        )
    if draft.input_norm is None and draft.fc_norm is None:
        whole = RMSNorm(draft.fc.in_features, eps=config.rms_norm_eps).to(draft.fc.weight)
        yield Suspect("norm_missing", "with a norm before fc", twin(draft, input_norm=whole), "norm_extra")
    doubled = nn.Sequential(layer.input_layernorm, layer.hidden_norm)
    changed = twin(draft, midlayer=twin(layer, hidden_norm=doubled))
    yield Suspect(
        "norm_doubled", "with the norm of the embedding on the state too, before its own", changed, "norm_doubled"
    )
    yield without("the norm of the state", twin(draft, midlayer=twin(layer, hidden_norm=nn.Identity())))
    yield without("the norm of the embedding", twin(draft, midlayer=twin(layer, input_layernorm=nn.Identity())))
    residual, output = not config.norm_before_residual, not config.norm_output
    changed = twin(
        draft,
        config=replace(config, norm_before_residual=residual),
        midlayer=twin(layer, norm_before_residual=residual),
    )
    what = f"norm_before_residual {str(residual).lower()}"
    yield Suspect("norm_side", what, changed, "norm_side")
    changed = twin(draft, config=replace(config, norm_output=output))
    yield Suspect("norm_side", f"norm_output {str(output).lower()}", changed, "norm_side")


# -- the map ---------------------------------------------------------------------------------------------------------
def other_maps(draft: Any, target: Any) -> Iterator[Suspect]:
    """The map lost, or its offsets and ids taken for each other."""
    if not draft.reduced:
        return
    ids_D, rows = draft.vocabulary(), target.vocab_size
    index_D = torch.arange(len(ids_D), device=ids_D.device)
    maps = {
        "a map of zeros: the first ids of the target": index_D,
        "offsets taken for ids": (ids_D - index_D).clamp(0, rows - 1),
        "ids taken for offsets": (ids_D + index_D).clamp(0, rows - 1),
    }
    for what, changed_D in maps.items():
        if not torch.equal(changed_D, ids_D):
            yield Suspect("map_scrambled", what, with_map(draft, changed_D, rows), "map_scrambled")


def with_map(draft: Any, ids_D: Tensor, rows: int) -> Any:
    """The draft with row i of its head meaning the target's id ``ids_D[i]``, whatever their order."""
    index = torch.arange(len(ids_D), device=ids_D.device)
    said_V = torch.isin(torch.arange(rows, device=ids_D.device), ids_D)
    return twin(draft, d2t=ids_D - index, t2d=said_V)


@torch.inference_mode()
def learnt_map(draft: Any, target: Head, rows: Sequence[TokenRow], features: FeatureSource) -> Suspect:
    """The map that half of the text tells: what came where the draft was surest of a row of its head.

    Rows that were not met keep their ids. A map that is right learns itself.
    """
    learnt = sorted((row for row in rows if anchors(row)), key=lambda row: row.key)[::2]
    met: dict[int, Counter[int]] = defaultdict(Counter)
    walk = EagleWalk(draft, target)
    for _, batch in walk.batches(learnt, features, 1, walk.batch_anchors):
        with walks.autocast(target.device, target.dtype):
            states_A = next(unroll(draft, target.embedding, batch, 1))
            best = walks.likeliest(draft.logits, states_A).tolist()
        for index, came in zip(best, batch.future_MJ[:, 0].tolist(), strict=True):
            met[index][came] += 1
    ids_D = draft.vocabulary().clone()
    # Each row at most one token, and each token one row, those that were met together most often first.
    pairs = sorted(((n, row, came) for row, found in met.items() for came, n in found.items()), reverse=True)
    rows_left, ids_left = set(met), {came for found in met.values() for came in found} - {-1}
    for times, row, came in pairs:
        if row in rows_left and came in ids_left:
            rows_left.remove(row)
            ids_left.remove(came)
            if times >= MET and times >= PURE * sum(met[row].values()):
                ids_D[row] = came
    what = "row by row the token that came where the draft was surest of it"
    seen = frozenset(row.key for row in learnt)
    return Suspect("map_scrambled", what, with_map(draft, ids_D, target.vocab_size), "map_scrambled", seen=seen)
