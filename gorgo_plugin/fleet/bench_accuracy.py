"""How true the estimate of cached tokens is to the engines, on a replay whose caches overflow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gorgo_plugin.fleet.replay import Replay
from gorgo_plugin.fleet.requests import ReplayRequest, Served
from gorgo_plugin.fleet.topology import Fleet, demo_fleet
from gorgo_plugin.settings import Settings

ENDLESS_TOKENS = 10**12  # a cache from which nothing is ever evicted


@dataclass(frozen=True, slots=True)
class Source:
    """What the router has to go by.

    Attributes:
        name: heading of its row.
        usage: answers end with the engine's usage.
        kv_events: engines publish what they store and evict.
        told: the cache size that the router is told, over the true one; None: that it is endless.
    """

    name: str
    usage: bool = False
    kv_events: bool = False
    told: float | None = 1.0


SOURCES = (
    Source("no feedback"),
    Source("usage", usage=True),
    Source("KV events and usage", usage=True, kv_events=True),
    Source("no feedback, cache told 30% too large", told=1.3),
    Source("usage, cache told 30% too large", usage=True, told=1.3),
    Source("usage, cache told 25% too small", usage=True, told=0.75),
    Source("never evicting, no feedback", told=None),
)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Estimated against true cached tokens of a run; shares are of the prompt tokens unless they say otherwise.

    Attributes:
        source: name of the row.
        requests: served.
        cached_share: truly cached.
        error_share: sum of the requests' absolute errors.
        over_share, under_share: its parts: believed cached and not so, and the other way round.
        mean_ratio, p95_ratio: of each request's absolute error over its own prompt.
        within_block: share of the requests whose error is at most one block.
        wall_s: how long the replay took.
    """

    source: str
    requests: int
    cached_share: float
    error_share: float
    over_share: float
    under_share: float
    mean_ratio: float
    p95_ratio: float
    within_block: float
    wall_s: float


def bench(
    requests: Sequence[ReplayRequest],
    kv_tokens: int,
    sources: Sequence[Source] = SOURCES,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> list[Accuracy]:
    """Replay the requests once per source on the demo's three regions, each with a cache of `kv_tokens`."""
    fleet = demo_fleet(kv_tokens=kv_tokens)
    rows = []
    for source in sources:
        say(source.name)
        started = time.perf_counter()
        served = _replay(requests, fleet, source, seed)
        rows.append(summarise(source.name, served, fleet.block_tokens, time.perf_counter() - started))
    return rows


def _replay(requests: Sequence[ReplayRequest], fleet: Fleet, source: Source, seed: int) -> list[Served]:
    true_tokens = fleet.replicas[0].engine.kv_tokens
    told = ENDLESS_TOKENS if source.told is None else int(true_tokens * source.told)
    settings = Settings.model_validate(
        {
            "replicas": [
                {"name": region, "region": region, "url": f"http://{region}:80", "kv_tokens": told}
                for region in fleet.regions
            ],
            "seed": seed,
        }
    )
    return Replay(settings, fleet, usage=source.usage, kv_events=source.kv_events, seed=seed).run(requests)


def summarise(source: str, served: Sequence[Served], block_tokens: int, wall_s: float) -> Accuracy:
    """The figures of one run."""
    prompt, cached, estimated = (
        np.array([getattr(one, name) for one in served], dtype=np.float64)
        for name in ("prompt_tokens", "cached_tokens", "estimated_tokens")
    )
    error, total = estimated - cached, prompt.sum()
    ratios = np.abs(error) / prompt
    return Accuracy(
        source=source,
        requests=len(served),
        cached_share=float(cached.sum() / total),
        error_share=float(np.abs(error).sum() / total),
        over_share=float(error.clip(min=0).sum() / total),
        under_share=float((-error).clip(min=0).sum() / total),
        mean_ratio=float(ratios.mean()),
        p95_ratio=float(np.percentile(ratios, 95)),
        within_block=float((np.abs(error) <= block_tokens).mean()),
        wall_s=wall_s,
    )
