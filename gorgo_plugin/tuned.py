"""Deciding while weights are tuned: the incumbent and a candidate both choose, and a coin decides where they differ."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from gorgo_plugin.policies import Policy, View
from gorgo_plugin.policies.pick import Choice, pick
from gorgo_plugin.settings import Settings
from gorgo_plugin.tuning import Arm, Pair, Sample, Screening, Trial, Tuner

TRIAL = "trial"  # the reason of a decision that a candidate took against the incumbent


class SameDraw(random.Random):
    """Draws alike among the near-ties of several choices for one request: they must not differ by chance alone.

    The first choice, which is what routes while nothing is tried, draws as it would without tuning.
    """

    def begin(self, rng: random.Random) -> None:
        """The next draw is `rng`'s."""
        self._rng: random.Random | None = rng

    def go_on(self) -> None:
        """Further draws are like the first, if there was one."""
        if self._rng is not None:
            self._rng, self._drawn = None, self.random()

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        """From 0 to `start`."""
        if self._rng is None:
            return int(self._drawn * start)
        number = self._rng.randrange(start)
        self._rng, self._drawn = None, (number + 0.5) / start
        return number


class TunedPick:
    """`pick` with the weights that a tuner has in force or tries."""

    def __init__(self, tuner: Tuner) -> None:
        self.tuner = tuner
        self._draw = SameDraw(0)

    @property
    def weights(self) -> Pair:
        """(W_rtt, W_queue) that route where no candidate does."""
        return self.tuner.in_force

    def describe(self) -> dict[str, Any]:
        """The tuner's state, as plain data."""
        return self.tuner.describe()

    def __call__(
        self,
        policy: Policy,
        view: View,
        tiers: Sequence[int] | None,
        rng: random.Random,
        stream: bool,
        now_s: float,
        first_attempt: bool,
    ) -> tuple[Choice, Sample | None]:
        """The choice, and the sample that is to be told what becomes of it.

        A further attempt of a request that failed is no part of a trial, and neither is one without alternatives.
        """
        tuner = self.tuner
        stage = tuner.stage(now_s) if first_attempt and len(view.names) > 1 else None
        if stage is None:
            view.weights = tuner.in_force
            return pick(policy, view, tiers, rng), None
        self._draw.begin(rng)
        usual = self._pick(tuner.in_force, policy, view, tiers)
        self._draw.go_on()
        own = usual if tuner.learned == tuner.in_force else self._pick(tuner.learned, policy, view, tiers)
        if isinstance(stage, Screening):
            others = [self._pick(weights, policy, view, tiers) for weights in stage.candidates]
            foreseen = [None if other.row == own.row else foreseen_ms(view, other) for other in others]
            stage.add(foreseen_ms(view, own), foreseen)
            view.weights = tuner.in_force
            return usual, None
        other = self._pick(stage.candidate, policy, view, tiers)
        stage.requests += 1
        stage.differing += own.row != other.row
        if tuner.settings.mode == "propose":
            _foretell(stage, view, own, other, now_s)
            view.weights = tuner.in_force
            return usual, None
        arm = "common" if own.row == other.row else tuner.coin(stage)
        if arm != "candidate":
            view.weights = tuner.in_force
            return own, stage.add(Sample(arm, now_s, predicted_ms(view, own), stream))
        return other._replace(reason=TRIAL), stage.add(Sample(arm, now_s, predicted_ms(view, other), stream))

    def _pick(self, weights: Pair, policy: Policy, view: View, tiers: Sequence[int] | None) -> Choice:
        view.weights = weights
        return pick(policy, view, tiers, self._draw)


def _foretell(trial: Trial, view: View, own: Choice, other: Choice, now_s: float) -> None:
    """Judge both by what is predicted of their choices, as neither is followed."""
    if own.row == other.row:
        foretold: tuple[tuple[Arm, Choice], ...] = (("common", own),)
    else:
        foretold = (("incumbent", own), ("candidate", other))
    for arm, choice in foretold:
        ms = predicted_ms(view, choice)
        trial.add(Sample(arm, now_s, ms, streamed=True, ttft_ms=ms))


def predicted_ms(view: View, choice: Choice) -> float:
    """TTFT that the view predicts of a choice."""
    row = choice.row
    return float(view.network_ms[row] + view.queue_ms[row] + view.prefill_ms[row])


def foreseen_ms(view: View, choice: Choice) -> float:
    """The same and what the choice costs outside its own TTFT."""
    return predicted_ms(view, choice) + float(view.others_ms[choice.row])


def tuned_pick(settings: Settings, state: Mapping[str, Any] | None = None) -> TunedPick | None:
    """What these settings tune by, which goes on where a `Router.snapshot()` stood; None where they tune nothing."""
    if settings.tuning.mode not in ("online", "propose"):
        return None
    rng = random.Random(f"tuning {settings.seed}")  # its own, so that the router's ties do not depend on trials
    tuner = Tuner(settings.tuning, settings.weight_pair(), settings.neutral_weights(), rng)
    known = (state or {}).get("tuning")
    if known and state is not None and state.get("policy") == settings.policy:
        tuner.restore(known)
    return TunedPick(tuner)


def retuned(tuned: TunedPick | None, old: Settings, new: Settings) -> TunedPick | None:
    """What a router tunes by after a change of settings: where all that matters for it stays, it stays."""
    before, now = ((one.policy, one.weight_pair(), one.tuning) for one in (old, new))
    return tuned if before == now else tuned_pick(new)


def weights_in_force(settings: Settings, tuned: TunedPick | None) -> Pair:
    """(W_rtt, W_queue) that route."""
    return settings.weight_pair() if tuned is None else tuned.weights
