"""How fast each replica decodes, learned from the answers it gave.

The model is `ITL = base + per_request * n`, in milliseconds, for `n` requests that decode there: every one of them gets
a token in every step, and each makes the step a little longer. Fitted by least squares over the last answers, the older
ones fading; neither part can turn negative. A replica that has not answered yet counts as the fastest that is known, so
that it is tried, and so, after a while, does one that is not asked any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gorgo_plugin.signals.columns import FloatArray, Rows, Table

ALPHA = 1 / 64  # of an answer, once there are as many
FEWEST_TOKENS = 4  # an answer of fewer says little of the time between them
SURE_SAMPLES = 3  # from here on an answer that is far off is an outlier
FAR_OFF = 3.0  # times, either way
LEAST_VARIANCE = 4.0  # of `n`: with little variation all of the time is taken for the base
HALF_LIFE_S = 300.0  # of what a replica is known to take longer than the fastest
ITL_BOUND_MS = 60_000.0


class DecodeTable(Table):
    """Per replica, for one model: milliseconds between tokens, and what each request that decodes adds to them.

    Attributes:
        output_tokens: mean length of an answer; 0.0 while none is known, as is then everything else.
    """

    def __init__(self) -> None:
        super().__init__(
            base_ms=0.0,
            per_request_ms=0.0,
            samples=0.0,
            decoding=0.0,  # means over the last answers
            itl_ms=0.0,
            variance=0.0,
            covariance=0.0,
            at_s=0.0,
        )
        self.output_tokens = 0.0
        self._answers = 0

    def observe(self, slot: int, decoding: float, first_token_s: float, ended_s: float, output_tokens: int) -> None:
        """Take in one answer, of `output_tokens`, beside which `decoding` requests decoded, itself included."""
        self._answers += 1
        self.output_tokens += (output_tokens - self.output_tokens) * max(ALPHA, 1 / self._answers)
        if output_tokens < FEWEST_TOKENS:
            return
        itl_ms = (ended_s - first_token_s) * 1000.0 / (output_tokens - 1)
        if not 0.0 < itl_ms < ITL_BOUND_MS:
            return
        cells = self._columns.cells
        known, mean_n, mean_ms = cells["samples"][slot], cells["decoding"][slot], cells["itl_ms"][slot]
        if known >= SURE_SAMPLES:
            itl_ms = min(max(itl_ms, mean_ms / FAR_OFF), mean_ms * FAR_OFF)
        share = max(ALPHA, 1 / (known + 1))
        off_n, off_ms = decoding - mean_n, itl_ms - mean_ms
        cells["samples"][slot] = known + 1
        cells["decoding"][slot] = mean_n + share * off_n
        cells["itl_ms"][slot] = mean_ms + share * off_ms
        cells["variance"][slot] = (1 - share) * (cells["variance"][slot] + share * off_n * off_n)
        cells["covariance"][slot] = (1 - share) * (cells["covariance"][slot] + share * off_n * off_ms)
        cells["at_s"][slot] = ended_s
        self._fit(slot)
        if not known:
            self.refresh(ended_s)

    def refresh(self, now_s: float) -> None:
        """Let what is known of those that are not asked fade; those that never were count as the fastest."""
        cells = self._columns.cells
        known = [slot for slot, samples in enumerate(cells["samples"]) if samples]
        if not known:
            return
        fastest = min(known, key=lambda slot: cells["itl_ms"][slot])
        self._fit(fastest)
        for slot in range(self._columns.rows):
            if cells["samples"][slot]:
                self._fit(slot)
                age_s = max(now_s - cells["at_s"][slot], 0.0)
                left = 2.0 ** -(age_s / HALF_LIFE_S)
            else:
                left = 0.0
            for name in ("base_ms", "per_request_ms"):
                least = cells[name][fastest]
                cells[name][slot] = least + (cells[name][slot] - least) * left

    def restore(self, slot: int, known: Mapping[str, Any], now_s: float) -> None:
        """Take over what another table's `describe` tells, as if some answers had shown it."""
        if not known["itl_samples"]:
            return
        cells, slope_ms = self._columns.cells, float(known["itl_per_request_ms"])
        cells["samples"][slot], cells["at_s"][slot] = SURE_SAMPLES, now_s
        cells["decoding"][slot], cells["itl_ms"][slot] = 1.0, float(known["itl_ms"]) + slope_ms
        cells["variance"][slot], cells["covariance"][slot] = LEAST_VARIANCE, 2.0 * LEAST_VARIANCE * slope_ms
        self._fit(slot)

    def base_ms(self, rows: Rows) -> FloatArray:
        """Milliseconds between tokens, but for what those that decode add to it."""
        return self._columns["base_ms"][rows]

    def per_request_ms(self, rows: Rows) -> FloatArray:
        """What each request that decodes adds."""
        return self._columns["per_request_ms"][rows]

    def describe(self, slot: int) -> dict[str, float]:
        """One replica's figures as plain data."""
        cells = self._columns.cells
        return {
            "itl_ms": cells["base_ms"][slot],
            "itl_per_request_ms": cells["per_request_ms"][slot],
            "itl_samples": int(cells["samples"][slot]),
        }

    def _fit(self, slot: int) -> None:
        cells = self._columns.cells
        mean_n, mean_ms = cells["decoding"][slot], cells["itl_ms"][slot]
        slope = cells["covariance"][slot] / (cells["variance"][slot] + LEAST_VARIANCE)
        slope = min(max(slope, 0.0), mean_ms / max(mean_n, 1.0))
        cells["per_request_ms"][slot], cells["base_ms"][slot] = slope, max(mean_ms - slope * mean_n, 0.0)
