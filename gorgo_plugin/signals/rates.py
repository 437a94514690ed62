"""How fast each replica prefills, learned from the first tokens it gave.

The model is `TTFT - RTT = overhead + ms_per_token * (work ahead + own work)`, the work of a prompt in tokens:
`u + k * (u * c + u**2 / 2)` for `u` uncached tokens behind `c` cached ones. Engines prefill in one
first-come-first-served queue, so work ahead costs what own work does; `k` is what a pair of tokens that attends adds,
and 0 until the data shows it.

For every `k` on a ladder the slope is the weighted median of `(time - overhead) / work` over the last samples and the
prior: half of the evidence may be outliers, and it cannot turn negative. A short prompt is little evidence of the
slope, a long one little of the overhead, an old one little of either; they are weighed so. The `k` is that of the least
relative error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.settings import RateSettings
from gorgo_plugin.signals.columns import FloatArray, Number, Rows, Table

WINDOW = 64  # samples; about a minute of a busy replica, so that a drifting engine is followed
REFIT_EVERY = 8  # samples between fits, after one for each of the first
REFIT_PAUSE_S = 0.25  # at least between them: a busy replica has many samples a second, and its rates last longer
FIRST_FITS = 4
REFIT_AFTER_S = 60.0  # and without samples, as what is known grows old
HALF_LIFE_S = 300.0  # of evidence: a replica that is not asked any more is not believed slow for ever
FULL_TOKENS = 4096.0  # work from here on is full evidence of the slope; more must not drown the other samples
SLOPE_PRIOR_TOKENS = 2 * FULL_TOKENS  # the prior's weight against them: two long prompts
SHORT_TOKENS = 256.0  # at this length a sample is half the evidence of the overhead that an empty one would be
OVERHEAD_PRIOR_SAMPLES = 3.0  # the prior's weight against the short ones
COLD_SAMPLES = 1  # the first answer of a replica pays for connections and warm-up
RESTORED_SAMPLES = 8  # that what another router had learned counts for
# Tokens' worth of a pair that attends: measured are 2e-5 on GPUs and 1e-3 on one CPU core.
PAIR_LADDER = np.array([0.0, *(1e-5 * 2.0 ** np.arange(9))])
# What another rung must leave of the error, and of how many samples: noise looks like attention, too.
CLEARLY_LESS = 0.93
PAIR_SAMPLES = WINDOW // 4


class Sample(NamedTuple):
    """One first token: what it waited for, and how long.

    Attributes:
        ahead_tokens: work before it in the replica's queue.
        own_tokens: its own uncached tokens.
        own_pairs: `u * c + u**2 / 2`, the token pairs that attend in its prefill.
        ms: TTFT - RTT.
        at_s: when it was seen.
    """

    ahead_tokens: float
    own_tokens: float
    own_pairs: float
    ms: float
    at_s: float


def token_pairs(prompt_tokens: float, uncached_tokens: Number) -> Number:
    """`u * c + u**2 / 2`: the pairs that attend while `u` of a prompt's tokens are computed behind the others."""
    return uncached_tokens * (prompt_tokens - uncached_tokens / 2.0)


