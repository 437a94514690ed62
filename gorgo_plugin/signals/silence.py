"""Which replicas have fallen silent, as far as requests that are not streamed can tell.

A streamed request that is late for its first token prices its replica out (`flights.py`). One that is not streamed
shows nothing before its end, and some answers are long. But the more requests await theirs, the sooner one of them
must end: with answers of exponential length the likelihood that none did is `exp(-waited / mean)`, `waited` being the
sum over all of them since the replica was last heard. Lengths vary more than that, so for the mean stands the
length-biased one, `E[t**2] / E[t]`: how long an answer is in whose midst one looks.
"""

from __future__ import annotations

import math

import numpy as np

from gorgo_plugin.signals.columns import FloatArray, Rows, Table

SILENT_AFTER = 5.0  # times that mean; of exponential answers 10 times their mean, a likelihood of 1 in 22,000
SLACK_S = 1.0  # of each request, as its prefill may end later than predicted
PRIOR_S = 30.0  # that mean while no answer is known, and as much of it as one answer afterwards
LEAST_S = 0.1  # of it
ALPHA = 1 / 64  # of an answer, once there are as many


class Silence(Table):
    """Requests that await a whole answer, per replica, and since when one of them is owed.

    Of a replica it keeps how many there are and since when they wait, in the mean: from the end of their prefill on, or
    from a later sign of life.
    """

    def __init__(self) -> None:
        super().__init__(awaited=0.0, since_s=0.0)
        self._answers = 0
        self._mean_s, self._mean_square = PRIOR_S / 2.0, PRIOR_S**2 / 2.0  # of answers, and of their squares
        self._quiet_until_s = math.inf  # before then no replica owes an answer

    def asked(self, slot: int, prefilled_s: float) -> None:
        """A request that is not streamed was sent; its prefill is predicted to end at `prefilled_s`."""
        cells = self._columns.cells
        awaited = cells["awaited"][slot] + 1.0
        cells["awaited"][slot] = awaited
        cells["since_s"][slot] += (prefilled_s + SLACK_S - cells["since_s"][slot]) / awaited
        self._quiet_until_s = min(self._quiet_until_s, cells["since_s"][slot] + self._patience_s / awaited)

    def ended(self, slot: int, took_s: float | None = None) -> None:
        """One ended: it was answered, `took_s` after its prefill, or ended otherwise."""
        cells = self._columns.cells
        cells["awaited"][slot] = max(cells["awaited"][slot] - 1.0, 0.0)
        if took_s is not None:
            self._answers += 1
            share, took_s = max(ALPHA, 1 / (self._answers + 1)), max(took_s, 0.0)
            self._mean_s += share * (took_s - self._mean_s)
            self._mean_square += share * (took_s**2 - self._mean_square)

    def heard(self, slot: int, now_s: float) -> None:
        """A sign of life: a first token, or an answer."""
        since = self._columns.cells["since_s"]
        since[slot] = max(since[slot], now_s)

    def late_ms(self, rows: Rows, now_s: float) -> FloatArray | None:
        """For how long each replica has owed an answer; None where none does."""
        if now_s < self._quiet_until_s:
            return None
        awaited, since_s = self._columns["awaited"], self._columns["since_s"]
        with np.errstate(divide="ignore"):
            due_s = since_s + self._patience_s / awaited
        self._quiet_until_s = float(due_s.min(initial=math.inf))
        if now_s < self._quiet_until_s:
            return None
        late_ms: FloatArray = (now_s - due_s[rows]).clip(0.0) * 1000.0
        return late_ms

    @property
    def _patience_s(self) -> float:
        """Of all who wait at a replica together."""
        return SILENT_AFTER * max(self._mean_square / max(self._mean_s, LEAST_S), LEAST_S)
