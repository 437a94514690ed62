"""Least load as in the papers: knows engine gauges, no prefixes, no network."""

from gorgo_plugin.policies.base import Policy, View
from gorgo_plugin.signals.columns import FloatArray


class LeastLoad(Policy):
    """`queued + running + waiting + used KV tokens` (v2), the last three as the engine's gauges say."""

    name = "least-load"
    reason = "least-loaded"
    reads_gauges = True

    def scores(self, view: View) -> FloatArray:
        """Requests plus tokens, as published; own counts stand in for an engine never read."""
        running = view.gauge_or("running", view.decoding)
        waiting = view.gauge_or("waiting", view.waiting * 0.0)
        used = view.gauge_or("used_tokens", view.decoding_prompt_tokens)
        return view.waiting + running + waiting + used
