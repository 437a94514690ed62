"""From scores to a choice: health, replicas already tried, and near-ties."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

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


def pick(policy: Policy, view: View, tiers: Sequence[int], rng: random.Random) -> Choice:
    """Choose among candidates: the lowest tier decides, then the policy's score, then chance among near-ties.

    Args:
        policy, view: what scores the candidates.
        tiers: per candidate one of AVAILABLE, TRIED (by this request), UNHEALTHY, UNHEALTHY_AND_TRIED.
        rng: draws among near-ties.
    """
    array = policy.scores(view)
    scores: list[float] = array.tolist()
    ranked = sorted(range(len(scores)), key=lambda row: (tiers[row], scores[row]))
    best = ranked[0]
    if len(ranked) == 1:
        return Choice(best, "only-candidate", ranked, array)
    limit = scores[best] + policy.tie_ms + policy.tie_share * abs(scores[best])
    tied = [row for row in ranked if scores[row] <= limit and tiers[row] == tiers[best]]
    row = best if len(tied) == 1 else tied[rng.randrange(len(tied))]
    if row != best:
        ranked.remove(row)
        ranked.insert(0, row)
    return Choice(row, _reason(policy, scores, tiers, row, len(tied)), ranked, array)


def _reason(policy: Policy, scores: Sequence[float], tiers: Sequence[int], row: int, tied: int) -> str:
    if tiers[row] >= UNHEALTHY:
        return "all-unhealthy"
    passed_over = scores.index(min(scores))
    if tiers[passed_over] > tiers[row] and scores[passed_over] < scores[row]:
        return "best-was-tried" if tiers[passed_over] == TRIED else "best-is-unhealthy"
    return "near-tie" if tied > 1 else policy.reason
