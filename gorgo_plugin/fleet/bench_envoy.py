"""What the service costs Envoy: no filter, a service that does nothing, and gorgo, in turn, before instant upstreams.

All three have the same Envoy, the same routes and the same upstreams; the service that does nothing has the server, the
loop, the filters and the messages of gorgo's, and ends its streams when gorgo does. CPU is the service process's own
(user and system, all threads).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
import psutil

from gorgo_plugin.envoy_ext_proc.envoy_yaml import envoy_config
from gorgo_plugin.fleet.envoy import all_well, envoy_proxy, ext_proc_service, gateway_settings, remove_filters
from gorgo_plugin.fleet.passages import Passage
from gorgo_plugin.fleet.processes import Child, ProcessError, first_line, running
from gorgo_plugin.fleet.slices import Slice, cpu_s
from gorgo_plugin.fleet.statistics import Ratio, median_ratio
from gorgo_plugin.settings import Settings

NO_FILTER, IDLE, OURS = VARIANTS = ("no filter", "does nothing", "gorgo")
UPSTREAMS = 3
KV_TOKENS = 10_000_000  # instant upstreams have no cache to overflow
MESSAGE_WORDS = 300  # of the messages a conversation begins with
TURN_WORDS = 40  # of each message that follows
TURNS = 6  # of each conversation that are counted
CHARS_PER_WORD = 5.4  # of passages, with the space
UNCOUNTED_TURNS = 2
_CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Load:
    """Clients in a closed loop, with conversations that begin at `body_bytes` and grow by a turn per request.

    The variants are measured slice by slice in turn, so that a slow second of the machine falls on none alone. Each
    slice has conversations of its own, so many a client; their first turns, where all the text is new, are not counted.
    """

    clients: int
    body_bytes: int
    slices: int
    conversations: int


LOADS = {
    "1 KB, 1 client": Load(1, 1_000, 8, 6),
    "80 KB, 1 client": Load(1, 80_000, 8, 6),
    "1 KB, 32 clients": Load(32, 1_000, 4, 2),
    "80 KB, 32 clients": Load(32, 80_000, 4, 2),
}
WARM_UP = Load(4, 1_000, 2, 2)


@dataclass(frozen=True, slots=True)
class Figures:
    """One variant under one load, over all rounds.

    Attributes:
        cpu_ms: CPU of the service per request.
        p50_ms, p99_ms: time of a request, to the end of its answer.
        added_p50_ms, added_p99_ms: the same less the figure without a filter.
        requests_per_s: completed.
    """

    cpu_ms: float
    p50_ms: float
    p99_ms: float
    added_p50_ms: float
    added_p99_ms: float
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """One load: the figures of each variant, and gorgo's CPU over that of the service that does nothing.

    `cpu_ratio` is the median over pairs of slices with its 95% interval, `cpu_ratio_total` the ratio of the sums.
    """

    load: str
    figures: Mapping[str, Figures]
    cpu_ratio: Ratio
    cpu_ratio_total: float


@dataclass(frozen=True, slots=True)
class Gateway:
    """One variant as it runs: where requests go, and whose CPU counts."""

    url: str
    service: psutil.Process | None
    status_url: str | None = None


async def bench(folder: Path, rounds: int, done: Callable[[str], None]) -> list[Result]:
    """Measure all loads, `rounds` times, each time with new processes.

    Raises:
        ProcessError: a process did not start, or a request was not answered or not routed.
    """
    numbers = itertools.count()
    slices: dict[tuple[str, str], list[Slice]] = {}
    for number in range(1, rounds + 1):
        async with _gateways(folder) as gateways, aiohttp.ClientSession() as session:
            await _measure(session, gateways, WARM_UP, numbers)
            for name, load in LOADS.items():
                done(f"round {number} of {rounds}: {name}")
                for variant, some in (await _measure(session, gateways, load, numbers)).items():
                    slices.setdefault((name, variant), []).extend(some)
            await _check_all_were_routed(session, gateways[OURS])
    return [result(name, {variant: slices[name, variant] for variant in VARIANTS}) for name in LOADS]


@contextlib.asynccontextmanager
async def _gateways(folder: Path) -> AsyncIterator[dict[str, Gateway]]:
    """The three variants side by side, before the same upstreams."""
    async with contextlib.AsyncExitStack() as stack:
        urls: dict[str, str] = await first_line(
            await stack.enter_async_context(_child("upstreams", f"upstreams({UPSTREAMS})", folder))
        )
        gateways: dict[str, Gateway] = {}
        for variant in VARIANTS:
            name = variant.replace(" ", "-")
            # The instant upstreams have no pages to probe or scrape but their one endpoint.
            content = gateway_settings(urls, kv_tokens=KV_TOKENS, metrics={"path": None}, envoy={"health_path": None})
            settings = Settings.model_validate(content)
            config = envoy_config(settings)
            service, status_url = None, None
            if variant == NO_FILTER:
                remove_filters(config)
            elif variant == IDLE:
                path = folder / f"{name}.json"
                path.write_text(settings.model_dump_json())
                child = await stack.enter_async_context(_child(name, f"idle_service({str(path)!r})", folder))
                await first_line(child)
                service = psutil.Process(child.pid)
            else:
                status_url, child = await stack.enter_async_context(ext_proc_service(content, folder, name))
                service = psutil.Process(child.pid)
            envoy = await stack.enter_async_context(envoy_proxy(config, folder, name))
            if service is not None:
                await all_well(envoy, config)
            gateways[str(variant)] = Gateway(f"http://{settings.envoy.gateway_listen}", service, status_url)
        yield gateways


def _child(name: str, call: str, folder: Path) -> contextlib.AbstractAsyncContextManager[Child]:
    code = f"from gorgo_plugin.fleet.bench_envoy_children import *; {call}"
    return running(name, [sys.executable, "-c", code], folder / f"{name}.log", read_output=True)


async def _measure(
    session: aiohttp.ClientSession, gateways: Mapping[str, Gateway], load: Load, numbers: Iterator[int]
) -> dict[str, list[Slice]]:
    slices: dict[str, list[Slice]] = {variant: [] for variant in gateways}
    for number in range(load.slices):
        order = list(gateways)[:: 1 if number % 2 == 0 else -1]
        for variant in order:
            clients = [[_bodies(load, next(numbers)) for _ in range(load.conversations)] for _ in range(load.clients)]
            for bodies in itertools.chain(*clients):
                for _ in range(UNCOUNTED_TURNS):
                    await _ask(session, gateways[variant].url, next(bodies))
            slices[variant].append(await _slice(session, gateways[variant], clients))
    return slices


def _bodies(load: Load, number: int) -> Iterator[bytes]:
    """The requests of one conversation."""
    name, words = f"bench-envoy/{number}", round(load.body_bytes / CHARS_PER_WORD)
    messages = [{"role": "system", "content": Passage(name, words % MESSAGE_WORDS).text}]
    for role, part in zip(itertools.cycle(("user", "assistant")), range(words // MESSAGE_WORDS)):
        messages.append({"role": role, "content": Passage(f"{name}/{part}", MESSAGE_WORDS).text})
    for turn in itertools.count():
        messages.append({"role": "user", "content": Passage(f"{name}/turn/{turn}", TURN_WORDS).text})
        yield msgspec.json.encode(
            {"model": "m", "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        )
        messages.append({"role": "assistant", "content": Passage(f"{name}/reply/{turn}", TURN_WORDS).text})


async def _slice(
    session: aiohttp.ClientSession, gateway: Gateway, clients: Sequence[Sequence[Iterator[bytes]]]
) -> Slice:
    async def client(conversations: Sequence[Iterator[bytes]]) -> list[float]:
        return [await _ask(session, gateway.url, next(bodies)) for bodies in conversations for _ in range(TURNS)]

    began_cpu_s, began_s = _service_cpu_s(gateway), time.monotonic()
    times = await asyncio.gather(*map(client, clients))
    wall_s = time.monotonic() - began_s
    return Slice(_service_cpu_s(gateway) - began_cpu_s, wall_s, tuple(itertools.chain(*times)))


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes) -> float:
    """Milliseconds from request to the end of the answer."""
    began_s = time.monotonic()
    async with session.post(url + _CHAT, data=body, headers={"Content-Type": "application/json"}) as response:
        text = await response.read()
    if response.status != 200:
        raise ProcessError(f"{url} answered {response.status}: {text[:200]!r}")
    return (time.monotonic() - began_s) * 1e3


def _service_cpu_s(gateway: Gateway) -> float:
    return 0.0 if gateway.service is None else cpu_s(gateway.service)


async def _check_all_were_routed(session: aiohttp.ClientSession, gateway: Gateway) -> None:
    async with session.get(f"{gateway.status_url}/metrics") as response:
        lines = (await response.text()).splitlines()
    left = [line for line in lines if line.startswith("gorgo_fallbacks_total{")]
    if left:
        raise ProcessError(f"requests were left unrouted, so nothing was measured: {'; '.join(left)}")


def result(load: str, slices: Mapping[str, Sequence[Slice]]) -> Result:
    """Compare slices that were measured in turn and hold as many requests each."""
    cpu = {variant: np.array([one.cpu_s for one in slices[variant]]) for variant in (IDLE, OURS)}
    percentiles = {
        variant: np.percentile(list(itertools.chain(*(one.times_ms for one in some))), (50, 99))
        for variant, some in slices.items()
    }
    figures = {}
    for variant, some in slices.items():
        requests = sum(len(one.times_ms) for one in some)
        (p50, p99), (base_p50, base_p99) = percentiles[variant], percentiles[NO_FILTER]
        figures[variant] = Figures(
            cpu_ms=sum(one.cpu_s for one in some) * 1e3 / requests,
            p50_ms=float(p50),
            p99_ms=float(p99),
            added_p50_ms=float(p50 - base_p50),
            added_p99_ms=float(p99 - base_p99),
            requests_per_s=requests / sum(one.wall_s for one in some),
        )
    return Result(load, figures, median_ratio(cpu[OURS] / cpu[IDLE]), float(cpu[OURS].sum() / cpu[IDLE].sum()))
