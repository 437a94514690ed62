"""An injected round trip: half of it before a request arrives, half on everything that comes back."""

from __future__ import annotations

import asyncio
import random


class Network:
    """The path between a gateway and a mock replica.

    Args:
        rtt_ms: mean round trip.
        jitter_ms: standard deviation of the round trip.
        rng: draws the jitter.
    """

    def __init__(self, rtt_ms: float, jitter_ms: float, rng: random.Random) -> None:
        self._half_ms = rtt_ms / 2
        self._spread_ms = jitter_ms / 2**0.5  # two independent halves add up to the spread of the whole
        self._rng = rng

    def one_way_s(self) -> float:
        """Seconds of one crossing; never less than half the mean, as a path has a shortest time."""
        if self._spread_ms == 0:
            return self._half_ms / 1e3
        return max(self._half_ms / 2, self._rng.gauss(self._half_ms, self._spread_ms)) / 1e3

    async def cross(self) -> None:
        """Wait one crossing from now."""
        await asyncio.sleep(self.one_way_s())

    def way_back(self) -> DelayLine:
        """A way back on which what was sent first arrives first."""
        return DelayLine(self)


class DelayLine:
    """The way back of one answer: chunks are under way at the same time, but do not overtake each other."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._latest_s = 0.0

    async def arrival(self, sent_s: float) -> None:
        """Wait until what was sent at `sent_s` (loop time) arrives."""
        self._latest_s = max(self._latest_s, sent_s + self._network.one_way_s())
        await asyncio.sleep(self._latest_s - asyncio.get_running_loop().time())
