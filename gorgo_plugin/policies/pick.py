"""From scores to a choice: health, replicas already tried, and near-ties."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.policies.base import Policy, View
from gorgo_plugin.signals.columns import FloatArray

AVAILABLE, TRIED, UNHEALTHY, UNHEALTHY_AND_TRIED = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen row, why, and all rows in failover order (the chosen one first)."""

    row: int
    reason: str
    ranked: list[int]
    scores: FloatArray


def pick(policy: Policy, view: View, tiers: NDArray[np.intp], rng: random.Random) -> Choice:
    """Choose among candidates: the lowest tier decides, then the policy's score, then chance among near-ties.

    Args:
        policy, view: what scores the candidates.
        tiers: per candidate one of AVAILABLE, TRIED (by this request), UNHEALTHY, UNHEALTHY_AND_TRIED.
        rng: draws among near-ties.
    """
    scores = policy.scores(view)
    ranked: list[int] = np.lexsort((scores, tiers)).tolist()
    best = ranked[0]
    if len(ranked) == 1:
        return Choice(best, "only-candidate", ranked, scores)
    limit = scores[best] + policy.tie_ms + policy.tie_share * abs(scores[best])
    tied = [row for row in ranked if scores[row] <= limit and tiers[row] == tiers[best]]
    row = best if len(tied) == 1 else tied[rng.randrange(len(tied))]
    if row != best:
        ranked.remove(row)
        ranked.insert(0, row)
    return Choice(row, _reason(policy, scores, tiers, row, limit, len(tied)), ranked, scores)


def _reason(policy: Policy, scores: FloatArray, tiers: NDArray[np.intp], row: int, limit: float, tied: int) -> str:
    if tiers[row] >= UNHEALTHY:
        return "all-unhealthy"
    passed_over = int(np.argmin(scores))
    if tiers[passed_over] > tiers[row] and scores[passed_over] < scores[row]:
        return "best-was-tried" if tiers[passed_over] == TRIED else "best-is-unhealthy"
    return "near-tie" if tied > 1 else policy.reason
