"""A replay in virtual time: one router, and engines behind their networks, driven by one ordered queue of events.

Nothing waits and nothing runs in parallel, so that an hour of trace takes seconds and the same inputs give the same
outcome. The router and the engines are the ones that run live.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.decision import Prompt
from gorgo_plugin.fleet.block_cache import Change, Cleared, Removed
from gorgo_plugin.fleet.engine import Engine, EngineProfile, EngineRequest, Event, Finished, FirstToken
from gorgo_plugin.fleet.network import Network
from gorgo_plugin.prefix import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from gorgo_plugin.router import Router
from gorgo_plugin.settings import Settings


@dataclass(frozen=True, slots=True)
class ReplayReplica:
    """One replica: an engine, a round trip away from the router.

    Attributes:
        name: unique; also what the router knows it by.
        rtt_ms, jitter_ms: mean and standard deviation of the round trip.
        profile: what the engine is like.
    """

    name: str
    rtt_ms: float
    jitter_ms: float
    profile: EngineProfile


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """One request. What is long is made when the request arrives, so that a trace's tokens are never held together.

    Attributes:
        at_s: arrival, seconds from the start.
        prompt_tokens: tokens of the prompt.
        output_tokens: tokens to generate.
        tokens: () -> token ids of prompt and answer together, uint32, shape (prompt_tokens + output_tokens,).
        blocks: () -> the engine's keys of the full blocks of prompt and answer together.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    tokens: Callable[[], NDArray[np.uint32]]
    blocks: Callable[[], Sequence[int]]


@dataclass(slots=True)
class Served:
    """What became of one request.

    Attributes:
        index: its place in the workload.
        at_s: arrival.
        replica: who served it.
        prompt_tokens: length of the prompt.
        estimated_tokens: prompt tokens that the router believed cached there when it decided.
        cached_tokens: prompt tokens that the engine found cached when it admitted the request.
        predicted_ms, ttft_ms: time to the first token, as predicted and as seen at the router.
        e2e_ms: time to the last token, as seen there.
    """

    index: int
    at_s: float
    replica: str
    prompt_tokens: int
    estimated_tokens: int
    predicted_ms: float
    cached_tokens: int = 0
    ttft_ms: float = math.nan
    e2e_ms: float = math.nan


@dataclass(slots=True)
class _UnderWay:
    """A request that was dispatched and not answered yet.

    Attributes:
        places: block key -> which block of the request it is; empty where the engine publishes nothing.
        tokens: of prompt and answer.
        latest_s: when what came last of it arrives.
    """

    flight_id: int
    served: Served
    places: dict[int, int]
    tokens: NDArray[np.uint32]
    latest_s: float = 0.0


@dataclass(slots=True)
class _Site:
    """One replica in the replay."""

    name: str
    network: Network
    engine: Engine
    under_way: dict[int, _UnderWay] = field(default_factory=dict)  # by number of the request
    told_s: float = 0.0  # when the last KV events arrive

    def way_back(self, sent_s: float, latest_s: float) -> float:
        """When what is sent at `sent_s` arrives: not before what was sent earlier and arrives at `latest_s`."""
        return max(sent_s + self.network.one_way_s(), latest_s)


