"""The tuner: trial after trial, from the weights that are set to those that serve this traffic best."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from gorgo_plugin.settings import TuningSettings
from gorgo_plugin.tuning.evolution import Ending, Evolution, Pair, after, propose
from gorgo_plugin.tuning.guard import Guard
from gorgo_plugin.tuning.objectives import GUARDED, OBJECTIVES, Comparison, Objective
from gorgo_plugin.tuning.screening import CANDIDATES, Screening
from gorgo_plugin.tuning.trial import Arm, Trial

CHECK_EVERY = 16  # requests between two looks at a trial; a look takes 0.2 ms
SAME_REQUESTS = 64  # after so many requests of a trial ...
SAME_SHARE = 0.01  # ... this share of different choices at most says that a longer step is needed
SHORTEST_REST = 16  # requests without a trial after the first that failed; doubles with each further one
# A percentile of a trial is known to some 15%; one this far from the mean of the earlier ones is another load.
DRIFT = math.log(2.5)
USUAL_ALPHA = 0.3  # weight of a trial in that mean
# A step that looks good while the incumbent routes the other half may live off that: one that ignores queues is well
# off while others avoid them. So the loser gets a rematch, on a small share of the traffic that the winner makes, and
# returns on less evidence than a newcomer needs.
REMATCH_SHARE = 0.25
REMATCH_Z = 1.6
MAX_PAST = 4  # weights that were in force before, and are screened again
KEPT_STEPS = 20  # steps that are shown


@dataclass(frozen=True, slots=True)
class Step:
    """How one trial ended.

    Attributes:
        number: of the trial, from 1.
        ending: one of `Ending`.
        incumbent, candidate: (W_rtt, W_queue).
        sigma: of the step that led to the candidate.
        requests, differing: of the trial; those on which the two did not agree.
        objective, e2e: how the candidate stood, None where nothing was seen.
    """

    number: int
    ending: Ending
    incumbent: Pair
    candidate: Pair
    sigma: float
    requests: int
    differing: int
    objective: Comparison | None
    e2e: Comparison | None

    def describe(self) -> dict[str, Any]:
        """Plain data."""
        compared = {"objective": self.objective, "e2e_p95": self.e2e}
        return {
            "number": self.number,
            "ending": self.ending,
            "incumbent": named(self.incumbent),
            "candidate": named(self.candidate),
            "sigma": self.sigma,
            "requests": self.requests,
            "differing": self.differing,
            **{name: None if one is None else finite(one._asdict()) for name, one in compared.items()},
        }


class Tuner:
    """Learns weights from what becomes of the requests they route. It is called under the router's lock.

    Args:
        settings: of the search.
        start: (W_rtt, W_queue) it begins with.
        neutral: the policy's own default; it is screened beside what is drawn.
        rng: draws candidates, and the coin of each request.
    """

    def __init__(self, settings: TuningSettings, start: Pair, neutral: Pair, rng: random.Random) -> None:
        self.settings = settings
        self.start = start
        self._rng = rng
        self._landmarks = [neutral, start]
        self._past: deque[Pair] = deque(maxlen=MAX_PAST)
        self._tried: set[Pair] = set()  # of these, against this incumbent, under this load
        self._now = Evolution(start, settings.sigma)
        self._guard = Guard(settings.guard_margin)
        self._screening: Screening | None = None
        self._trial: Trial | None = None
        self._beaten: Pair | None = None  # to have its rematch
        self._rest_requests = 0
        self._failed_in_a_row = 0
        self._usual_ms: float | None = None
        self._steps: deque[Step] = deque(maxlen=KEPT_STEPS)
        self._endings: Counter[Ending] = Counter()

    @property
    def _objective(self) -> Objective:
        return OBJECTIVES[self.settings.objective]

    @property
    def learned(self) -> Pair:
        """The best weights found so far."""
        return self._now.weights

    @property
    def in_force(self) -> Pair:
        """The weights that route when no candidate does."""
        return self.start if self.settings.mode == "propose" else self._now.weights

    def stage(self, now_s: float) -> Screening | Trial | None:
        """What the next request takes part in; None: the tuner rests."""
        if self._trial is not None:
            if self._trial.requests and self._trial.requests % CHECK_EVERY == 0:
                self._look(self._trial, now_s)
            return self._trial
        if self._beaten is not None:
            self._trial, self._beaten = Trial(self._beaten, REMATCH_SHARE, rematch=True), None
            return self._trial
        if self._rest_requests > 0:
            self._rest_requests -= 1
            return None
        if self._screening is not None and self._screening.done:
            return self._screened(self._screening)
        if self._screening is None:
            self._screening = Screening(self._candidates())
        return self._screening

    def coin(self, trial: Trial) -> Arm:
        """Who routes a request on which the two differ."""
        return "candidate" if self._rng.random() < trial.share else "incumbent"

    def describe(self) -> dict[str, Any]:
        """What it is at, as plain data; also what `restore` takes."""
        return {
            "mode": self.settings.mode,
            "objective": self.settings.objective,
            "start": named(self.start),
            "weights": named(self._now.weights),
            "candidate": None if self._trial is None else named(self._trial.candidate),
            "sigma": self._now.sigma,
            "e2e_spent": self._guard.spent,
            "resting_requests": self._rest_requests,
            "endings": {ending: self._endings[ending] for ending in get_args(Ending)},
            "steps": [step.describe() for step in self._steps],
        }

    def restore(self, known: Mapping[str, Any]) -> None:
        """Go on where another tuner's `describe` stood; not if it began with other weights, or learned otherwise.

        Raises:
            KeyError, TypeError, ValueError: it is no such description.
        """
        if not close(pair(known["start"]), self.start) or known["mode"] != self.settings.mode:
            return
        low, high = self.settings.low, self.settings.high
        rtt, queue = (min(max(weight, low), high) for weight in pair(known["weights"]))
        sigma, spent = float(known["sigma"]), float(known["e2e_spent"])
        if not (0.0 < sigma < math.inf and 0.0 <= spent < math.inf):
            raise ValueError(f"tuning: sigma {sigma} and e2e_spent {spent} are not what a tuner knows")
        self._now = Evolution((rtt, queue), max(sigma, self.settings.least_sigma))
        self._guard = replace(self._guard, spent=spent)

    def _candidates(self) -> list[Pair]:
        """What to screen: drawn ones, and what is known from before and was not tried since."""
        low, high = self.settings.low, self.settings.high
        known = dict.fromkeys((*self._landmarks, *self._past))
        fresh = [one for one in known if one not in self._tried and all(low <= weight <= high for weight in one)]
        return [*propose(self._now, CANDIDATES, low, high, self._rng), *fresh]

    def _screened(self, screening: Screening) -> Trial | None:
        """Begin the trial of the best candidate, if it is worth one."""
        self._screening, best = None, screening.best()
        if best is None:
            self._end(Trial(screening.candidates[0]), "same", None, None)
        elif not best[1]:
            self._end(Trial(best[0]), "foreseen", None, None)
        else:
            self._trial = Trial(best[0])
        return self._trial

    def _look(self, trial: Trial, now_s: float) -> None:
        """End the trial where it has shown enough."""
        objective = trial.compared(self._objective, now_s)
        e2e = trial.compared(GUARDED, now_s)
        ending = verdict(trial, objective, e2e, self._guard, self.settings)
        if ending is not None:
            self._end(trial, ending, objective, e2e)

    def _end(self, trial: Trial, ending: Ending, objective: Comparison | None, e2e: Comparison | None) -> None:
        before = self._now
        self._endings[ending] += 1
        number = sum(self._endings.values())
        counts = trial.requests, trial.differing
        self._steps.append(Step(number, ending, before.weights, trial.candidate, before.sigma, *counts, objective, e2e))
        self._trial = None
        self._tried.update({trial.candidate} & {*self._landmarks, *self._past})
        if ending == "accepted":
            self._tried.clear()
            self._past.append(before.weights)
            self._guard = self._guard if e2e is None else self._guard.after(e2e)
        if trial.rematch:  # no step of the search: where it stands is merely confirmed, or not
            if ending == "accepted":
                self._now = replace(before, weights=trial.candidate)
        else:
            self._now = after(before, trial.candidate, ending, self.settings.least_sigma)
        if ending == "accepted" and not trial.rematch:
            self._failed_in_a_row, self._beaten = 0, before.weights
        else:
            rest = SHORTEST_REST * 2 ** min(self._failed_in_a_row, 20)
            self._rest_requests = min(rest, self.settings.rest_requests)
            self._failed_in_a_row += 1
        if objective is not None:
            self._follow(objective.incumbent_ms if ending != "accepted" else objective.candidate_ms)

    def _follow(self, now_ms: float) -> None:
        """Search widely again when the load is another: what was learned before says little then."""
        if not 0.0 < now_ms < math.inf:
            return
        usual_ms = self._usual_ms if self._usual_ms is not None else now_ms
        change = math.log(now_ms / usual_ms)
        self._usual_ms = usual_ms * math.exp(USUAL_ALPHA * change)
        if abs(change) > DRIFT:
            self._usual_ms = now_ms
            self._now = replace(self._now, sigma=max(self._now.sigma, self.settings.sigma))
            self._guard = Guard(self.settings.guard_margin)
            self._failed_in_a_row = self._rest_requests = 0
            self._tried.clear()


def verdict(
    trial: Trial, objective: Comparison | None, e2e: Comparison | None, guard: Guard, settings: TuningSettings
) -> Ending | None:
    """How a trial ends, None while it goes on."""
    if trial.requests >= SAME_REQUESTS and trial.differing <= SAME_SHARE * trial.requests:
        return "same"
    over = trial.requests >= settings.trial_requests
    if objective is not None and objective.samples >= settings.least_samples:
        judged = settings.mode == "propose" or (e2e is not None and e2e.samples >= settings.least_samples)
        if objective.z >= settings.confidence_z:
            return "worse"
        if judged and e2e is not None and guard.is_breached(e2e):
            return "guarded"
        needed_z = REMATCH_Z if trial.rematch else settings.confidence_z
        is_better = objective.z <= -needed_z
        is_felt = objective.candidate_ms + settings.tolerance_ms <= objective.incumbent_ms
        if is_better and is_felt and judged:
            if e2e is None or guard.allows(e2e):
                return "accepted"
            return "guarded" if over else None
    return "undecided" if over else None


def named(weights: Pair) -> dict[str, float]:
    """As settings name them."""
    return {"rtt": weights[0], "queue": weights[1]}


def pair(weights: Mapping[str, Any]) -> Pair:
    """(W_rtt, W_queue) of what `named` gives.

    Raises:
        KeyError, TypeError, ValueError: it is something else, or not positive.
    """
    rtt, queue = float(weights["rtt"]), float(weights["queue"])
    if not (0.0 < rtt < math.inf and 0.0 < queue < math.inf):
        raise ValueError(f"weights: expected two positive numbers, got {rtt} and {queue}")
    return rtt, queue


def close(one: Pair, other: Pair) -> bool:
    """Whether two pairs are the same but for rounding."""
    return all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(one, other, strict=True))


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers that JSON has: infinite ones as None."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
