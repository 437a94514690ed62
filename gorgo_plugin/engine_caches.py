"""What engines say of their own prefix caches, and how far it is believed.

A replica with a source of KV events has blocks known from the engine itself. Where they are complete (the events are
known from an empty cache on) they are the truth, and dispatches count only until the engine has had time to tell of
them. Where they are not, the router's own credit counts as well, and the larger of the two is believed.

Prompts whose ids are not the engine's, and prompts under a cache salt, cannot be found by their ids: for them a replica
is priced by credit, as if it told nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gorgo_plugin.decision import VERDICTS, Prompt, verdict_on
from gorgo_plugin.models import Found, ModelState
from gorgo_plugin.prefix import AllBlocksCleared, EngineBlocks, KvEvent, PrefixIndex
from gorgo_plugin.replicas import Replicas
from gorgo_plugin.settings import ReplicaSettings
from gorgo_plugin.signals import EngineGauges, Flight

# How long after its prefill a dispatch still counts where the engine tells its blocks: vLLM publishes at the end of a
# step, its publisher and the network take milliseconds, a busy client some hundreds.
BRIDGE_S = 2.0
MAX_BRIDGED = 4096  # dispatches of one replica awaiting the engine's word; more than an engine admits
BRIDGE_BLOCKS = 2**20  # no bound of its own: what is bridged lasts for seconds
# Flights in a row whose blocks the engine never told: the tokens are cut otherwise, or the publisher is stuck.
DOUBTED_AFTER = 8
SILENT_S = 10.0  # a source in doubt that has said nothing for so long is lost; a working one speaks at every step
# A restart seen in the events is seen in the engine's metrics page, or by a probe, up to some intervals later.
RESTART_SEEN_S = 60.0
# Blocks a source may claim, against those that `kv_tokens` stands for: more, and its books or the setting are wrong.
MAX_CLAIM = 4
MIN_CLAIM_BLOCKS = 65_536


@dataclass(slots=True, eq=False)
class _Dispatch:
    """A flight whose blocks the engine has not told of yet, as far as known."""

    flight: Flight
    tick: int
    left_queue_s: float | None = None


@dataclass(slots=True, eq=False)
class _Source:
    """The events of one replica.

    Attributes:
        group: the index they go to.
        complete: they are known from an empty cache on.
        since_s, last_s: when that began, and when the last event came.
        events, resets: counted since the replica was first heard.
        refused: why the blocks cannot be used; None when they can.
        confirmed, missed: flights whose blocks the engine did, or did not, tell of.
        missed_in_a_row: of them the last.
    """

    group: _Group
    complete: bool
    since_s: float
    last_s: float
    events: int = 0
    resets: int = 0
    refused: str | None = None
    confirmed: int = 0
    missed: int = 0
    missed_in_a_row: int = 0
    trial: tuple[float, bytes, str] | None = None

    @property
    def exact(self) -> bool:
        """Whether the blocks are the truth."""
        return self.complete and self.missed_in_a_row < DOUBTED_AFTER


@dataclass(slots=True, eq=False)
class _Group:
    """Replicas whose blocks share one index: those of one block size, for all models or for one.

    Attributes:
        blocks: by the engines' word.
        exact: replicas of which that is the truth.
        bridge: credit of dispatches to them that the engines have not told of yet.
        dispatches: the same, by replica, in order.
    """

    blocks: EngineBlocks
    exact: set[int] = field(default_factory=set)
    bridge: PrefixIndex = field(default_factory=PrefixIndex)
    dispatches: dict[int, deque[_Dispatch]] = field(default_factory=dict)


class EngineCaches:
    """The engines' own word on their caches. Public methods that take a name are thread-safe, the rest is called under
    the router's lock.

    Args:
        lock, clock, secret: the router's.
        replicas: names to slots.
        block_tokens: model -> tokens of one block.
    """

    def __init__(
        self,
        lock: threading.RLock,
        clock: Callable[[], float],
        secret: bytes,
        replicas: Replicas,
        block_tokens: Callable[[str], int],
    ) -> None:
        self._lock, self._clock, self._secret = lock, clock, secret
        self._replicas, self._block_tokens = replicas, block_tokens
        self._groups: dict[tuple[int, str | None], _Group] = {}
        self._sources: dict[int, _Source] = {}
        self._estimates: dict[int, dict[str, int]] = {}  # slot -> verdicts on what its engine reported as cached
        self._told: dict[int, tuple[int, int | None]] = {}  # slot -> tokens of its cache, tokens of its blocks

    # What a client of KV events reports

    def observe(self, name: str, events: Sequence[KvEvent], from_start: bool = False) -> bool:
        """Take in events of a replica, in the engine's order. Long ones are taken in pieces, between which the router
        decides.

        Args:
            name: of the replica; unknown ones are ignored.
            events: what the engine published.
            from_start: its cache was empty before them; what was known of it is dropped.

        Returns:
            Whether all that its cache holds is known.
        """
        with self._lock:
            source = self._open(name, from_start)
        if source is None:
            return False
        for event in events:
            self._take_in(name, source, event)
        with self._lock:
            slot = self._slot_of(name, source)
            if slot is not None:
                source.events += len(events)
                source.last_s = self._clock()
                self._expire_bridge(slot, source)
                self._judge(slot, source)
        return source.complete

    def lost(self, name: str) -> None:
        """The events of a replica cannot be followed any more: fall back to credit."""
        with self._lock:
            slot = self._replicas.slot(name)
            source = None if slot is None else self._sources.get(slot)
            if slot is not None and source is not None:
                self._drop(slot, source)

    def _open(self, name: str, from_start: bool) -> _Source | None:
        slot = self._replicas.slot(name)
        if slot is None:
            return None
        now, source = self._clock(), self._sources.get(slot)
        group = self._group(self._replicas[slot])
        if source is None:
            source = self._sources[slot] = _Source(group, False, now, now)
        elif source.group is not group:  # other settings
            self._drop(slot, source)
            source.group, source.refused = group, None
        if from_start:
            if slot in group.blocks:
                self._drop(slot, source)
            source.complete, source.since_s = True, now
        if slot not in group.blocks:
            group.blocks.clear(slot)
        return source

    def _take_in(self, name: str, source: _Source, event: KvEvent) -> None:
        blocks = source.group.blocks
        try:
            for piece in blocks.pieces(event):
                with self._lock:
                    slot = self._slot_of(name, source)
                    if slot is None or slot not in blocks:
                        return  # removed or lost meanwhile
                    blocks.apply(slot, piece)
                    if isinstance(event, AllBlocksCleared):  # what is told from here on is all there is
                        source.complete, source.since_s, source.missed_in_a_row = True, self._clock(), 0
                    if blocks.blocks(slot) > self._most_blocks(slot, blocks.block_tokens):
                        self._drop(slot, source)
        except ValueError as error:
            source.refused = str(error)

    def _slot_of(self, name: str, source: _Source) -> int | None:
        slot = self._replicas.slot(name)
        return slot if slot is not None and self._sources.get(slot) is source else None

    def _group(self, replica: ReplicaSettings) -> _Group:
        model = replica.kv_events.model if replica.kv_events is not None else None
        served = replica.models or [""]
        key = self._block_tokens(served[0] if model is None else model), model
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(EngineBlocks(key[0], self._secret))
        return group

    # What the router asks and tells, under its lock

    def look_up(self, prompt: Prompt, model: ModelState, hashes: bytes) -> Found:
        """What each replica is believed to hold of a prompt."""
        found = model.look_up(prompt.tokens, hashes, self._replicas.rows)
        if not self._sources or prompt.cache_key or not prompt.exact:
            return found
        told: dict[int, int] = {}
        exact: set[int] = set()
        for key in ((model.block_tokens, None), (model.block_tokens, prompt.model)):
            group = self._groups.get(key)
            if group is None:
                continue
            exact |= group.exact
            for held in (group.blocks.match(hashes, len(prompt.tokens), prompt.model), group.bridge.match(hashes)):
                for slot, blocks in held.items():
                    told[slot] = max(blocks, told.get(slot, 0))
        return found._replace(told=told, exact=exact)

    def dispatched(self, flight: Flight) -> None:
        """A flight was sent to its slot; where the engine tells its blocks, it counts until it has had time to."""
        source = self._sources.get(flight.slot)
        if source is None or not flight.tellable or flight.slot not in source.group.exact:
            return
        group = source.group
        tick = group.bridge.credit(flight.slot, flight.hashes).tick
        group.dispatches.setdefault(flight.slot, deque(maxlen=MAX_BRIDGED)).append(_Dispatch(flight, tick))

    def answered(self, flight: Flight) -> None:
        """A flight was answered: soon its engine must have told its blocks."""
        source = self._sources.get(flight.slot)
        if source is None or not source.complete or not flight.tellable or not flight.hashes:
            return
        now = self._clock()
        if source.trial is None:
            source.trial = now + BRIDGE_S, flight.hashes, flight.model
        elif source.trial[0] <= now:
            self._try(flight.slot, source, now)

    def reported(self, flight: Flight, cached_tokens: int, block_tokens: int) -> None:
        """The engine reported how much of the flight's prompt it had cached."""
        verdict = verdict_on(flight.cached_tokens, cached_tokens, block_tokens)
        counts = self._estimates.get(flight.slot)
        if counts is None:
            counts = self._estimates[flight.slot] = dict.fromkeys(VERDICTS, 0)
        counts[verdict] += 1

    def restarted(self, slot: int) -> None:
        """The engine was restarted, unless its events have shown that already."""
        source = self._sources.get(slot)
        if source is not None and not (source.complete and self._clock() - source.since_s < RESTART_SEEN_S):
            self._drop(slot, source)

    def remove(self, slots: Iterable[int]) -> None:
        """Replicas have left the fleet."""
        for slot in slots:
            source = self._sources.pop(slot, None)
            if source is not None:
                self._drop(slot, source)
            self._estimates.pop(slot, None)
            self._told.pop(slot, None)

    def told_size(self, slot: int, gauges: EngineGauges, models: Iterable[ModelState]) -> None:
        """Take in what the engine says of its cache's size."""
        if not gauges.kv_tokens:
            return
        before = self.kv_tokens(slot)
        self._told[slot] = gauges.kv_tokens, gauges.block_tokens
        if self.kv_tokens(slot) != before:
            for model in models:
                model.set_capacity(slot, self.kv_tokens(slot))

    def size(self, model: ModelState) -> None:
        """Let the model's index believe of every replica that it keeps what its cache holds."""
        for slot in self._replicas.slots:
            model.set_capacity(slot, self.kv_tokens(slot))

    def kv_tokens(self, slot: int) -> int:
        """Tokens the replica's cache holds: as set, else as the engine says, else the default."""
        replica = self._replicas[slot]
        told = self._told.get(slot)
        return replica.kv_tokens if told is None or "kv_tokens" in replica.model_fields_set else told[0]

    def describe(self, slot: int) -> dict[str, Any]:
        """What is believed of one replica's cache, and on whose word, as plain data."""
        kv_tokens, block_tokens = self._told.get(slot, (None, None))
        shown: dict[str, Any] = {
            "source": "usage" if slot in self._estimates else "credit",
            "estimates": dict(self._estimates.get(slot, {})) or None,
            "engine_kv_tokens": kv_tokens,
            "engine_block_tokens": block_tokens,
            "events": None,
        }
        source = self._sources.get(slot)
        if source is None:
            return shown
        blocks = source.group.blocks
        if slot in blocks and source.refused is None:
            shown["source"] = "kv-events" if slot in source.group.exact else "kv-events-partial"
        shown["events"] = {
            "applied": source.events,
            "age_s": max(self._clock() - source.last_s, 0.0),
            "blocks": blocks.blocks(slot),
            "tokens": blocks.tokens(slot),
            "resets": source.resets,
            "confirmed_flights": source.confirmed,
            "missed_flights": source.missed,
            "refused": source.refused,
        }
        return shown

    # Steps; the lock is held

    def _most_blocks(self, slot: int, block_tokens: int) -> int:
        return max(MAX_CLAIM * self.kv_tokens(slot) // block_tokens, MIN_CLAIM_BLOCKS)

    def _drop(self, slot: int, source: _Source) -> None:
        """Forget what the engine told; the next event begins anew."""
        group = source.group
        source.resets += slot in group.blocks
        group.blocks.remove(slot)
        source.complete, source.missed_in_a_row, source.trial = False, 0, None
        self._judge(slot, source)

    def _judge(self, slot: int, source: _Source) -> None:
        group = source.group
        exact = source.exact and source.refused is None and slot in group.blocks
        if exact and slot not in group.exact:
            group.exact.add(slot)
            group.bridge.set_capacity(slot, BRIDGE_BLOCKS)
        elif not exact and slot in group.exact:
            group.exact.discard(slot)
            group.bridge.remove(slot)
            group.dispatches.pop(slot, None)

    def _expire_bridge(self, slot: int, source: _Source) -> None:
        """Let go of the dispatches whose prefill ended long enough ago for the engine to have told of them."""
        dispatches, now, tick = source.group.dispatches.get(slot), self._clock(), 0
        if not dispatches:
            return
        for dispatch in dispatches:
            if dispatch.left_queue_s is None and not (dispatch.flight.in_queue and dispatch.flight.slot == slot):
                dispatch.left_queue_s = min(dispatch.flight.first_token_s or dispatch.flight.prefill_ends_s, now)
        while dispatches and (left_s := dispatches[0].left_queue_s) is not None and now - left_s >= BRIDGE_S:
            tick = dispatches.popleft().tick
        if tick:
            source.group.bridge.expire(slot, tick)

    def _try(self, slot: int, source: _Source, now: float) -> None:
        """See whether the engine told the blocks of a flight it answered some seconds ago."""
        assert source.trial is not None
        _, hashes, model = source.trial
        source.trial = None
        if source.group.blocks.holds(slot, hashes, model):
            source.confirmed += 1
            source.missed_in_a_row = 0
        else:
            source.missed += 1
            source.missed_in_a_row += 1
            if source.missed_in_a_row >= DOUBTED_AFTER and now - source.last_s > SILENT_S:
                self._drop(slot, source)
        self._judge(slot, source)
