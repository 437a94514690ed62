"""The ledger of flights: what this router has sent to each replica and not yet seen the end of."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.prefix import Credit
from gorgo_plugin.signals.columns import FloatArray, Rows, Table

# How far past its predicted first token a flight must be before the lateness itself is priced: prefill steps are mixed
# with decodes and a step is coarse, so twice the prediction and this much more is still ordinary.
LATE_AFTER_MS = 100.0
# As arrays: NumPy takes 0.3 us to make one of a number.
_ZERO, _LATE_AFTER_MS = np.zeros(()), np.array(LATE_AFTER_MS)


class Observer(Protocol):
    """Who wants to know what becomes of a flight."""

    def first_token(self, now_s: float) -> None:
        """Its first token was seen."""

    def ended(self, now_s: float, failure: str | None) -> None:
        """It was answered, or failed so: as `Router.fail` has it, or `retried` or `lost`."""


@dataclass(slots=True, eq=False)
class Flight:
    """One attempt of a request at one replica.

    Attributes:
        prompt_tokens, cached_tokens, uncached_tokens: as estimated at dispatch, in the engine's tokens.
        path_blocks, answer_blocks: blocks believed cached: of earlier prompts, and behind them of an answer.
        rest: token ids behind the last full block, shape (fewer than a block,).
        work_tokens: the uncached ones with what attending to the others adds.
        ahead_tokens: work that was before it in the replica's prefill queue.
        network_ms: the round trip as known at dispatch.
        predicted_ms: predicted TTFT.
        prefill_ends_s: when the prefill is predicted to end; what releases the queue for a non-streamed request.
        first_token_s: when the first token was seen, None before.
        decoding: requests that decoded beside it, itself included: at its first token, after its end over its course.
        answered_s: when its answer was complete, None before and when it never was.
        observer: is told what becomes of it.
        in_queue: it still blocks the replica's prefill queue.
    """

    flight_id: int
    request_id: str
    slot: int
    model: str
    stream: bool
    exact: bool
    dispatched_s: float
    prompt_tokens: float
    own_tokens: int
    cached_tokens: float
    uncached_tokens: float
    work_tokens: float
    ahead_tokens: float
    network_ms: float
    predicted_ms: float
    path_blocks: int
    answer_blocks: int
    rest: NDArray[np.uint32]
    hashes: bytes
    credit: Credit | None
    awaits_tokens: bool = False  # routed on an estimate; `hashes` and `credit` are of what was known
    cache_key: str = ""
    observer: Observer | None = None
    first_token_s: float | None = None
    decoding: float = 0.0
    answered_s: float | None = None
    in_queue: bool = True
    learned: bool = False  # its times have been learned from, or must not be
    usage_seen: bool = False
    output_tokens: float | None = None  # as the engine reported, in own tokens
    generated_tokens: int = 0  # the same in the engine's
    learned_uncached_tokens: float | None = None  # as the engine reported

    def tell_end(self, now_s: float, failure: str | None) -> None:
        """Tell the observer how it ended."""
        if self.observer is not None:
            self.observer.ended(now_s, failure)
            self.observer = None

    @property
    def tellable(self) -> bool:
        """Whether its ids are the engine's own, so that the engine's word on its blocks can be understood."""
        return self.exact and not self.cache_key and not self.awaits_tokens

    @property
    def prefill_ends_s(self) -> float:
        """Predicted end of the prefill, on the engine: half a round trip before the first token would be seen."""
        return self.dispatched_s + (self.predicted_ms - self.network_ms / 2) / 1000.0


class Flights(Table):
    """Open flights and what they add up to per replica. A flight is released exactly once, whoever ends it."""

    def __init__(self) -> None:
        super().__init__(
            queued_tokens=0.0,  # work dispatched, no first token yet
            queued_prompt_tokens=0.0,  # the prompts of these flights with their cached tokens, as the papers count
            decoding_prompt_tokens=0.0,
            waiting=0.0,  # flights without a first token
            decoding=0.0,  # flights with one
            head_tokens=0.0,  # work of the flight at the head of the queue
            head_since_ms=math.inf,
        )
        self._open: dict[int, Flight] = {}
        self._queues: dict[int, dict[int, Flight]] = {}  # slot -> flights in the prefill queue, in order
        self._waiting = 0  # flights in all of them
        self._unstreamed: list[tuple[float, int]] = []  # heap of (predicted prefill end, flight id)

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Flight]:
        return iter(list(self._open.values()))

    def get(self, flight_id: int) -> Flight | None:
        """The open flight of that id, if there is one."""
        return self._open.get(flight_id)

    def open(self, flight: Flight) -> None:
        """Count a new flight at its replica."""
        self._open[flight.flight_id] = flight
        self._enqueue(flight)
        if not flight.stream:
            heapq.heappush(self._unstreamed, (flight.prefill_ends_s, flight.flight_id))

    def prefilled(self, flight: Flight, now_s: float) -> None:
        """The prefill ended: it blocks the queue no longer and counts as decoding."""
        if not flight.in_queue:
            return
        self._dequeue(flight, now_s)
        cells = self._columns.cells
        cells["decoding"][flight.slot] += 1.0
        flight.decoding = cells["decoding"][flight.slot]
        cells["decoding_prompt_tokens"][flight.slot] += flight.prompt_tokens

    def close(self, flight_id: int, now_s: float) -> Flight | None:
        """Release a flight; None when it is not open (unknown, or released before)."""
        flight = self._open.pop(flight_id, None)
        if flight is not None:
            self._uncount(flight, now_s)
        return flight

    def move(self, flight: Flight, slot: int, now_s: float) -> None:
        """The gateway sent the flight elsewhere: count it there from now on."""
        self._uncount(flight, now_s)
        flight.slot, flight.dispatched_s, flight.in_queue = slot, now_s, True
        self._enqueue(flight)

    def recount(self, flight: Flight, prompt_tokens: float, cached_tokens: float, work_tokens: float) -> None:
        """The tokens of a prompt that was counted by an estimate are there: correct what it adds to the sums."""
        slot, columns = flight.slot, self._columns
        more_prompt = prompt_tokens - flight.prompt_tokens
        more_work, flight.work_tokens = work_tokens - flight.work_tokens, work_tokens
        flight.prompt_tokens, flight.cached_tokens = prompt_tokens, cached_tokens
        flight.uncached_tokens, flight.awaits_tokens = prompt_tokens - cached_tokens, False
        if not flight.in_queue:
            columns["decoding_prompt_tokens"][slot] += more_prompt
            return
        columns["queued_tokens"][slot] += more_work
        columns["queued_prompt_tokens"][slot] += more_prompt
        if next(iter(self._queues[slot])) == flight.flight_id:
            columns["head_tokens"][slot] = flight.work_tokens

    def release_unstreamed(self, now_s: float) -> None:
        """Let non-streamed flights leave the prefill queue at their predicted prefill end."""
        heap = self._unstreamed
        while heap and heap[0][0] <= now_s:
            flight = self._open.get(heapq.heappop(heap)[1])
            if flight is not None:
                self.prefilled(flight, now_s)

    def opened_before(self, limit_s: float) -> list[int]:
        """Ids of the open flights dispatched before `limit_s`."""
        return [flight.flight_id for flight in self._open.values() if flight.dispatched_s < limit_s]

    def column(self, name: str, rows: Rows) -> FloatArray:
        """One of the sums per replica."""
        return self._columns[name][rows]

    def backlog_ms(self, rows: Rows, ms_per_token: FloatArray, now_s: float) -> FloatArray:
        """Time until the replica's prefill queue is empty, in ms.

        Every queued token of work costs `ms_per_token`, less what the head of the queue must have had by now. A head
        far past its time is evidence against the replica: its lateness is added, so a replica that hangs prices itself
        out instead of looking idle.
        """
        if not self._waiting:
            return np.zeros(len(ms_per_token))
        columns, now_ms = self._columns, now_s * 1000.0
        head_ms = columns["head_tokens"][rows] * ms_per_token
        elapsed_ms = now_ms - columns["head_since_ms"][rows]
        np.maximum(elapsed_ms, _ZERO, out=elapsed_ms)
        queued_ms = columns["queued_tokens"][rows] * ms_per_token
        queued_ms -= np.minimum(elapsed_ms, head_ms)
        if now_ms - min(columns.cells["head_since_ms"]) <= LATE_AFTER_MS:  # then no head can be late
            return queued_ms
        late_ms = elapsed_ms  # in place: with three replicas each array costs more than what it holds
        late_ms -= head_ms
        late_ms -= head_ms
        late_ms -= _LATE_AFTER_MS
        queued_ms += np.maximum(late_ms, _ZERO, out=late_ms)
        return queued_ms

    def ahead_tokens(self, slot: int, ms_per_token: float, now_s: float) -> float:
        """Work that a flight opened now would wait for, less what the head must have had by now."""
        cells = self._columns.cells
        queued, head = cells["queued_tokens"][slot], cells["head_tokens"][slot]
        elapsed_ms = max(now_s * 1000.0 - cells["head_since_ms"][slot], 0.0)
        return max(queued - min(elapsed_ms / ms_per_token, head), 0.0)

    def open_per_slot(self) -> dict[int, int]:
        """Open flights counted from the ledger itself, not from the sums."""
        counts: dict[int, int] = {}
        for flight in self._open.values():
            counts[flight.slot] = counts.get(flight.slot, 0) + 1
        return counts

    def _enqueue(self, flight: Flight) -> None:
        slot, cells = flight.slot, self._columns.cells
        queue = self._queues.setdefault(slot, {})
        queue[flight.flight_id] = flight
        self._waiting += 1
        cells["waiting"][slot] += 1.0
        cells["queued_tokens"][slot] += flight.work_tokens
        cells["queued_prompt_tokens"][slot] += flight.prompt_tokens
        if len(queue) == 1:
            self._set_head(slot, flight.dispatched_s + flight.network_ms / 2000.0)

    def _dequeue(self, flight: Flight, now_s: float) -> None:
        slot, cells = flight.slot, self._columns.cells
        queue = self._queues[slot]
        was_head = next(iter(queue)) == flight.flight_id
        del queue[flight.flight_id]
        self._waiting -= 1
        flight.in_queue = False
        if not queue:  # exact zeros, so that rounding never accumulates
            for name in ("waiting", "queued_tokens", "queued_prompt_tokens", "head_tokens"):
                cells[name][slot] = 0.0
            cells["head_since_ms"][slot] = math.inf
            return
        cells["waiting"][slot] -= 1.0
        cells["queued_tokens"][slot] -= flight.work_tokens
        cells["queued_prompt_tokens"][slot] -= flight.prompt_tokens
        if was_head:  # the engine turned to the next one half a round trip before this first token was seen
            self._set_head(slot, now_s - flight.network_ms / 2000.0)

    def _set_head(self, slot: int, since_s: float) -> None:
        head, cells = next(iter(self._queues[slot].values())), self._columns.cells
        cells["head_tokens"][slot] = head.work_tokens
        cells["head_since_ms"][slot] = max(since_s * 1000.0, head.dispatched_s * 1000.0 + head.network_ms / 2.0)

    def _uncount(self, flight: Flight, now_s: float) -> None:
        if flight.in_queue:
            self._dequeue(flight, now_s)
            return
        slot, cells = flight.slot, self._columns.cells
        flight.decoding = (flight.decoding + cells["decoding"][slot]) / 2.0
        cells["decoding"][slot] -= 1.0
        if cells["decoding"][slot] <= 0.0:
            cells["decoding"][slot] = cells["decoding_prompt_tokens"][slot] = 0.0
        else:
            cells["decoding_prompt_tokens"][slot] -= flight.prompt_tokens
