"""From scores to a choice: health, replicas already tried, and near-ties."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gorgo_plugin.policies.base import Policy, View
from gorgo_plugin.signals.columns import FloatArray

AVAILABLE, TRIED, UNHEALTHY, UNHEALTHY_AND_TRIED = 0, 1, 2, 3


class Choice(NamedTuple):
    """The chosen row, why, and what it was chosen from.

    Attributes:
        row: of the view's candidates.
        reason: kebab-case.
        scores: the policy's, shape (candidates,).
        tiers: as given to `pick`.
    """

    row: int
    reason: str
    scores: FloatArray
    tiers: Sequence[int] | None

    @property
    def ranked(self) -> list[int]:
        """All rows in failover order, the chosen one first."""
        scores: list[float] = self.scores.tolist()
        tiers = self.tiers if self.tiers is not None else [AVAILABLE] * len(scores)
        return sorted(range(len(scores)), key=lambda row: (row != self.row, tiers[row], scores[row]))


def pick(policy: Policy, view: View, tiers: Sequence[int] | None, rng: random.Random) -> Choice:
    """Choose among candidates: the lowest tier decides, then the policy's score, then chance among near-ties.

    Args:
        policy, view: what scores the candidates.
        tiers: per candidate one of AVAILABLE, TRIED (by this request), UNHEALTHY, UNHEALTHY_AND_TRIED; None: all are
            available.
        rng: draws among near-ties.
    """
    scores = policy.scores(view)
    if len(scores) == 1:
        return Choice(0, "only-candidate", scores, tiers)
    among = scores if tiers is None else np.where(np.equal(tiers, min(tiers)), scores, np.inf)
    row, reason = int(among.argmin()), policy.reason
    # As a list: of so few numbers each array operation costs what a look at all of them does.
    eligible: list[float] = among.tolist()
    lowest, eligible[row] = eligible[row], math.inf
    limit = lowest + policy.tie_ms + policy.tie_share * abs(lowest)
    if min(eligible) <= limit:
        others = [other for other, score in enumerate(eligible) if score <= limit and other != row]
        near = [row, *sorted(others, key=eligible.__getitem__)]
        row, reason = near[rng.randrange(len(near))], "near-tie"
    return Choice(row, reason if tiers is None else _reason(scores, tiers, row, reason), scores, tiers)


def _reason(scores: FloatArray, tiers: Sequence[int], row: int, reason: str) -> str:
    if tiers[row] >= UNHEALTHY:
        return "all-unhealthy"
    passed_over = int(scores.argmin())
    if tiers[passed_over] > tiers[row] and scores[passed_over] < scores[row]:
        return "best-was-tried" if tiers[passed_over] == TRIED else "best-is-unhealthy"
    return reason
