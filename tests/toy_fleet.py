"""A small fleet in virtual time: three first-come-first-served servers behind their round trips, without any cache."""

from __future__ import annotations

import heapq
import itertools
import random
from typing import Any

import numpy as np

from gorgo_plugin import Prompt, Router, Settings

RTT_S = {"near": 0.02, "mid": 0.15, "far": 0.3}
MS_PER_TOKEN = 0.2
OVERHEAD_MS = 10.0
DECODE_S = 0.5


def run(
    requests: int, rate_per_s: float, seed: int = 0, state: Any = None, stream: bool = True, **settings: Any
) -> tuple[Router, list[float]]:
    """Serve Poisson arrivals of unlike lengths; returns the router and every TTFT in ms, in order of arrival."""
    now, rng = 0.0, random.Random(seed)
    described = [{"name": name, "url": f"http://{name}:1"} for name in RTT_S]
    given = {
        "replicas": described,
        "rates": {"ms_per_token": MS_PER_TOKEN},
        "probe": {"stale_after_s": 1e9},
        **settings,
    }
    router = Router(Settings.model_validate(given), clock=lambda: now, state=state)
    for name, rtt_s in RTT_S.items():
        router.observe_rtt(name, rtt_s)
    free_s, order, events = dict.fromkeys(RTT_S, 0.0), itertools.count(), list[tuple[Any, ...]]()
    ttft_ms = [0.0] * requests
    arrival_s = 0.0
    for index in range(requests):
        arrival_s += rng.expovariate(rate_per_s)
        heapq.heappush(events, (arrival_s, next(order), "arrive", index, round(rng.lognormvariate(6.0, 0.9))))
    while events:
        now, _, what, index, given_ = heapq.heappop(events)
        if what == "arrive":
            tokens = np.arange(given_, dtype=np.uint32) + np.uint32(index * 100_000)
            decision = router.route(Prompt(tokens, stream=stream))
            half_s = RTT_S[decision.replica] / 2
            work_s = (OVERHEAD_MS + MS_PER_TOKEN * given_) / 1e3
            free_s[decision.replica] = max(free_s[decision.replica], now + half_s) + work_s
            first_s = free_s[decision.replica] + half_s
            ttft_ms[index] = (first_s - now) * 1e3
            heapq.heappush(events, (first_s, next(order), "first", index, decision.flight_id))
            heapq.heappush(events, (first_s + DECODE_S, next(order), "end", index, decision.flight_id))
        elif what == "first" and stream:
            router.first_token(given_)
        elif what == "end":
            router.finish(given_)
    return router, ttft_ms