class Replay:
    """One run of a workload.

    Args:
        settings: of the router; its replicas must be named like `replicas`.
        replicas: the engines.
        usage: whether answers end with the engine's usage, as `stream_options.include_usage` asks for.
        kv_events: whether the engines publish what they store and evict.
        seed: seeds the engines and the networks.
    """

    def __init__(
        self,
        settings: Settings,
        replicas: Sequence[ReplayReplica],
        *,
        usage: bool = True,
        kv_events: bool = False,
        seed: int = 0,
    ) -> None:
        self._now = 0.0
        self.router = Router(settings, clock=lambda: self._now)
        self._usage = usage
        self._kv_events = kv_events
        self._probe_every_s = settings.probe.interval_s
        self._sites = [
            _Site(
                replica.name,
                Network(replica.rtt_ms, replica.jitter_ms, random.Random(seed * len(replicas) + number)),
                Engine(replica.profile, seed * len(replicas) + number, record_changes=kv_events),
            )
            for number, replica in enumerate(replicas)
        ]
        self._by_name = {site.name: site for site in self._sites}
        self._queue: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._order = 0
        self._served: list[Served] = []
        self._open = 0

    def run(self, requests: Iterable[ReplayRequest]) -> list[Served]:
        """Serve `requests`, which come in order of arrival, to the end of the last answer."""
        coming = enumerate(requests)
        self._arrive_next(coming)
        for site in self._sites:
            self._at(0.0, self._probe, site)
            if self._kv_events:
                self.router.engine_caches.observe(site.name, (), from_start=True)
        while self._open:
            self._advance(self._queue[0][0])
            self._now, _, action, arguments = heapq.heappop(self._queue)
            if action == self._arrive:
                self._arrive_next(coming)
            action(*arguments)
        return self._served

    def _at(self, at_s: float, action: Callable[..., object], *arguments: Any) -> None:
        self._order += 1
        heapq.heappush(self._queue, (at_s, self._order, action, arguments))

    def _advance(self, limit_s: float) -> None:
        """Let the engines work up to the next thing that happens elsewhere, or to the first answer before it."""
        while True:
            due = [(at_s, site) for site in self._sites if (at_s := site.engine.next_event_s()) is not None]
            if not due:
                return
            at_s, site = min(due, key=lambda one: one[0])
            if at_s > limit_s:
                return
            for event in site.engine.advance(at_s):
                request = site.under_way[int(str(event.id))]
                request.latest_s = site.way_back(event.at_s, request.latest_s)
                self._at(request.latest_s, self._answer, site, request, event)
            if self._kv_events:
                self._tell(site, at_s)
            limit_s = min(limit_s, self._queue[0][0])

    def _tell(self, site: _Site, at_s: float) -> None:
        """Publish what changed in the cache up to the end of a step."""
        events = [self._kv_event(site, change) for change in site.engine.take_changes()]
        if events:
            site.told_s = site.way_back(at_s, site.told_s)
            self._at(site.told_s, self.router.engine_caches.observe, site.name, events)

    def _kv_event(self, site: _Site, change: Change) -> KvEvent:
        if isinstance(change, Removed):
            return BlockRemoved((change.key,))
        if isinstance(change, Cleared):
            return AllBlocksCleared()
        size, key = site.engine.profile.block_tokens, change.keys[0]
        request = next(request for request in site.under_way.values() if key in request.places)
        first = request.places[key]
        tokens = request.tokens[first * size : (first + len(change.keys)) * size]
        return BlockStored(change.keys, change.parent, tokens, size)

    def _arrive_next(self, coming: enumerate[ReplayRequest]) -> None:
        for index, request in coming:
            self._open += 1
            self._at(request.at_s, self._arrive, index, request)
            return

    def _arrive(self, index: int, request: ReplayRequest) -> None:
        tokens, blocks = request.tokens(), request.blocks()
        decision = self.router.route(Prompt(tokens=tokens[: request.prompt_tokens]))
        cost = decision.costs[decision.replica]
        served = Served(
            index, self._now, decision.replica, request.prompt_tokens, cost.cached_tokens, cost.predicted_ttft_ms
        )
        site = self._by_name[decision.replica]
        places = {key: place for place, key in enumerate(blocks)} if self._kv_events else {}
        site.under_way[index] = _UnderWay(decision.flight_id, served, places, tokens)
        engine_request = EngineRequest(index, request.prompt_tokens, request.output_tokens, blocks)
        self._at(self._now + site.network.one_way_s(), self._submit, site, engine_request)

    def _submit(self, site: _Site, request: EngineRequest) -> None:
        site.engine.submit(request, self._now)

    def _answer(self, site: _Site, request: _UnderWay, event: Event) -> None:
        flight_id, served = request.flight_id, request.served
        if isinstance(event, FirstToken):
            served.cached_tokens = event.cached_tokens
            served.ttft_ms = (self._now - served.at_s) * 1e3
            self.router.first_token(flight_id)
        elif isinstance(event, Finished):
            if self._usage:
                self.router.usage(flight_id, served.prompt_tokens, event.cached_tokens, event.generated)
            self.router.finish(flight_id)
            served.e2e_ms = (self._now - served.at_s) * 1e3
            del site.under_way[served.index]
            self._served.append(served)
            self._open -= 1

    def _probe(self, site: _Site) -> None:
        self.router.observe_rtt(site.name, 2 * site.network.one_way_s())
        self._at(self._now + self._probe_every_s, self._probe, site)
