"""Target features of stored responses: where they come from (:class:`FeatureSource`), and the store that keeps them.

For a row of P prompt and R response tokens x_0 .. x_{P+R-1} the pair (h_t, x_{t+1}) stands at position t. A draft
predicts response tokens only, and the first one comes from prefill, so there are R - 1 *anchors*
t = P - 1 .. P + R - 3. The features of a row are the taps at positions 0 .. P + R - 3 (earlier ones serve as keys) and
the target's final-norm states at t + 1 of every anchor, from which the teacher's logits follow.
"""

from redraft.features.computed import ComputedFeatures
from redraft.features.source import FeatureKeeper, FeatureProducer, FeatureSource, RowFeatures
from redraft.features.store import FeatureStore

__all__ = ["ComputedFeatures", "FeatureKeeper", "FeatureProducer", "FeatureSource", "FeatureStore", "RowFeatures"]
