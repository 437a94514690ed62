"""How often each replica has been asked lately."""

from __future__ import annotations

import math

from gorgo_plugin.signals.columns import FloatArray, Rows, Table

# What a prefill may delay arrives while it waits and runs: seconds. Shorter, and chance would count for demand.
HORIZON_S = 10.0
TURNS_ALPHA = 1 / 256  # of a request in the share of those that have a next turn
_REBASE = 30.0  # horizons after which the counts are scaled down, long before they leave the range of a float


class Arrivals(Table):
    """Requests sent to each replica and the prefill they brought, with weights that decay by `exp(-age / HORIZON_S)`.

    The weights grow with time instead of the sums shrinking, so that reading them all takes one multiplication.

    Attributes:
        continued: share of the requests that went on with an earlier one: how likely one has a next turn.
    """

    def __init__(self) -> None:
        super().__init__(requests=0.0)
        self._base_s = 0.0
        self._prefill_ms = 0.0
        self.continued = 0.0

    def sent(self, slot: int, prefill_ms: float, now_s: float, continues: bool = False) -> None:
        """Count one request and its own prefill; `continues`: it goes on with an earlier one."""
        self.continued += TURNS_ALPHA * (continues - self.continued)
        if not 0.0 <= (now_s - self._base_s) / HORIZON_S <= _REBASE:
            self._rebase(now_s)
        weight = math.exp((now_s - self._base_s) / HORIZON_S)
        self._columns.cells["requests"][slot] += weight
        self._prefill_ms += weight * prefill_ms

    def lately(self, rows: Rows, now_s: float, share: float = 1.0) -> tuple[FloatArray, float]:
        """`share` of the requests per millisecond, per replica; and how busy all replicas are kept.

        That is milliseconds of prefill sent to all of them together per millisecond: 1.0 keeps one of them busy.
        """
        of_a_ms = self._share_of_a_ms(now_s)
        return self._columns["requests"][rows] * (share * of_a_ms), self._prefill_ms * of_a_ms

    def _share_of_a_ms(self, now_s: float) -> float:
        return math.exp(-max((now_s - self._base_s) / HORIZON_S, 0.0)) / (HORIZON_S * 1000.0)

    def _rebase(self, now_s: float) -> None:
        # A clock that jumped back makes nothing older than it is.
        scale, cells = math.exp(-max((now_s - self._base_s) / HORIZON_S, 0.0)), self._columns.cells["requests"]
        for slot in range(self._columns.rows):
            cells[slot] *= scale
        self._prefill_ms *= scale
        self._base_s = now_s
