"""The frozen target in three parts: facts (no weights), head (all that training reads), and the model that runs.

A :class:`Target` is a :class:`Head`, and that is :class:`Facts`: what needs less is typed so, and can be opened without
the rest (:mod:`redraft.loading`).
"""

from redraft.target.cache import FixedLayer, KeyValueCache, OwnCache
from redraft.target.facts import Facts, Head
from redraft.target.model import FINAL, Target, TargetStep, default_taps, new_taps

__all__ = ["FINAL", "Facts", "Head", "Target", "TargetStep", "default_taps", "new_taps"]
__all__ += ["FixedLayer", "KeyValueCache", "OwnCache"]
