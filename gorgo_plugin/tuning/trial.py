"""One trial: a candidate beside the incumbent on the same traffic, every request judged for the weights that routed it.

For each request both choose. Where they agree there is nothing to learn and nothing at risk; where they differ a coin
decides, and what becomes of those requests is compared. So both see the same load at the same time, neither has samples
of the other, and the incumbent is measured anew in every trial.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from gorgo_plugin.tuning.evolution import Pair
from gorgo_plugin.tuning.objectives import Comparison, Objective, compare

Arm = Literal["common", "incumbent", "candidate"]
"""Whose choice was taken; `common`: they agreed."""

FAULTS = frozenset({"unreached", "rejected", "timeout", "retried"})  # the choice served nobody
# A request this many times as old as the percentile counts, answered or not: else what is slow would be missing.
HORIZON = 1.5
FEWEST_KNOWN = 8  # samples that this percentile is taken from


@dataclass(slots=True, eq=False)
class Sample:
    """What is seen of one request of a trial.

    Attributes:
        arm: whose choice it was.
        dispatched_s: when, by the router's clock.
        predicted_ms: TTFT, as predicted.
        streamed: its first token can be seen.
        ttft_ms, e2e_ms: as seen; infinite when it failed, None as long as it is not known.
        void: it tells nothing of the weights.
    """

    arm: Arm
    dispatched_s: float
    predicted_ms: float
    streamed: bool
    ttft_ms: float | None = None
    e2e_ms: float | None = None
    void: bool = False

    def first_token(self, now_s: float) -> None:
        """Its first token was seen."""
        if self.ttft_ms is None:
            self.ttft_ms = self._elapsed_ms(now_s)

    def ended(self, now_s: float, failure: str | None) -> None:
        """It was answered, or failed in one of the ways of `Router.fail`, or was `retried` or `lost`.

        A client that leaves has waited at least so long, and what it would have waited for was predicted: a request
        that is broken off early must not look fast.
        """
        if failure == "invalid":
            self.void = True
        if failure is None:
            self.e2e_ms = self._elapsed_ms(now_s)
            return
        waited_ms = math.inf if failure in FAULTS else max(self._elapsed_ms(now_s), self.predicted_ms)
        self.e2e_ms = waited_ms
        if self.ttft_ms is None:
            self.ttft_ms = waited_ms

    def seen_ms(self, metric: Literal["ttft", "e2e"]) -> float | None:
        """One of its times."""
        return self.ttft_ms if metric == "ttft" else self.e2e_ms

    def _elapsed_ms(self, now_s: float) -> float:
        return max(now_s - self.dispatched_s, 0.0) * 1e3


@dataclass(slots=True)
class Trial:
    """A candidate under test.

    Attributes:
        candidate: its weights.
        share: of the requests on which the two differ that it routes.
        rematch: the candidate is the incumbent's predecessor.
        requests: decided so far.
        differing: those on which the two did not agree.
        samples: of these requests.
    """

    candidate: Pair
    share: float = 0.5
    rematch: bool = False
    requests: int = 0
    differing: int = 0
    samples: list[Sample] = field(default_factory=list)

    def add(self, sample: Sample) -> Sample:
        """Take in a request that was decided."""
        self.samples.append(sample)
        return sample

    def compared(self, objective: Objective, now_s: float) -> Comparison | None:
        """How candidate and incumbent stand now; None as long as one of them has nothing to show."""
        metric = objective.metric
        judged = [one for one in self.samples if not one.void and (metric == "e2e" or one.streamed)]
        known = sorted(ms for one in judged if (ms := one.seen_ms(metric)) is not None and ms < math.inf)
        if len(known) < FEWEST_KNOWN:
            return None
        before_s = now_s - HORIZON * known[int(objective.quantile * (len(known) - 1))] / 1e3
        times: dict[Arm, list[float]] = {"common": [], "incumbent": [], "candidate": []}
        for one in judged:
            if one.dispatched_s <= before_s:
                ms = one.seen_ms(metric)
                times[one.arm].append(ms if ms is not None else (now_s - one.dispatched_s) * 1e3)
        if not times["incumbent"] or not times["candidate"]:
            return None
        return compare(times["common"], times["incumbent"], times["candidate"], objective.quantile, self.share)
