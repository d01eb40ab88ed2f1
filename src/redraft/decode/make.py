"""The decoder that goes with a shape, a draft and a target."""

from __future__ import annotations

from redraft.decode.engine import ChainDecoder, SpeculativeDecoder
from redraft.decode.static import StaticChainDecoder, StaticTarget
from redraft.decode.tree_engine import TreeDecoder
from redraft.drafts.base import Draft
from redraft.errors import UserError
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape, Shape
from redraft.target import Target


def make_decoder(
    target: Target,
    draft: Draft,
    shape: Shape,
    sampler: Sampler | None = None,
    greedy_drafts: bool = False,
    measure_overlap: bool = False,
) -> SpeculativeDecoder:
    """The decoder of a shape: a chain's or a tree's, with static shapes where the target has them.

    Raises ``UserError`` when the draft does not fit the target, for a dynamic tree of sampled drafts, for a tree of
    a family that grows none, and for ``measure_overlap`` on a tree: alpha is defined on a chain.
    """
    if isinstance(shape, ChainShape) and isinstance(target, StaticTarget) and not measure_overlap:
        return StaticChainDecoder(target, draft, shape.gamma, sampler, greedy_drafts, target.smallest)
    if isinstance(shape, ChainShape):
        return ChainDecoder(target, draft, shape.gamma, sampler, measure_overlap, greedy_drafts)
    if measure_overlap:
        raise UserError(f"alpha is measured along a chain, not on a {shape.describe()}; measure it with chain:5")
    return TreeDecoder(target, draft, shape, sampler, greedy_drafts)
