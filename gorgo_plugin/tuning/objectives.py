"""What a trial is judged by: a percentile of TTFT or E2E, and whether two sets of requests differ in it.

The percentile of a hundred samples is known to some 15%, too little to choose by. So the choice is made by a rank test
that weighs the tail around it (as Gastwirth's percentile-modified scores, 1965): it uses four times the samples that
lie beyond the percentile, no outlier dominates it, and a request that failed simply ranks last. How large a difference
is, the percentiles say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np

from gorgo_plugin.signals.columns import FloatArray

TAIL = 4.0  # scores begin where this many times as many samples lie beyond as lie beyond the percentile


@dataclass(frozen=True, slots=True)
class Objective:
    """A percentile, from 0 to 1, of what is seen of requests."""

    metric: Literal["ttft", "e2e"]
    quantile: float


OBJECTIVES = {
    "ttft-p50": Objective("ttft", 0.50),
    "ttft-p95": Objective("ttft", 0.95),
    "ttft-p99": Objective("ttft", 0.99),
    "e2e-p95": Objective("e2e", 0.95),
}
GUARDED = OBJECTIVES["e2e-p95"]


class Comparison(NamedTuple):
    """A candidate against the incumbent at one objective.

    Attributes:
        incumbent_ms, candidate_ms: the percentile that each would have if it routed every request.
        z: standard errors by which the candidate's requests lie further in the tail; below 0 it is better.
        samples: requests of each on which they differed, of the one that has fewer.
    """

    incumbent_ms: float
    candidate_ms: float
    z: float
    samples: int

    @property
    def log_ratio(self) -> float:
        """ln(candidate / incumbent). Where so many requests fail that both are infinite, the ranks decide: 0 or inf."""
        if self.candidate_ms == math.inf:
            return 0.0 if self.incumbent_ms == math.inf and self.z <= 0.0 else math.inf
        if self.incumbent_ms == math.inf or self.candidate_ms <= 0.0:
            return -math.inf
        return math.log(self.candidate_ms / self.incumbent_ms) if self.incumbent_ms > 0.0 else math.inf


def compare(
    common_ms: Sequence[float],
    incumbent_ms: Sequence[float],
    candidate_ms: Sequence[float],
    quantile: float,
    share: float,
) -> Comparison:
    """Compare two ways to route by requests on which they agree, and those on which a coin decided between them.

    What they agree on is the same whoever routes and would only add noise: the test looks at the others, ranked among
    all. In the percentiles each of these stands also for those that the coin gave to the other side.

    Args:
        common_ms, incumbent_ms, candidate_ms: milliseconds, infinite where the request failed; neither of the last two
            empty.
        quantile: from 0 to 1.
        share: of the requests on which they differ that the coin gives to the candidate.
    """
    values = np.array([*common_ms, *incumbent_ms, *candidate_ms])
    scores = tail_scores(values, quantile)[len(common_ms) :]
    own, other = scores[: len(incumbent_ms)], scores[len(incumbent_ms) :]
    error = math.sqrt(float(scores.var()) * (1.0 / len(own) + 1.0 / len(other)))
    z = float(other.mean() - own.mean()) / error if error > 0.0 else 0.0
    return Comparison(
        weighted_quantile(
            [(ms, 1.0) for ms in common_ms] + [(ms, 1.0 / (1.0 - share)) for ms in incumbent_ms], quantile
        ),
        weighted_quantile([(ms, 1.0) for ms in common_ms] + [(ms, 1.0 / share) for ms in candidate_ms], quantile),
        z,
        min(len(own), len(other)),
    )


def tail_scores(values: FloatArray, quantile: float) -> FloatArray:
    """How far into the tail each value lies, 0 to 1, by its rank among all; shape (n,). Equal values score alike."""
    ordered = np.sort(values)
    rank = (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2.0 * len(values))
    start = max(1.0 - TAIL * (1.0 - quantile), 0.0)
    scores: FloatArray = np.maximum(rank - start, 0.0) / (1.0 - start)
    return scores


def weighted_quantile(weighted: Sequence[tuple[float, float]], quantile: float) -> float:
    """The least value up to which that share of the weight lies, of at least one (value, weight)."""
    ordered = sorted(weighted)
    cumulated = list(accumulate(weight for _, weight in ordered))
    limit = quantile * cumulated[-1]
    return next((value for (value, _), upto in zip(ordered, cumulated, strict=True) if upto >= limit), ordered[-1][0])
