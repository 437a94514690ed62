"""The latency table: round trip, spread and age per replica."""

from __future__ import annotations

import math

import numpy as np

from gorgo_plugin.settings import ProbeSettings
from gorgo_plugin.signals.columns import FloatArray, Rows, Table

# What one stale period adds to the doubt, as a share of the round trip itself, on top of its spread.
STALE_GROWTH = 0.25
# Doubt stops growing after this many stale periods: by then failed probes have marked the replica unhealthy.
MAX_STALE_PERIODS = 8.0
# No round trip is longer: what claims to be (a clock that jumped, a suspended machine) counts as this much.
MAX_RTT_S = 60.0


class LatencyTable(Table):
    """EWMA of the round trips observed (paper v2: alpha 0.3), their mean absolute deviation, and their age."""

    def __init__(self, settings: ProbeSettings) -> None:
        super().__init__(rtt_ms=math.nan, spread_ms=0.0, at_s=-math.inf)
        self.settings = settings
        self._oldest_s: float | None = None  # when the longest unseen row was measured; None: to be looked up
        # (round trips, no doubt) as they are while none is stale; not written to, as decisions hold on to them.
        self._known_ms = np.empty(0), np.empty(0)

    def grow(self, rows: int) -> None:
        """Lengthen to `rows` rows."""
        super().grow(rows)
        self._oldest_s = None

    def reset(self, slot: int) -> None:
        """Nothing is known of one replica."""
        super().reset(slot)
        self._oldest_s = None

    def observe(self, slot: int, rtt_s: float, now_s: float) -> None:
        """Take in one measured round trip; values that are no duration are ignored."""
        if not (0.0 <= rtt_s < math.inf):
            return
        rtt, spread, at = (self._columns.cells[name] for name in ("rtt_ms", "spread_ms", "at_s"))
        sample, alpha = min(rtt_s, MAX_RTT_S) * 1000.0, self.settings.alpha
        if math.isnan(rtt[slot]):
            rtt[slot], spread[slot] = sample, sample / 2  # as TCP starts its own estimate (RFC 6298)
        else:
            spread[slot] += alpha * (abs(sample - rtt[slot]) - spread[slot])
            rtt[slot] += alpha * (sample - rtt[slot])
        at[slot] = now_s
        self._oldest_s = None

    def restore(self, slot: int, rtt_ms: float, spread_ms: float, at_s: float) -> None:
        """Take over a value that another router measured."""
        cells = self._columns.cells
        cells["rtt_ms"][slot], cells["spread_ms"][slot], cells["at_s"][slot] = rtt_ms, spread_ms, at_s
        self._oldest_s = None

    def price_ms(self, rows: Rows, now_s: float) -> tuple[FloatArray, FloatArray]:
        """(round trip, doubt) per replica, as they are now.

        A round trip that was never measured counts as the prior, so never 0 for want of knowledge, and the prior once
        more is its doubt. A stale one is doubted the more, the older it is.
        """
        stale_after_s, prior_ms = self.settings.stale_after_s, self.settings.prior_ms
        if self._oldest_s is None:
            self._oldest_s = min(self._columns.cells["at_s"], default=now_s)
            self._known_ms = self._columns["rtt_ms"].copy(), np.zeros(self._columns.rows)
        # As it mostly is: all measured, none stale. The second look is for rows whose replicas have left.
        at = self._columns["at_s"]
        if now_s - self._oldest_s <= stale_after_s or now_s - np.min(at[rows], initial=now_s) <= stale_after_s:
            rtt, none = self._known_ms
            return rtt[rows], none[rows]
        rtt, at = self._columns["rtt_ms"][rows], at[rows]
        periods = np.maximum(now_s - at, 0.0) / stale_after_s
        late = np.minimum(periods, MAX_STALE_PERIODS)
        stale = np.where(periods > 1.0, (self._columns["spread_ms"][rows] + STALE_GROWTH * rtt) * late, 0.0)
        unknown = np.isnan(rtt)
        return np.where(unknown, prior_ms, rtt), np.where(unknown, prior_ms, stale)

    def describe(self, slot: int, now_s: float) -> dict[str, float | bool | None]:
        """One replica's row as plain data."""
        rtt = self._columns.cells["rtt_ms"][slot]
        if math.isnan(rtt):
            return {"rtt_ms": None, "spread_ms": None, "age_s": None, "stale": True}
        age = max(now_s - self._columns.cells["at_s"][slot], 0.0)
        return {
            "rtt_ms": rtt,
            "spread_ms": self._columns.cells["spread_ms"][slot],
            "age_s": age,
            "stale": age > self.settings.stale_after_s,
        }
