"""Screening: which of several candidates is worth a trial, by what the router predicts of their choices.

A prediction costs no request anything, so bad candidates are mostly found out here (pre-selection by a surrogate, as in
surrogate-assisted evolution strategies). It does not decide: only a trial sees what waiting behind each other costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gorgo_plugin.tuning.evolution import Pair

CANDIDATES = 12
REQUESTS = 32  # each is decided once per candidate; some 10 us each
FEWEST_DIFFERING = 2  # of these requests
# Share of the predicted time that a candidate may cost and still be tried: predictions are not good to much less, and
# where weights are right nearly all candidates would cost more.
FORESEEN_LOSS = 0.01


@dataclass(slots=True)
class Screening:
    """Candidates, and what is predicted of their choices.

    Attributes:
        candidates: weights.
        own_ms: predicted TTFT of the incumbent's choice, per request.
        other_ms: the same of each candidate's; None where it is the incumbent's.
    """

    candidates: Sequence[Pair]
    own_ms: list[float] = field(default_factory=list)
    other_ms: list[list[float | None]] = field(default_factory=list)

    def add(self, own_ms: float, other_ms: list[float | None]) -> None:
        """Take in one request."""
        self.own_ms.append(own_ms)
        self.other_ms.append(other_ms)

    @property
    def done(self) -> bool:
        """Whether it has seen enough."""
        return len(self.own_ms) >= REQUESTS

    def best(self) -> tuple[Pair, bool] | None:
        """The candidate that is predicted to save most, and whether it is worth a trial.

        None when all decide like the incumbent.
        """
        foreseen = [(self._costs_ms(number), number) for number in range(len(self.candidates))]
        known = [(cost_ms, number) for cost_ms, number in foreseen if cost_ms is not None]
        if not known:
            return None
        cost_ms, number = min(known)
        return self.candidates[number], cost_ms <= FORESEEN_LOSS * sum(self.own_ms)

    def _costs_ms(self, number: int) -> float | None:
        """What the candidate's choices are predicted to cost more, over all requests; None where they are the same."""
        more_ms = [
            other - own
            for own, row in zip(self.own_ms, self.other_ms, strict=True)
            if (other := row[number]) is not None
        ]
        return sum(more_ms) if len(more_ms) >= FEWEST_DIFFERING else None
