"""Percentiles of a run, and ratios of two runs with what is uncertain about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.fleet.loadgen import Outcome

RESAMPLES = 4000  # the interval's own noise is then about a hundredth of its width
_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run's figures; times in milliseconds, NaN when no request succeeded."""

    requests: int
    errors: int
    ttft_p50_ms: float
    ttft_p95_ms: float
    ttft_p99_ms: float
    e2e_p50_ms: float
    e2e_p95_ms: float
    cached_share: float
    by_replica: Mapping[str, int]
    late_p99_ms: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """A quotient and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "below" or "above" 1 with 95% confidence, else "open"."""
        if self.high < 1:
            return "below"
        return "above" if self.low > 1 else "open"


def summarise_run(outcomes: Sequence[Outcome]) -> RunSummary:
    """Figures of one run."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    ttft = _percentiles([outcome.ttft_ms for outcome in good], (50, 95, 99))
    e2e = _percentiles([outcome.e2e_ms for outcome in good], (50, 95))
    prompt_tokens = sum(outcome.prompt_tokens for outcome in good)
    return RunSummary(
        requests=len(outcomes),
        errors=len(outcomes) - len(good),
        ttft_p50_ms=ttft[0],
        ttft_p95_ms=ttft[1],
        ttft_p99_ms=ttft[2],
        e2e_p50_ms=e2e[0],
        e2e_p95_ms=e2e[1],
        cached_share=sum(outcome.cached_tokens for outcome in good) / prompt_tokens if prompt_tokens else 0.0,
        by_replica=dict(sorted(Counter(outcome.replica for outcome in good).items())),
        late_p99_ms=_percentiles([outcome.late_ms for outcome in outcomes], (99,))[0],
    )


def _percentiles(values: Sequence[float | None], ranks: Sequence[float]) -> list[float]:
    known = [value for value in values if value is not None]
    if not known:
        return [float("nan")] * len(ranks)
    return [float(value) for value in np.percentile(known, ranks)]


def ttft_ratio(ours: Sequence[Outcome], theirs: Sequence[Outcome], percentile: float, seed: int = 0) -> Ratio | None:
    """The TTFT percentile of one run over that of another that served the same requests.

    The interval is a bootstrap over requests, paired: a request drawn is drawn in both runs, so what makes a request
    slow in either does not widen the interval. Requests that failed in one of the runs are left out of both.
    None when none is left.
    """
    pairs = [
        (own.ttft_ms, other.ttft_ms)
        for own, other in zip(ours, theirs, strict=True)
        if own.ttft_ms is not None and other.ttft_ms is not None
    ]
    if not pairs:
        return None
    own_ms, other_ms = zip(*pairs, strict=True)
    return percentile_ratio(own_ms, other_ms, percentile, seed)


def percentile_ratio(own: Sequence[float], other: Sequence[float], percentile: float, seed: int = 0) -> Ratio:
    """The percentile of one run over that of another of as many values, with a bootstrap interval over the pairs."""
    both: NDArray[np.float64] = np.array([own, other], dtype=np.float64)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, both.shape[1], (RESAMPLES, both.shape[1]))
    own_drawn, other_drawn = (np.percentile(run[drawn], percentile, axis=1) for run in both)
    low, high = np.percentile(own_drawn / other_drawn, _INTERVAL)
    value = np.percentile(both[0], percentile) / np.percentile(both[1], percentile)
    return Ratio(float(value), float(low), float(high))


def median_ratio(ratios: NDArray[np.float64], seed: int = 0) -> Ratio:
    """The median of ratios measured pair by pair, shape (n,), with a bootstrap interval over the pairs."""
    drawn = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), _INTERVAL)
    return Ratio(float(np.median(ratios)), float(low), float(high))


def ratio_over_seeds(own: Sequence[float], other: Sequence[float], seed: int = 0) -> Ratio:
    """The geometric mean of a figure of one system over that of another, of as many runs with the same seeds.

    The interval is a bootstrap over the seeds, paired; NaN where there is only one.
    """
    logs = np.log(np.array(own, dtype=np.float64) / np.array(other, dtype=np.float64))
    value = float(np.exp(logs.mean()))
    if len(logs) == 1:
        return Ratio(value, float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).integers(0, len(logs), (RESAMPLES, len(logs)))
    low, high = np.exp(np.percentile(logs[drawn].mean(axis=1), _INTERVAL))
    return Ratio(value, float(low), float(high))
