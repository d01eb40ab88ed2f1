"""The frozen target: the model behind the few calls that decoding, training and regeneration need."""

from redraft.target.cache import FixedLayer, KeyValueCache, OwnCache
from redraft.target.model import FINAL, Target, TargetStep, default_taps, new_taps

__all__ = ["FINAL", "FixedLayer", "KeyValueCache", "OwnCache", "Target", "TargetStep", "default_taps", "new_taps"]
