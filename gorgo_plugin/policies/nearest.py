"""The smallest round trip."""

from gorgo_plugin.policies.base import Policy, View
from gorgo_plugin.signals.columns import FloatArray


class Nearest(Policy):
    """The replica with the smallest round trip, doubt included."""

    name = "nearest"
    reason = "nearest"

    def scores(self, view: View) -> FloatArray:
        """Milliseconds."""
        return view.network_ms + view.doubt_ms
