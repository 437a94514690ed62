"""The first paper's balancers, one in each region."""

import numpy as np

from gorgo_plugin.policies.base import Policy, View
from gorgo_plugin.policies.gorgo_v1_proxy import MS_PER_TOKEN
from gorgo_plugin.signals.columns import FloatArray

RUNNING_FACTOR = 0.5  # v1's f for the balancers
MAX_LOCAL_RUNNING = 5  # requests; below it nothing is sent elsewhere
LOCAL_MS = 5.0  # replicas no further than this behind the nearest are in the balancer's own region
TIE_MS = 1e-6  # the peers' gauges decide only between equal costs


class GorgoV1Distributed(Policy):
    """Local while local running < 5, else local `mpt * (f * running + queued + unmatched)` against each peer's
    `latency_ms + mpt * unmatched` (v1).

    The nearest candidates are the local ones, of which the cheapest counts. Work is in prompt tokens. Of the peers
    only the engines' gauges and what was sent there are known.
    """

    name = "gorgo-v1-distributed"
    reason = "cheapest"
    reads_gauges = True

    def scores(self, view: View) -> FloatArray:
        """Milliseconds at v1's fixed rate; negative where local ones have room."""
        local = view.network_ms <= view.network_ms.min() + LOCAL_MS
        work = RUNNING_FACTOR * view.decoding_prompt_tokens + view.queued_prompt_tokens + view.uncached_tokens
        told = view.gauge_or("running", view.decoding) + view.gauge_or("waiting", view.waiting)
        forwarded = view.network_ms + MS_PER_TOKEN * view.uncached_tokens + TIE_MS * told
        costs = np.where(local, MS_PER_TOKEN * work, forwarded)
        if (view.in_flight[local] < MAX_LOCAL_RUNNING).any():
            costs[local] -= costs.max() + 1.0
        return costs
