"""Longest cached prefix, whatever else (v1's baseline)."""

from gorgo_plugin.policies.base import Policy, View, rank_above
from gorgo_plugin.signals.columns import FloatArray


class PrefixSimilarity(Policy):
    """The longest cached prefix wins; least load (running + waiting) where there is none, and among equals."""

    name = "prefix-similarity"
    reason = "longest-prefix"
    reads_gauges = True

    def scores(self, view: View) -> FloatArray:
        """Ranks, no unit."""
        load = view.gauge_or("running", view.decoding) + view.gauge_or("waiting", view.waiting)
        return rank_above(-view.cached_tokens, load)
