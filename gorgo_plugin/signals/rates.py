"""How fast each replica prefills, learned from the first tokens it gave.

The model is `TTFT - RTT = overhead + ms_per_token * (uncached tokens ahead + own uncached tokens)`: engines prefill in
one first-come-first-served queue, so a token ahead costs what an own one does. The slope is the weighted median of
`(time - overhead) / tokens` over the last samples and the prior: half of the evidence may be outliers, and it cannot
turn negative. A short prompt is little evidence of the slope, a long one little of the overhead; they are weighed so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from gorgo_plugin.settings import RateSettings
from gorgo_plugin.signals.columns import FloatArray, Rows, Table

WINDOW = 64  # samples; about a minute of a busy replica, so that a drifting engine is followed
REFIT_EVERY = 8  # samples between fits once the window has filled a quarter
FULL_TOKENS = 4096.0  # work from here on is full evidence of the slope; more must not drown the other samples
SLOPE_PRIOR_TOKENS = 2 * FULL_TOKENS  # the prior's weight against them: two long prompts
SHORT_TOKENS = 256.0  # at this length a sample is half the evidence of the overhead that an empty one would be
OVERHEAD_PRIOR_SAMPLES = 3.0  # the prior's weight against the short ones
COLD_SAMPLES = 1  # the first answer of a replica pays for connections and warm-up


class RateTable(Table):
    """Per replica, for one model: fixed overhead and milliseconds per uncached token."""

    def __init__(self, prior: RateSettings) -> None:
        super().__init__(ms_per_token=prior.ms_per_token, overhead_ms=prior.overhead_ms, samples=0.0)
        self.prior = prior
        self._windows: dict[int, deque[tuple[float, float]]] = {}

    def reset(self, slot: int) -> None:
        """Back to the prior for one replica."""
        super().reset(slot)
        self._windows.pop(slot, None)

    def observe(self, slot: int, work_tokens: float, service_ms: float) -> None:
        """Take in one first token: the uncached tokens it waited for, own ones included, and TTFT - RTT."""
        if not (0.0 < service_ms < np.inf and 0.0 < work_tokens < np.inf):
            return
        seen = self._columns.cells["samples"]
        seen[slot] += 1
        if seen[slot] <= COLD_SAMPLES:
            return
        window = self._windows.setdefault(slot, deque(maxlen=WINDOW))
        window.append((work_tokens, service_ms))
        if len(window) <= WINDOW // 4 or seen[slot] % REFIT_EVERY == 0:
            self._fit(slot, window)

    def restore(self, slot: int, known: Mapping[str, Any]) -> None:
        """Take over what another table's `describe` tells; it weighs like a prior until own samples come."""
        cells = self._columns.cells
        for name in ("ms_per_token", "overhead_ms", "samples"):
            cells[name][slot] = float(known[name])

    def ms_per_token(self, rows: Rows) -> FloatArray:
        """Milliseconds per uncached prompt token."""
        return self._columns["ms_per_token"][rows]

    def overhead_ms(self, rows: Rows) -> FloatArray:
        """Fixed milliseconds of a first token, whatever the prompt."""
        return self._columns["overhead_ms"][rows]

    def slot_ms_per_token(self, slot: int) -> float:
        """Milliseconds per uncached prompt token of one replica."""
        return self._columns.cells["ms_per_token"][slot]

    def describe(self, slot: int) -> dict[str, float]:
        """One replica's rates as plain data."""
        return {
            "ms_per_token": self._columns.cells["ms_per_token"][slot],
            "overhead_ms": self._columns.cells["overhead_ms"][slot],
            "samples": int(self._columns.cells["samples"][slot]),
        }

    def _fit(self, slot: int, window: Sequence[tuple[float, float]]) -> None:
        # Plain Python: with so few samples the dozen array operations of a fit would take four times as long.
        prior, cells = self.prior, self._columns.cells
        known = cells["overhead_ms"][slot]
        slope = weighted_median(
            [
                (prior.ms_per_token, SLOPE_PRIOR_TOKENS),
                *((max(ms - known, 0.0) / tokens, min(tokens, FULL_TOKENS)) for tokens, ms in window),
            ]
        )
        cells["ms_per_token"][slot] = slope = max(slope, prior.ms_per_token * 1e-2)  # an engine is never free
        overhead = weighted_median(
            [
                (prior.overhead_ms, OVERHEAD_PRIOR_SAMPLES),
                *((ms - slope * tokens, SHORT_TOKENS / (SHORT_TOKENS + tokens)) for tokens, ms in window),
            ]
        )
        # The fixed part of an answer cannot be longer than the fastest answer was.
        cells["overhead_ms"][slot] = min(max(overhead, 0.0), min(ms for _, ms in window))


def weighted_median(weighted: Iterable[tuple[float, float]]) -> float:
    """The value at which half of the weight lies below, of at least one (value, weight)."""
    ordered = sorted(weighted)
    cumulated = list(accumulate(weight for _, weight in ordered))
    return next(value for (value, _), below in zip(ordered, cumulated, strict=True) if below >= cumulated[-1] / 2)
