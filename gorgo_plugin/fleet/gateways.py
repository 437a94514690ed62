"""Which gateways a fleet has, what each of them routes to, and through which one a client enters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gorgo_plugin.fleet.engine import Engine
from gorgo_plugin.fleet.links import Link, Links
from gorgo_plugin.fleet.requests import Call
from gorgo_plugin.fleet.topology import Fleet, FleetClients, FleetError, FleetReplica
from gorgo_plugin.policies import POLICIES
from gorgo_plugin.router import Router
from gorgo_plugin.settings import ReplicaSettings, Settings
from gorgo_plugin.signals import EngineGauges


@dataclass(slots=True)
class Site:
    """One replica: its engine, how many events keep it down, and the requests there by the engine's id."""

    number: int
    replica: FleetReplica
    engine: Engine
    downs: int = 0
    calls: dict[Hashable, Call] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name."""
        return self.replica.name

    @property
    def up(self) -> bool:
        """Whether it runs."""
        return not self.downs


@dataclass(slots=True)
class Target:
    """Where a gateway can send a request: a replica, or another gateway that has the replicas of its region.

    Attributes:
        link: the way there.
        sites: the replica, or those behind the other gateway.
        gateway: the other gateway.
        refused: probes in a row that were.
        latest_s: when the last request arrives there.
        told_s: when the last KV events arrive.
    """

    link: Link
    sites: list[Site]
    gateway: Gateway | None = None
    refused: int = 0
    latest_s: float = 0.0
    told_s: float = 0.0

    def arrival_s(self, sent_s: float) -> float:
        """When a request sent now arrives: jitter is made by queues, in which nothing overtakes what went before."""
        self.latest_s = max(sent_s + self.link.one_way_s(sent_s), self.latest_s)
        return self.latest_s

    def gauges(self) -> EngineGauges | None:
        """What the engines there say of themselves now; None while none runs."""
        told = [site.engine.gauges for site in self.sites if site.up]
        if not told:
            return None
        return EngineGauges(
            running=sum(one.running for one in told),
            waiting=sum(one.waiting for one in told),
            kv_usage=sum(one.kv_usage for one in told) / len(told),
            used_tokens=sum(one.used_tokens for one in told),
        )


@dataclass(slots=True)
class Gateway:
    """One gateway.

    Attributes:
        region: where it is.
        targets: what its router knows, by name.
        own: the names that a request which another gateway sent may go to.
    """

    region: str
    router: Router
    targets: dict[str, Target]
    own: list[str]

    @property
    def reads_gauges(self) -> bool:
        """Whether its policy decides by the engines' gauges."""
        return POLICIES[self.router.settings.policy].reads_gauges


class Routers:
    """Makes the routers of the gateways, one after the other, from the snapshots that are given for them."""

    def __init__(self, clock: Callable[[], float], states: Sequence[Mapping[str, Any]]) -> None:
        self._clock = clock
        self._states = iter(states)

    def next(self, settings: Settings) -> Router:
        """One more."""
        return Router(settings, self._clock, next(self._states, None))


@dataclass(frozen=True, slots=True)
class Door:
    """Where the requests of one client region enter; `link` is None where there is no way to go."""

    client: str
    share: float
    gateway: Gateway
    link: Link | None


def plain_gateways(
    settings: Settings, fleet: Fleet, sites: Sequence[Site], links: Links, routers: Routers
) -> list[Gateway]:
    """The fleet's gateways, each of which routes to every replica."""
    known = settings.replicas or [_replica_settings(site) for site in sites]
    told = settings.model_copy(update={"replicas": known, "block_tokens": fleet.block_tokens})
    return [
        Gateway(
            gateway.region,
            routers.next(told),
            {site.name: Target(links.between(gateway.region, site.replica.region), [site]) for site in sites},
            [],
        )
        for gateway in fleet.gateways
    ]


def distributed_gateways(
    settings: Settings, fleet: Fleet, sites: Sequence[Site], links: Links, routers: Routers
) -> list[Gateway]:
    """A balancer in each region that has replicas: it routes to them, or to the balancer of another region.

    Raises:
        FleetError: two of the regions have no link.
    """
    by_region = {region: [site for site in sites if site.replica.region == region] for region in fleet.regions}
    balancers = {}
    for region, local in by_region.items():
        own = [_replica_settings(site) for site in local]
        peers = [_peer_settings(peer, behind) for peer, behind in by_region.items() if peer != region]
        told = settings.model_copy(update={"replicas": own + peers, "block_tokens": fleet.block_tokens})
        targets = {site.name: Target(links.between(region, region), [site]) for site in local}
        balancers[region] = Gateway(region, routers.next(told), targets, list(targets))
    for region, balancer in balancers.items():
        for peer, behind in by_region.items():
            if peer != region:
                way = Target(links.between(region, peer), behind, balancers[peer])
                balancer.targets[_peer_name(peer)] = way
    return list(balancers.values())


def _peer_name(region: str) -> str:
    return f"balancer of {region}"


def _peer_settings(region: str, behind: Sequence[Site]) -> ReplicaSettings:
    kv_tokens = sum(site.replica.engine.kv_tokens for site in behind)
    url = f"http://balancer-{behind[0].number}:80"
    return ReplicaSettings(name=_peer_name(region), region=region, url=url, kv_tokens=kv_tokens)


def _replica_settings(site: Site) -> ReplicaSettings:
    replica = site.replica
    return ReplicaSettings(
        name=replica.name,
        region=replica.region,
        url=f"http://replica-{site.number}:80",
        kv_tokens=replica.engine.kv_tokens,
    )


def doors(fleet: Fleet, gateways: Sequence[Gateway], links: Links, *, as_told: bool) -> list[Door]:
    """One door per region of clients: the gateway that the fleet names (`as_told`), else the nearest.

    A fleet that names no clients has them beside its gateways.

    Raises:
        FleetError: no gateway can be reached from a region.
    """
    by_region = {gateway.region: gateway for gateway in gateways}
    beside = [FleetClients(region=gateway.region) for gateway in fleet.gateways]
    return [_door(fleet, one, by_region, links, as_told, beside=not fleet.clients) for one in fleet.clients or beside]


def _door(
    fleet: Fleet, one: FleetClients, gateways: Mapping[str, Gateway], links: Links, as_told: bool, beside: bool
) -> Door:
    if beside and one.region in gateways:
        return Door(one.region, one.share, gateways[one.region], None)
    rtt_ms = {region: link.rtt_ms for region in gateways if (link := fleet.link(one.region, region)) is not None}
    if not rtt_ms:
        raise FleetError(f"links: none between '{one.region}', where requests come from, and {', '.join(gateways)}")
    nearest = min(rtt_ms, key=rtt_ms.__getitem__)
    region = one.gateway if as_told and one.gateway is not None else nearest
    return Door(one.region, one.share, gateways[region], links.between(one.region, region))
