"""The ways between regions in virtual time: a mean round trip, and all that makes it differ from its mean."""

from __future__ import annotations

import math
import random
from bisect import bisect_right

from gorgo_plugin.fleet.network import Network
from gorgo_plugin.fleet.topology import Fleet, FleetLink, Spikes

_SECONDS_PER_HOUR = 3600.0


class Link:
    """One link. Crossings are asked for in any order of time; the same seed gives the same spikes.

    Attributes:
        event_factor: what events have made of its round trip.
    """

    def __init__(self, settings: FleetLink, seed: str) -> None:
        self._network = Network(settings.rtt_ms, settings.jitter_ms, random.Random(f"{seed}/jitter"))
        self._drift = settings.drift
        self._spikes = (
            None if settings.spikes is None else _SpikeTimes(settings.spikes, random.Random(f"{seed}/spikes"))
        )
        self.event_factor = 1.0

    def one_way_s(self, at_s: float) -> float:
        """Seconds of a crossing that begins at `at_s`."""
        factor = self.event_factor
        if self._drift is not None:
            factor *= 1.0 + self._drift.share * math.sin(2.0 * math.pi * at_s / self._drift.period_s)
        if self._spikes is not None:
            factor *= self._spikes.factor(at_s)
        return self._network.one_way_s() * factor


class _SpikeTimes:
    """When spikes begin, drawn as far as anybody asked."""

    def __init__(self, settings: Spikes, rng: random.Random) -> None:
        self._settings = settings
        self._rng = rng
        self._starts = [-math.inf]
        self._next_s = self._pause_s()

    def factor(self, at_s: float) -> float:
        while self._next_s <= at_s:
            self._starts.append(self._next_s)
            self._next_s += self._pause_s()
        last_s = self._starts[bisect_right(self._starts, at_s) - 1]
        return self._settings.factor if at_s < last_s + self._settings.duration_s else 1.0

    def _pause_s(self) -> float:
        return self._rng.expovariate(self._settings.per_hour / _SECONDS_PER_HOUR)


class Links:
    """The links of a fleet, made when they are first asked for."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self._fleet = fleet
        self._seed = seed
        self._made: dict[tuple[str, ...], Link] = {}

    def between(self, one: str, other: str) -> Link:
        """The link between two regions, the same object in both directions.

        Raises:
            FleetError: there is none.
        """
        key = tuple(sorted((one, other)))
        if key not in self._made:
            settings = self._fleet.require_link(one, other)
            self._made[key] = Link(settings, f"{self._seed}/{'/'.join(key)}")
        return self._made[key]
