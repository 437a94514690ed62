"""How fast each replica prefills, learned from the first tokens it gave.

The model is `TTFT - RTT = overhead + ms_per_token * (uncached tokens ahead + own uncached tokens)`: engines prefill in
one first-come-first-served queue, so a token ahead costs what an own one does. The slope is the weighted median of
`(time - overhead) / tokens` over the last samples and a few that stand for the prior: half of the samples may be
outliers, and it cannot turn negative.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from gorgo_plugin.settings import RateSettings
from gorgo_plugin.signals.columns import FloatArray, SlotArray, Table

WINDOW = 64  # samples; about a minute of a busy replica, so that a drifting engine is followed
PRIOR_SAMPLES = 2  # what the prior counts against them, at the window's mean length
REFIT_EVERY = 4  # samples between fits once the window has filled a quarter
MIN_TOKENS = 64  # shorter work says nothing about the slope
MAX_OVERHEAD_MS = 1000.0  # an intercept above this is a queue that was not seen, not an engine's overhead


class RateTable(Table):
    """Per replica, for one model: fixed overhead and milliseconds per uncached token."""

    def __init__(self, prior: RateSettings) -> None:
        super().__init__(ms_per_token=prior.ms_per_token, overhead_ms=prior.overhead_ms, samples=0.0)
        self._prior = prior
        self._windows: dict[int, deque[tuple[float, float]]] = {}

    def reset(self, slot: int) -> None:
        """Back to the prior for one replica."""
        super().reset(slot)
        self._windows.pop(slot, None)

    def observe(self, slot: int, work_tokens: float, service_ms: float) -> None:
        """Take in one first token: the uncached tokens it waited for, own ones included, and TTFT - RTT."""
        if not (0.0 < service_ms < np.inf and 0.0 < work_tokens < np.inf):
            return
        window = self._windows.setdefault(slot, deque(maxlen=WINDOW))
        window.append((work_tokens, service_ms))
        seen = self._columns["samples"]
        seen[slot] += 1
        if seen[slot] <= WINDOW // 4 or seen[slot] % REFIT_EVERY == 0:
            self._fit(slot, window)

    def restore(self, slot: int, ms_per_token: float, overhead_ms: float, samples: float) -> None:
        """Take over what another router learned; it weighs like a prior until own samples come."""
        self._columns["ms_per_token"][slot] = ms_per_token
        self._columns["overhead_ms"][slot] = overhead_ms
        self._columns["samples"][slot] = samples

    def ms_per_token(self, slots: SlotArray) -> FloatArray:
        """Milliseconds per uncached prompt token."""
        return self._columns["ms_per_token"][slots]

    def overhead_ms(self, slots: SlotArray) -> FloatArray:
        """Fixed milliseconds of a first token, whatever the prompt."""
        return self._columns["overhead_ms"][slots]

    def describe(self, slot: int) -> dict[str, float]:
        """One replica's rates as plain data."""
        return {
            "ms_per_token": float(self._columns["ms_per_token"][slot]),
            "overhead_ms": float(self._columns["overhead_ms"][slot]),
            "samples": int(self._columns["samples"][slot]),
        }

    def _fit(self, slot: int, window: deque[tuple[float, float]]) -> None:
        tokens, times = np.array(window).T
        prior_tokens = np.full(PRIOR_SAMPLES, max(float(tokens.mean()), MIN_TOKENS))
        prior_times = self._prior.overhead_ms + self._prior.ms_per_token * prior_tokens
        tokens = np.concatenate([tokens, prior_tokens])
        times = np.concatenate([times, prior_times])
        overhead = float(self._columns["overhead_ms"][slot])
        long = tokens >= MIN_TOKENS
        slope = weighted_median(np.maximum(times[long] - overhead, 0.0) / tokens[long], tokens[long])
        slope = max(slope, self._prior.ms_per_token * 1e-3)  # an engine is never free
        # Short work tells the overhead best: its residual has the least of the slope's error in it.
        overhead = weighted_median(times - slope * tokens, 1.0 / (tokens + float(np.median(tokens)) / 4))
        self._columns["ms_per_token"][slot] = slope
        self._columns["overhead_ms"][slot] = min(max(overhead, 0.0), MAX_OVERHEAD_MS)


def weighted_median(values: FloatArray, weights: FloatArray) -> float:
    """The value at which half of the weight lies below. Arrays of shape (n,), n >= 1."""
    order = np.argsort(values)
    cumulated = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(cumulated, cumulated[-1] / 2)]])
