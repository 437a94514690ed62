"""A replay in virtual time: gateways with their routers, and engines behind their links, driven by one ordered queue.

Nothing waits and nothing runs in parallel, so that an hour of trace takes seconds and the same inputs give the same
outcome. The routers and the engines are the ones that run live.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gorgo_plugin.decision import Prompt
from gorgo_plugin.fleet.block_cache import Change, Cleared, Removed
from gorgo_plugin.fleet.engine import Engine, EngineRequest, Event, Finished, FirstToken
from gorgo_plugin.fleet.gateways import (
    Door,
    Gateway,
    Routers,
    Site,
    Target,
    distributed_gateways,
    doors,
    plain_gateways,
)
from gorgo_plugin.fleet.links import Links
from gorgo_plugin.fleet.requests import Call, Leg, ReplayRequest, Served
from gorgo_plugin.fleet.topology import DownEvent, Fleet, FleetError, FleetEvent, RttEvent, SlowEvent
from gorgo_plugin.prefix import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from gorgo_plugin.runtime.probes import FAILURES_BEFORE_UNHEALTHY
from gorgo_plugin.settings import Settings

RETRY_PAUSE_S = 1.0  # before a request that every replica has failed is tried again, as clients do
GAUGES_EVERY_S = 1.0  # the papers' rate


class Replay:
    """One run of a workload.

    Args:
        settings: of the routers; where they name no replicas, those of the fleet.
        fleet: engines, gateways, clients, links and events.
        seed: seeds engines, links and where a session's clients are.
        distributed: a balancer in each region that has replicas, instead of the fleet's gateways.
        states: snapshots that the gateways' routers begin with, in their order; none given: they begin with nothing.
        usage: whether answers end with the engine's usage, as `stream_options.include_usage` asks for.
        kv_events: whether the engines publish what they store and evict.
        on_served: called when a request's answer is complete.
    """

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        *,
        seed: int = 0,
        distributed: bool = False,
        states: Sequence[Mapping[str, Any]] = (),
        usage: bool = True,
        kv_events: bool = False,
        on_served: Callable[[], None] = lambda: None,
    ) -> None:
        self.now_s = 0.0
        self._seed = seed
        self._usage = usage
        self._kv_events = kv_events
        self._on_served = on_served
        self._probe_every_s = settings.probe.interval_s
        self._links = Links(fleet, seed)
        self.sites = [
            Site(number, replica, Engine(replica.engine, seed * len(fleet.replicas) + number, record_changes=kv_events))
            for number, replica in enumerate(fleet.replicas)
        ]
        stand = distributed_gateways if distributed else plain_gateways
        routers = Routers(lambda: self.now_s, states)
        self.gateways = stand(settings, fleet, self.sites, self._links, routers)
        self._doors = doors(fleet, self.gateways, self._links, as_told=not distributed)
        self._queue: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._order = 0
        self._served: list[Served] = []
        self._open = 0
        for event in fleet.events:
            self.at(event.at_s, self._begin, event)

    def run(self, requests: Iterable[ReplayRequest]) -> list[Served]:
        """Serve `requests`, which come in order of arrival, to the end of the last answer.

        Raises:
            FleetError: a request comes from a region without clients, or no engine could ever serve it.
        """
        coming = enumerate(requests)
        self._send_next(coming)
        for gateway in self.gateways:
            self._watch(gateway)
        while self._open:
            self._advance(self._queue[0][0])
            self.now_s, _, action, arguments = heapq.heappop(self._queue)
            action(*arguments)
        return self._served

    def at(self, at_s: float, action: Callable[..., object], *arguments: Any) -> None:
        """Do something at a time that is not past yet."""
        self._order += 1
        heapq.heappush(self._queue, (at_s, self._order, action, arguments))

    # The engines

    def _advance(self, limit_s: float) -> None:
        """Let the engines work up to the next thing that happens elsewhere.

        What they answer until then may reach a gateway before that thing, but makes nobody send them anything.
        """
        for site in self.sites:
            while (at_s := site.engine.next_event_s()) is not None and at_s <= limit_s:
                for event in site.engine.advance(at_s if self._kv_events else limit_s):
                    call = site.calls[event.id]
                    self._answer(call, len(call.legs) - 1, event, event.at_s)
                if self._kv_events:
                    self._tell(site, at_s)

    def _tell(self, site: Site, at_s: float) -> None:
        """Publish what changed in the cache up to the end of a step."""
        events = [self._kv_event(site, change) for change in site.engine.take_changes()]
        if events:
            for gateway, target in self._watchers(site):
                target.told_s = max(at_s + target.link.one_way_s(at_s), target.told_s)
                self.at(target.told_s, gateway.router.engine_caches.observe, site.name, events)

    def _watchers(self, site: Site) -> list[tuple[Gateway, Target]]:
        return [(gateway, gateway.targets[site.name]) for gateway in self.gateways if site.name in gateway.targets]

    def _kv_event(self, site: Site, change: Change) -> KvEvent:
        if isinstance(change, Removed):
            return BlockRemoved((change.key,))
        if isinstance(change, Cleared):
            return AllBlocksCleared()
        size, key = site.engine.profile.block_tokens, change.keys[0]
        call = next(call for call in site.calls.values() if key in call.places)
        first = call.places[key]
        tokens = call.tokens[first * size : (first + len(change.keys)) * size]
        return BlockStored(change.keys, change.parent, tokens, size)

    # A request on its way

    def _send_next(self, coming: enumerate[ReplayRequest]) -> None:
        for index, request in coming:
            self._open += 1
            self.at(request.at_s, self._send, index, request, coming)
            return

    def _send(self, index: int, request: ReplayRequest, coming: enumerate[ReplayRequest]) -> None:
        self._send_next(coming)
        door = self._door_of(index, request)
        served = Served(index, request.at_s, door.client, door.gateway.region, request.prompt_tokens)
        tokens, blocks = request.tokens(), request.blocks()
        prompt = Prompt(tokens=tokens[: request.prompt_tokens], affinity_key=request.session or None)
        work = EngineRequest(index, request.prompt_tokens, request.output_tokens, blocks)
        places = {key: place for place, key in enumerate(blocks)} if self._kv_events else {}
        call = Call(str(index), served, prompt, work, tokens, places, door)
        if door.link is None:
            self._dispatch(call, door.gateway)
        else:
            call.entered_s = self.now_s + door.link.one_way_s(self.now_s)
            self.at(call.entered_s, self._dispatch, call, door.gateway)

    def _door_of(self, index: int, request: ReplayRequest) -> Door:
        """Where a request comes from: as it says, else by share, the same for all requests of a session."""
        if request.client:
            for door in self._doors:
                if door.client == request.client:
                    return door
            raise FleetError(f"clients: none in '{request.client}', where request {index} of the workload comes from")
        if len(self._doors) == 1:
            return self._doors[0]
        rng = random.Random(f"{self._seed}/client/{request.session or index}")
        return rng.choices(self._doors, [door.share for door in self._doors])[0]

    def _dispatch(self, call: Call, gateway: Gateway) -> None:
        """A gateway routes a request: to any replica, or to one of its own where another gateway sent it."""
        candidates = gateway.own if call.legs else None
        decision = gateway.router.route(call.prompt, candidates, request_id=call.id)
        target = gateway.targets[decision.replica]
        if not call.legs:
            cost, served = decision.costs[decision.replica], call.served
            served.attempts += 1
            served.estimated_tokens = cost.cached_tokens
            served.predicted_network_ms, served.predicted_queue_ms = cost.network_ms, cost.queue_ms
            served.predicted_prefill_ms, served.predicted_ms = cost.prefill_ms, cost.predicted_ttft_ms
        call.legs.append(Leg(gateway, target, decision.flight_id))
        arrival_s = target.arrival_s(self.now_s)
        if target.gateway is not None:
            self.at(arrival_s, self._dispatch, call, target.gateway)
        else:
            self.at(arrival_s, self._submit, call, target.sites[0])

    def _submit(self, call: Call, site: Site) -> None:
        if not site.up:
            self._answer(call, len(call.legs) - 1, "unreached", self.now_s)
            return
        site.calls[call.work.id] = call
        call.served.replica, call.submitted_s = site.number, self.now_s
        try:
            site.engine.submit(call.work, self.now_s)
        except ValueError as error:
            raise FleetError(f"replicas.{site.number}.engine: request {call.id} of the workload: {error}") from None

    # Its answer, back the way it came

    def _answer(self, call: Call, level: int, what: Event | str, sent_s: float) -> None:
        """Send an engine's event, or the kind of a failure, to the gateway at that place of the way."""
        leg = call.legs[level]
        leg.latest_s = max(sent_s + leg.target.link.one_way_s(sent_s), leg.latest_s)  # nothing overtakes
        self.at(leg.latest_s, self._receive, call, level, what)

    def _receive(self, call: Call, level: int, what: Event | str) -> None:
        leg = call.legs[level]
        router = leg.gateway.router
        if isinstance(what, FirstToken):
            router.first_token(leg.flight_id)
        elif isinstance(what, Finished):
            if self._usage:
                router.usage(leg.flight_id, call.served.prompt_tokens, what.cached_tokens, what.generated)
            router.finish(leg.flight_id)
            for site in leg.target.sites:
                site.calls.pop(call.work.id, None)
        elif isinstance(what, str):
            router.fail(leg.flight_id, what)
        if level:
            self._answer(call, level - 1, "rejected" if isinstance(what, str) else what, self.now_s)
        elif isinstance(what, str):
            self._retry(call)
        else:
            self._deliver(call, what)

    def _retry(self, call: Call) -> None:
        """Begin anew at the first gateway, which knows by the request's id whom it tried."""
        gateway = call.legs[0].gateway
        call.legs = []
        if call.served.attempts % len(gateway.targets):
            self._dispatch(call, gateway)
        else:
            self.at(self.now_s + RETRY_PAUSE_S, self._dispatch, call, gateway)

    def _deliver(self, call: Call, what: Event) -> None:
        """Take the client's times."""
        served, link = call.served, call.door.link
        seen_s = self.now_s if link is None else self.now_s + link.one_way_s(self.now_s)
        call.seen_s = seen_s = max(seen_s, call.seen_s)
        if isinstance(what, FirstToken):
            served.cached_tokens = what.cached_tokens
            served.ttft_ms = (seen_s - served.at_s) * 1e3
            served.entry_ms = (seen_s - self.now_s + max(call.entered_s - served.at_s, 0.0)) * 1e3
            served.queue_ms = (what.started_s - call.submitted_s) * 1e3
            served.prefill_ms = (what.at_s - what.started_s) * 1e3
        elif isinstance(what, Finished):
            served.e2e_ms = (seen_s - served.at_s) * 1e3
            self._served.append(served)
            self._open -= 1
            self._on_served()

    # What gateways look at between requests

    def _watch(self, gateway: Gateway) -> None:
        """Begin to probe and to read gauges. A round trip is known from the start: gateways probe before they serve."""
        settings = gateway.router.settings
        scrape_s = settings.metrics.interval_s or (GAUGES_EVERY_S if gateway.reads_gauges else None)
        for number, (name, target) in enumerate(gateway.targets.items()):
            share = number / len(gateway.targets)
            gateway.router.observe_rtt(name, 2 * target.link.one_way_s(0.0))
            self.at(share * self._probe_every_s, self._probe, gateway, name, target)
            if scrape_s is not None:
                self.at(share * scrape_s, self._scrape, gateway, name, target, scrape_s)
            if self._kv_events and target.gateway is None:
                gateway.router.engine_caches.observe(name, (), from_start=True)

    def _probe(self, gateway: Gateway, name: str, target: Target) -> None:
        rtt_s = target.link.one_way_s(self.now_s) + target.link.one_way_s(self.now_s)
        up = target.gateway is not None or target.sites[0].up
        self.at(self.now_s + rtt_s, self._probed, gateway, name, target, rtt_s if up else None)
        self.at(self.now_s + self._probe_every_s, self._probe, gateway, name, target)

    def _probed(self, gateway: Gateway, name: str, target: Target, rtt_s: float | None) -> None:
        """As the runtime's probes take it: refused twice is unhealthy, and an answer after that is a restart."""
        router = gateway.router
        if rtt_s is None:
            target.refused += 1
            if target.refused == FAILURES_BEFORE_UNHEALTHY:
                router.set_health(name, False)
            return
        if target.refused:
            target.refused = 0
            router.forget(name)
        router.observe_rtt(name, rtt_s)
        router.set_health(name, True)

    def _scrape(self, gateway: Gateway, name: str, target: Target, every_s: float) -> None:
        self.at(self.now_s + target.link.one_way_s(self.now_s), self._read, gateway, name, target)
        self.at(self.now_s + every_s, self._scrape, gateway, name, target, every_s)

    def _read(self, gateway: Gateway, name: str, target: Target) -> None:
        gauges = target.gauges()
        if gauges is not None:
            arrival_s = self.now_s + target.link.one_way_s(self.now_s)
            self.at(arrival_s, gateway.router.observe_gauges, name, gauges)

    # What happens to the fleet

    def _begin(self, event: FleetEvent) -> None:
        if isinstance(event, RttEvent):
            self._links.between(*event.between).event_factor *= event.factor
        elif isinstance(event, SlowEvent):
            self._site(event.replica).engine.change_speed(event.factor, self.now_s)
        else:
            self._die(self._site(event.replica))
        if event.for_s is not None:
            self.at(event.at_s + event.for_s, self._end, event)

    def _end(self, event: FleetEvent) -> None:
        if isinstance(event, RttEvent):
            self._links.between(*event.between).event_factor /= event.factor
        elif isinstance(event, SlowEvent):
            self._site(event.replica).engine.change_speed(1.0 / event.factor, self.now_s)
        elif isinstance(event, DownEvent):
            self._site(event.replica).downs -= 1

    def _die(self, site: Site) -> None:
        site.downs += 1
        for identity in site.engine.restart(self.now_s):
            call = site.calls.pop(identity)
            self._answer(call, len(call.legs) - 1, "rejected", self.now_s)

    def _site(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)
