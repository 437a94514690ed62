"""The first paper's central proxy."""

from gorgo_plugin.policies.base import Policy, View
from gorgo_plugin.signals.columns import FloatArray

MS_PER_TOKEN = 0.094  # v1's constant, measured on 8xA100 with Mistral-7B
RUNNING_FACTOR = 1.0  # v1's f for the proxy


class GorgoV1Proxy(Policy):
    """`latency_ms + mpt * (tokens - matched) + mpt * f * running + mpt * queued`, work in prompt tokens (v1)."""

    name = "gorgo-v1-proxy"
    reason = "cheapest"

    def scores(self, view: View) -> FloatArray:
        """Milliseconds at v1's fixed rate."""
        work = RUNNING_FACTOR * view.decoding_prompt_tokens + view.queued_prompt_tokens
        return view.network_ms + MS_PER_TOKEN * (view.uncached_tokens + work)
