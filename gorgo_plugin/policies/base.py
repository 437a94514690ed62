"""What a policy is: a pure function from what is known about the candidates to one score each, lower is better."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gorgo_plugin.signals.columns import FloatArray, Number

# Half of those who would wait for a prefill are thought to be sent elsewhere instead.
WAITING_SHARE = 0.5
# What a millisecond of a running answer's delay weighs against one before a first token.
DECODING_SHARE = 0.06
# Where the price of work stops growing: the fleet is full then, whatever goes where.
MOST_UTILISATION = 0.9
MOST_TURNS = 2.0  # looked ahead to; until later ones, caches and queues are others
# As arrays: NumPy takes 0.3 us to make one of a number.
_HALF, _DECODING_SHARE = np.array(0.5), np.array(DECODING_SHARE)


@dataclass(slots=True, eq=False)
class View:
    """What a policy may look at: one row per candidate replica, arrays of shape (candidates,).

    Attributes:
        names: replica names.
        network_ms, doubt_ms: round trip and the price of not knowing it.
        queue_ms: time until the replica's prefill queue is empty.
        prefill_ms: this prompt's own prefill there.
        blocking_ms: what that makes others wait.
        next_turn_ms: what the conversation's next turn is expected to pay for finding its prefix there.
        decode_ms: what decoding the answer there costs; None where no answer has told.
        cached_tokens, uncached_tokens: of this prompt, in the engine's tokens.
        work_tokens: the uncached ones with what attending to all others adds (`signals/rates.py`).
        prompt_tokens: length of this prompt, in the engine's tokens.
        load: sum over a candidate's open flights, by name (`waiting`, `decoding`, `queued_prompt_tokens`,
            `decoding_prompt_tokens`); looked up only by the policies that use it.
        gauge: engine gauge by name (`running`, `waiting`, `used_tokens`), NaN where never read.
        affinity: bytes that stay the same over a session.
        weights: (W_rtt, W_queue).
        rng: the router's seeded generator.
    """

    names: list[str]
    network_ms: FloatArray
    doubt_ms: FloatArray
    queue_ms: FloatArray
    prefill_ms: FloatArray
    blocking_ms: FloatArray
    next_turn_ms: FloatArray
    decode_ms: FloatArray | None
    cached_tokens: FloatArray
    uncached_tokens: FloatArray
    work_tokens: FloatArray
    prompt_tokens: float
    load: Callable[[str], FloatArray]
    gauge: Callable[[str], FloatArray]
    affinity: Callable[[], bytes]
    weights: tuple[float, float]
    rng: random.Random

    def ttft_ms(self, row: int) -> float:
        """The unweighted prediction for one candidate: network + queue + prefill."""
        return self.network_ms.item(row) + self.queue_ms.item(row) + self.prefill_ms.item(row)

    @property
    def waiting(self) -> FloatArray:
        """Flights before their first token."""
        return self.load("waiting")

    @property
    def decoding(self) -> FloatArray:
        """Flights after it."""
        return self.load("decoding")

    @property
    def queued_prompt_tokens(self) -> FloatArray:
        """Prompt tokens of the flights before their first token, cached ones included."""
        return self.load("queued_prompt_tokens")

    @property
    def decoding_prompt_tokens(self) -> FloatArray:
        """Prompt tokens of the flights after it, cached ones included."""
        return self.load("decoding_prompt_tokens")

    @property
    def in_flight(self) -> FloatArray:
        """Open flights per candidate."""
        return self.waiting + self.decoding

    @property
    def others_ms(self) -> FloatArray:
        """What is paid outside this TTFT: `blocking`, `next_turn` and `decode`."""
        others_ms = self.blocking_ms + self.next_turn_ms
        if self.decode_ms is not None:
            others_ms += self.decode_ms
        return others_ms

    @property
    def total_ms(self) -> FloatArray:
        """As `total_ms`, per candidate."""
        return total_ms(self.weights, self.network_ms, self.doubt_ms, self.queue_ms, self.prefill_ms, self.others_ms)

    def gauge_or(self, name: str, own: FloatArray) -> FloatArray:
        """An engine gauge, or this router's own count where the engine was never read."""
        values = self.gauge(name)
        return np.where(np.isnan(values), own, values)


