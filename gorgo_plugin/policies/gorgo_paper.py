"""The second paper's formula as published, in token units."""

from gorgo_plugin.policies.base import Policy, View
from gorgo_plugin.signals.columns import FloatArray


class GorgoPaper(Policy):
    """`W_rtt * RTT_ms + W_queue * queued_tokens + uncached_tokens` (v2, eq. 3).

    `queued_tokens` are the prompt tokens dispatched and not completed, cached ones and decoding requests included.
    `weights: art-chat` and `weights: wildchat` are the pairs the paper learned.
    """

    name = "gorgo-paper"
    reason = "cheapest"
    weighted = True

    def scores(self, view: View) -> FloatArray:
        """Token equivalents."""
        w_rtt, w_queue = view.weights
        queued = view.queued_prompt_tokens + view.decoding_prompt_tokens
        return w_rtt * view.network_ms + w_queue * queued + view.uncached_tokens
