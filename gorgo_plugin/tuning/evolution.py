"""The (1+1) evolution strategy in log space of the second paper's tuner: values in, values out.

`x' = clip(exp(ln x + sigma * z), [low, high])`, with sigma by Rechenberg's 1/5 rule. Against the paper: sigma has a
floor and the search never ends, so that it follows drift; a step that changed no decision makes sigma grow, because on
a plateau only longer steps tell anything; and of several steps drawn at once the most promising is tried (`screening`).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Literal

Pair = tuple[float, float]
"""(W_rtt, W_queue)"""
Ending = Literal["accepted", "worse", "guarded", "undecided", "foreseen", "same"]
"""How a trial ended: the candidate is better; clearly worse; it costs more E2E than the guard allows; its requests ran
out before anything was shown; it was predicted to be worse and not tried; it decides like the incumbent."""

GROWTH = 1.5  # of sigma by a success; a failure takes its fourth root back, so that one success in five keeps sigma
MAX_SIGMA = 1.0  # two strides of it are a factor of 7; more leaves any useful range
STRIDES = (1.0, 2.0)  # in turn, times sigma: a short step alone cannot see over the edge of a plateau


@dataclass(frozen=True, slots=True)
class Evolution:
    """Where the search stands.

    Attributes:
        weights: the incumbent.
        sigma: standard deviation of a step, in log space.
    """

    weights: Pair
    sigma: float


def propose(now: Evolution, count: int, low: float, high: float, rng: random.Random) -> list[Pair]:
    """Candidates one step away, each within the bounds."""
    return [_moved(now.weights, now.sigma * STRIDES[i % len(STRIDES)], low, high, rng) for i in range(count)]


def _moved(weights: Pair, sigma: float, low: float, high: float, rng: random.Random) -> Pair:
    rtt, queue = (min(max(old * math.exp(sigma * rng.gauss(0.0, 1.0)), low), high) for old in weights)
    return rtt, queue


def after(now: Evolution, candidate: Pair, ending: Ending, least_sigma: float) -> Evolution:
    """Where the search stands after a trial of `candidate`."""
    longer = min(now.sigma * GROWTH, max(MAX_SIGMA, least_sigma))
    if ending == "accepted":
        return Evolution(candidate, longer)
    return replace(now, sigma=longer if ending == "same" else max(now.sigma * GROWTH**-0.25, least_sigma))
