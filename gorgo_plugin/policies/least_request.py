"""Fewest requests in flight."""

from gorgo_plugin.policies.base import Policy, View
from gorgo_plugin.signals.columns import FloatArray


class LeastRequest(Policy):
    """The replica with the fewest open flights of this router."""

    name = "least-request"
    reason = "fewest-in-flight"

    def scores(self, view: View) -> FloatArray:
        """Requests."""
        return view.in_flight