class RateTable(Table):
    """Per replica, for one model: fixed overhead, milliseconds per token of work, and what a token pair adds to it.

    Attributes:
        curved: of some replica a pair is known to add something.
    """

    def __init__(self, prior: RateSettings) -> None:
        super().__init__(
            ms_per_token=prior.ms_per_token,
            overhead_ms=prior.overhead_ms,
            tokens_per_pair=0.0,
            samples=0.0,
            next_fit_s=np.inf,
        )
        self.prior = prior
        self.curved = False
        self._windows: dict[int, NDArray[np.float64]] = {}  # rows are samples, the oldest is written over

    def reset(self, slot: int) -> None:
        """Back to the prior for one replica."""
        super().reset(slot)
        self._windows.pop(slot, None)

    def observe(self, slot: int, sample: Sample) -> None:
        """Take in one first token; what is no time or no work is ignored."""
        if not (0.0 < sample.ms < np.inf and 0.0 < sample.ahead_tokens + sample.own_tokens < np.inf):
            return
        seen = self._columns.cells["samples"]
        seen[slot] += 1
        if seen[slot] <= COLD_SAMPLES:
            return
        number = int(seen[slot]) - COLD_SAMPLES - 1
        self._window(slot)[number % WINDOW] = sample
        if number < FIRST_FITS or (number % REFIT_EVERY == 0 and not self._fitted_lately(slot, sample.at_s)):
            self._fit(slot, sample.at_s)

    @property
    def known(self) -> bool:
        """Whether a replica has given a sample."""
        return any(self._columns.cells["samples"])

    def refit_old(self, now_s: float) -> None:
        """Fit again what was last fitted a while ago, as its evidence has aged since."""
        for slot, due_s in enumerate(self._columns.cells["next_fit_s"]):
            if due_s <= now_s:
                self._fit(slot, now_s)

    def restore(self, slot: int, known: Mapping[str, Any], now_s: float) -> None:
        """Take over what another table's `describe` tells, as if some samples had shown it."""
        cells = self._columns.cells
        for name in ("ms_per_token", "overhead_ms", "tokens_per_pair"):
            cells[name][slot] = float(known[name])
        if not known["samples"]:
            return
        cells["samples"][slot] = COLD_SAMPLES + RESTORED_SAMPLES
        slope, overhead = cells["ms_per_token"][slot], cells["overhead_ms"][slot]
        window = self._window(slot)
        for number in range(RESTORED_SAMPLES):
            tokens = FULL_TOKENS * (number % 2)  # one of the slope, one of the overhead
            pairs = token_pairs(tokens, tokens)
            work = tokens + cells["tokens_per_pair"][slot] * pairs
            window[number] = Sample(0.0, tokens, pairs, overhead + slope * work, now_s)
        self.curved = bool(self._columns["tokens_per_pair"].any())
        cells["next_fit_s"][slot] = now_s + REFIT_AFTER_S

    def ms_per_token(self, rows: Rows) -> FloatArray:
        """Milliseconds per token of work."""
        return self._columns["ms_per_token"][rows]

    def overhead_ms(self, rows: Rows) -> FloatArray:
        """Fixed milliseconds of a first token, whatever the prompt."""
        return self._columns["overhead_ms"][rows]

    def work_tokens(self, rows: Rows, prompt_tokens: float, uncached_tokens: FloatArray) -> FloatArray:
        """The work of a prompt, in tokens, per replica."""
        if not self.curved:
            return uncached_tokens
        return uncached_tokens + self._columns["tokens_per_pair"][rows] * token_pairs(prompt_tokens, uncached_tokens)

    def slot_work_tokens(self, slot: int, prompt_tokens: float, uncached_tokens: float) -> float:
        """The same at one replica."""
        per_pair = self._columns.cells["tokens_per_pair"][slot]
        return uncached_tokens + per_pair * token_pairs(prompt_tokens, uncached_tokens)

    def slot_ms_per_token(self, slot: int) -> float:
        """Milliseconds per token of work of one replica."""
        return self._columns.cells["ms_per_token"][slot]

    def describe(self, slot: int) -> dict[str, float]:
        """One replica's rates as plain data."""
        cells = self._columns.cells
        return {
            "ms_per_token": cells["ms_per_token"][slot],
            "overhead_ms": cells["overhead_ms"][slot],
            "tokens_per_pair": cells["tokens_per_pair"][slot],
            "samples": int(cells["samples"][slot]),
        }

    def _fitted_lately(self, slot: int, now_s: float) -> bool:
        fitted_s = self._columns.cells["next_fit_s"][slot] - REFIT_AFTER_S
        return 0.0 <= now_s - fitted_s < REFIT_PAUSE_S

    def _window(self, slot: int) -> NDArray[np.float64]:
        if slot not in self._windows:
            self._windows[slot] = np.full((WINDOW, len(Sample._fields)), np.nan)
        return self._windows[slot]

    def _fit(self, slot: int, now_s: float) -> None:
        prior, cells, seen = self.prior, self._columns.cells, int(self._columns.cells["samples"][slot]) - COLD_SAMPLES
        ahead, own, pairs, ms, at_s = self._windows[slot][: min(seen, WINDOW)].T
        fresh = np.exp2(np.minimum(at_s - now_s, 0.0) / HALF_LIFE_S)
        tokens = ahead + own
        rung = int(np.abs(PAIR_LADDER - cells["tokens_per_pair"][slot]).argmin())
        # A column for each rung; before there are samples enough to choose one, for that of now alone.
        rungs = PAIR_LADDER if seen >= PAIR_SAMPLES else PAIR_LADDER[rung : rung + 1]
        work = tokens[:, None] + rungs * pairs[:, None]
        slopes = np.maximum(
            weighted_medians(
                np.maximum(ms - cells["overhead_ms"][slot], 0.0)[:, None] / np.maximum(work, 1.0),
                fresh * np.minimum(tokens, FULL_TOKENS),
                prior.ms_per_token,
                SLOPE_PRIOR_TOKENS,
            ),
            prior.ms_per_token * 1e-2,  # an engine is never free
        )
        spent_ms = slopes * work
        overheads = weighted_medians(
            ms[:, None] - spent_ms,
            fresh * (SHORT_TOKENS / (SHORT_TOKENS + tokens)),
            prior.overhead_ms,
            OVERHEAD_PRIOR_SAMPLES,
        )
        # The fixed part of an answer cannot be longer than the fastest answer was.
        overheads = np.clip(overheads, 0.0, ms.min())
        chosen = 0
        if len(rungs) > 1:
            errors = fresh @ np.minimum(np.abs(spent_ms + overheads - ms[:, None]) / ms[:, None], 1.0)
            best = int(errors.argmin())
            chosen = best if errors[best] < CLEARLY_LESS * errors[rung] else rung
        cells["ms_per_token"][slot] = slopes[chosen]
        cells["overhead_ms"][slot] = overheads[chosen]
        cells["tokens_per_pair"][slot] = rungs[chosen]
        cells["next_fit_s"][slot] = now_s + REFIT_AFTER_S
        self.curved = bool(self._columns["tokens_per_pair"].any())


def weighted_medians(values: FloatArray, weights: FloatArray, prior: float, prior_weight: float) -> FloatArray:
    """Per column the value at which half of the weight lies below, shape (columns,).

    Args:
        values: shape (samples, columns).
        weights: shape (samples,).
        prior: one more value of every column.
        prior_weight: its weight.
    """
    values = np.vstack([values, np.full(values.shape[1], prior)])
    weights = np.append(weights, prior_weight)
    order = values.argsort(axis=0)
    below = weights[order].cumsum(axis=0)
    rows = (below >= below[-1] / 2.0).argmax(axis=0)
    columns = np.arange(values.shape[1])
    found: FloatArray = values[order[rows, columns], columns]
    return found
