"""GORGO: the least sum of network, queue and uncached prefill, each in milliseconds."""

from gorgo_plugin.policies.base import Policy, View
from gorgo_plugin.signals.columns import FloatArray


class Gorgo(Policy):
    """Paper v2, eq. 3, with rates learned per replica instead of one token price for all."""

    name = "gorgo"
    reason = "cheapest"
    weighted = True
    # Predictions are not good to 2%, and a burst that always takes the first of equals would herd.
    tie_ms = 1.0
    tie_share = 0.02

    def scores(self, view: View) -> FloatArray:
        """Milliseconds."""
        return view.total_ms
