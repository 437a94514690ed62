"""The prefix-cache policy of AIBrix, as the second paper ran it."""

import numpy as np

from gorgo_plugin.policies.base import Policy, View, rank_above
from gorgo_plugin.signals.columns import FloatArray

MAX_IMBALANCE = 8  # requests between the busiest and the idlest replica before balance comes first
STDDEV_FACTOR = 1.0  # how far above the mean a replica may be and still be chosen for its prefix


class PrefixCache(Policy):
    """Longest match among replicas that are not overloaded; fewest in flight when the fleet is out of balance."""

    name = "prefix-cache"
    reason = "longest-prefix"

    def scores(self, view: View) -> FloatArray:
        """Ranks, no unit."""
        running = view.in_flight
        if running.max() - running.min() > MAX_IMBALANCE:
            return running
        overloaded = running > running.mean() + STDDEV_FACTOR * running.std()
        by_prefix = rank_above(-view.cached_tokens, running)
        return by_prefix + np.where(overloaded, by_prefix.max() + 1.0, 0.0)