def total_ms(
    weights: tuple[float, float],
    network_ms: Number,
    doubt_ms: Number,
    queue_ms: Number,
    prefill_ms: Number,
    others_ms: Number,
) -> Number:
    """`W_rtt * (network + doubt) + W_queue * queue + prefill` (paper v2, eq. 3, in milliseconds) `+ others`.

    `others_ms` is what is paid outside this TTFT.
    """
    if weights == (1.0, 1.0):  # as it mostly is
        total = network_ms + doubt_ms
        total += queue_ms  # in place, which is cheaper where they are arrays
        total += prefill_ms
        total += others_ms
        return total
    w_rtt, w_queue = weights
    return w_rtt * (network_ms + doubt_ms) + w_queue * queue_ms + prefill_ms + others_ms


def least(values: FloatArray) -> float:
    """The least of some numbers; by the place where it is, which is faster to find than the number itself."""
    return values.item(values.argmin())


def next_turn_ms(network_ms: FloatArray, prefill_ms: FloatArray, continued: float) -> FloatArray:
    """Milliseconds that a conversation's next turns are expected to pay for finding its prefix at a candidate.

    Above the least there is, and by the likelihood `continued` that a turn is followed by one. They go to where this
    one went and pay that round trip, `1 / (1 - continued)` of them in the mean; or elsewhere, where what is not cached
    today has to be computed then, once.
    """
    turns = min(continued / (1.0 - continued), MOST_TURNS * continued) if continued < 1.0 else MOST_TURNS
    least_ms, elsewhere_ms = least(network_ms), least(network_ms + prefill_ms)
    found: FloatArray = network_ms * turns
    np.minimum(found, least_ms * turns + (elsewhere_ms - least_ms) * continued, out=found)
    found -= least_ms * turns
    return found


def decode_ms(
    base_ms: FloatArray, per_request_ms: FloatArray, decoding: FloatArray, output_tokens: float
) -> FloatArray:
    """What decoding an answer of `output_tokens` costs, per candidate, above the least there is.

    With `n` that decode there already the answer takes `base + per_request * (n + 1)` a token, and makes each of the
    `n` wait `per_request` longer for each of theirs. It delays ends, not first tokens, and counts by `DECODING_SHARE`.
    """
    cost: FloatArray = decoding + decoding
    cost += 1.0
    cost *= per_request_ms
    cost += base_ms
    cost -= least(cost)
    cost *= DECODING_SHARE * output_tokens
    return cost


def blocking_ms(
    prefill_ms: FloatArray,
    queue_ms: FloatArray,
    arrivals_per_ms: FloatArray,
    decoding: FloatArray,
    utilisation: float,
) -> FloatArray:
    """Milliseconds that a prefill is expected to make others wait, per candidate.

    `arrivals_per_ms` are those that do wait, `WAITING_SHARE` of all.

    Prefill is first come, first served. A request that arrives while this one waits (`queue_ms`) waits all of
    `prefill_ms` longer, one that arrives while it runs what is left of it: together `arrivals * prefill * (queue +
    prefill / 2)`. Answers that are being decoded pause for every step of it: that delays their ends, not their first
    tokens, and counts by `DECODING_SHARE`. And the fuller the fleet is, the more requests wait for work that a cache
    would have saved: `u**2 / (1 - u)` in the mean queue at the utilisation `u`.
    """
    others = _HALF * prefill_ms
    others += queue_ms
    others *= arrivals_per_ms
    others += _DECODING_SHARE * decoding
    full = min(utilisation, MOST_UTILISATION)
    others += full**2 / (1.0 - full)
    others *= prefill_ms
    return others


class Policy:
    """Base of the policies. Stateless; what they need comes in the `View`.

    Attributes:
        name: what `policy:` selects.
        reason: what a decision says when the best score alone decided.
        weighted: it uses `View.weights`, so they can be tuned.
        reads_gauges: the engines are scraped once a second for it.
        tie_ms, tie_share: candidates within `tie_ms + tie_share * best` of the best score count as equal, and one of
            them is taken at random.
    """

    name: ClassVar[str]
    reason: ClassVar[str]
    weighted: ClassVar[bool] = False
    reads_gauges: ClassVar[bool] = False
    tie_ms: ClassVar[float] = 0.0
    tie_share: ClassVar[float] = 0.0

    def scores(self, view: View) -> FloatArray:
        """One score per candidate, finite, lower is better."""
        raise NotImplementedError


def rank_above(first: FloatArray, then: FloatArray) -> FloatArray:
    """Scores that order by `first` and, where it is equal, by `then`."""
    _, primary = np.unique(first, return_inverse=True)
    _, secondary = np.unique(then, return_inverse=True)
    return (primary * (len(then) + 1) + secondary).astype(np.float64)
