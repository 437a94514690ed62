"""A soak: the service behind the real Envoy under a steady load, and whether it is at its end what it was before.

The caches of the service are set so small that they are full within two minutes (every prompt holds new text), so that
memory has no reason left to grow in the second half, the one that is judged.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import psutil

from gorgo_plugin.envoy_ext_proc.envoy_yaml import envoy_config
from gorgo_plugin.fleet.envoy import all_well, envoy_proxy, ext_proc_service, gateway_settings
from gorgo_plugin.fleet.gateway import MODEL
from gorgo_plugin.fleet.processes import Child, first_line, running
from gorgo_plugin.fleet.soak_load import Counts, send_steadily
from gorgo_plugin.fleet.topology import REGIONS, mock_command
from gorgo_plugin.settings import Settings

KV_TOKENS = 100_000  # of each replica: a minute of new text, and six of the longest prompts
CACHE_BYTES = 4 * 2**20  # of the service's message cache: a minute of new text as well
RTT_MS = 20.0  # equally far, so that every replica has its share and fills its cache
MS_PER_TOKEN = 0.01  # of the replicas' prefill, so quick that they never queue
STREAM_INTERVAL = 2  # tokens a chunk
SAMPLE_S = 5.0
# Longest wait for flights and streams to end. When a client has left, Envoy closes the stream that observed its answer
# 5 s later (its `deferred_close_timeout`).
REST_S = 10.0
JUDGED_FROM_S = 180.0  # shorter runs are over before all caches are full
GROWTH_PERCENT = 1.0  # over the judged half; what a process of 150 MB breathes is less
FEW = 2  # descriptors or threads: a probe's connection, a scrape's
_MB = 1e6


@dataclass(frozen=True, slots=True)
class SoakSettings:
    """What to run, and for how long.

    Attributes:
        minutes: of load.
        rate: requests per second.
        leaving: share of the clients that leave at a random moment.
        seed: seeds requests, leaving and replicas.
        out: folder for the figures, the configurations and the logs.
    """

    minutes: float = 10.0
    rate: float = 20.0
    leaving: float = 0.2
    seed: int = 0
    out: Path = field(default_factory=lambda: Path("out/soak"))


@dataclass(frozen=True, slots=True)
class Sample:
    """The processes at one moment; all of it the service's but `envoy_rss_mb`.

    Attributes:
        at_s: since the load began.
        rss_mb: resident memory, in 10**6 bytes.
        cache_bytes: tokenized messages kept.
        index_tokens: in the prefix index, over all replicas.
    """

    at_s: float
    rss_mb: float
    envoy_rss_mb: float
    descriptors: int
    threads: int
    flights: int
    streams: int
    routed: int
    swept_flights: int
    cache_bytes: int
    index_tokens: int


class Trend(NamedTuple):
    """How resident memory went over the second half.

    Attributes:
        median_mb: its median.
        mb_per_hour: Theil-Sen slope: the median of the slopes between any two samples.
        percent: what that slope adds over the half, of the median.
    """

    median_mb: float
    mb_per_hour: float
    percent: float


@dataclass(frozen=True, slots=True)
class SoakResult:
    """What a soak found.

    Attributes:
        seconds: of load.
        counts: what became of the requests.
        samples: while the load ran.
        rest: after it, when flights and streams were gone or waiting for that was given up.
        rest_s: how long that took.
        trend, envoy_trend: None where the run was too short to tell.
    """

    seconds: float
    counts: Counts
    samples: list[Sample]
    rest: Sample
    rest_s: float
    trend: Trend | None
    envoy_trend: Trend | None

    @property
    def judged(self) -> list[Sample]:
        """The samples of the second half."""
        return second_half(self.samples)


async def soak(settings: SoakSettings, on_sample: Callable[[Sample, Counts], None]) -> SoakResult:
    """Run a soak. Ends early, with every child process stopped, on SIGTERM or cancellation.

    Raises:
        ProcessError: a process did not start or ended.
    """
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    settings.out.mkdir(parents=True, exist_ok=True)
    async with contextlib.AsyncExitStack() as stack:
        replicas = await stack.enter_async_context(_replicas(settings))
        content = gateway_settings(
            {name: url for name, (url, _) in replicas.items()},
            kv_tokens=KV_TOKENS,
            prepare={"cache_bytes": CACHE_BYTES},
            probe={"path": "/health"},  # over the loopback only an answer shows the injected round trip
            seed=settings.seed,
        )
        gateway = Settings.model_validate(content)
        status_url, service = await stack.enter_async_context(ext_proc_service(content, settings.out, "soak"))
        config = envoy_config(gateway)
        envoy = await stack.enter_async_context(envoy_proxy(config, settings.out, "soak"))
        await all_well(envoy, config)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        watched = Watched(session, status_url, service, envoy, [child for _, child in replicas.values()])
        return await _run(settings, f"http://{gateway.envoy.gateway_listen}", watched, on_sample)


@contextlib.asynccontextmanager
async def _replicas(settings: SoakSettings) -> AsyncIterator[dict[str, tuple[str, Child]]]:
    """The demo's replicas, but near, quick and with a small cache: name -> (base URL, process)."""
    async with contextlib.AsyncExitStack() as stack:
        children = {}
        for region in REGIONS:
            command = mock_command(region, settings.seed, KV_TOKENS, MODEL, STREAM_INTERVAL)
            command = (*command, f"--rtt-ms={RTT_MS}", f"--ms-per-token={MS_PER_TOKEN}")
            log = settings.out / f"{region.name}.log"
            child = await stack.enter_async_context(running(region.name, command, log, read_output=True))
            children[region.name] = child
        yield {name: ((await first_line(child))["url"], child) for name, child in children.items()}


class Watched:
    """The processes of a soak, and how they are."""

    def __init__(
        self, session: aiohttp.ClientSession, status_url: str, service: Child, envoy: Child, replicas: Sequence[Child]
    ) -> None:
        self._session = session
        self._status_url = status_url
        self._children = (service, envoy, *replicas)
        self._service, self._envoy = psutil.Process(service.pid), psutil.Process(envoy.pid)
        self._began_s = asyncio.get_running_loop().time()

    async def sample(self) -> Sample:
        """How they are now.

        Raises:
            ProcessError: one of them has ended.
        """
        for child in self._children:
            child.check()
        async with self._session.get(f"{self._status_url}/metrics") as answer:  # as Prometheus would
            await answer.read()
        async with self._session.get(f"{self._status_url}/gorgo/status") as answer:
            status: Mapping[str, Any] = await answer.json()
        models = [model for replica in status["replicas"].values() for model in replica["models"].values()]
        with self._service.oneshot():
            return Sample(
                at_s=asyncio.get_running_loop().time() - self._began_s,
                rss_mb=self._service.memory_info().rss / _MB,
                envoy_rss_mb=self._envoy.memory_info().rss / _MB,
                descriptors=self._service.num_fds(),
                threads=self._service.num_threads(),
                flights=sum(status["flights"].values()),
                streams=status["streams"],
                routed=status["counters"]["routed"],
                swept_flights=status["counters"]["swept_flights"],
                cache_bytes=status["prompts"]["cache"]["bytes"],
                index_tokens=sum(model["index_tokens"] for model in models),
            )

    async def at_rest(self) -> tuple[Sample, float]:
        """The first moment without flights and streams, and the seconds until then; gives up after `REST_S`."""
        clock = asyncio.get_running_loop().time
        began_s = clock()
        while True:
            sample, waited_s = await self.sample(), clock() - began_s
            if (sample.flights == 0 and sample.streams == 0) or waited_s > REST_S:
                return sample, waited_s
            await asyncio.sleep(0.1)


async def _run(
    settings: SoakSettings, url: str, watched: Watched, on_sample: Callable[[Sample, Counts], None]
) -> SoakResult:
    seconds = settings.minutes * 60.0
    counts, samples = Counts(), []
    load = asyncio.ensure_future(send_steadily(url, seconds, settings.rate, settings.leaving, settings.seed, counts))
    try:
        while not load.done():
            samples.append(await watched.sample())
            on_sample(samples[-1], counts)
            await asyncio.wait([load], timeout=SAMPLE_S)
        await load
    finally:
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
    rest, rest_s = await watched.at_rest()
    half = second_half(samples) if seconds >= JUDGED_FROM_S else []
    trend = memory_trend([one.at_s for one in half], [one.rss_mb for one in half]) if half else None
    envoy_trend = memory_trend([one.at_s for one in half], [one.envoy_rss_mb for one in half]) if half else None
    return SoakResult(seconds, counts, samples, rest, rest_s, trend, envoy_trend)


def second_half(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of the second half of the time."""
    return [one for one in samples if one.at_s >= samples[-1].at_s / 2]


def memory_trend(at_s: Sequence[float], rss_mb: Sequence[float]) -> Trend:
    """The trend of samples of one process; two at least, at different times."""
    times, values = np.asarray(at_s), np.asarray(rss_mb)
    first, second = np.triu_indices(len(times), 1)
    per_s = float(np.median((values[second] - values[first]) / (times[second] - times[first])))
    median = float(np.median(values))
    return Trend(median, per_s * 3600.0, per_s * float(times[-1] - times[0]) / median * 100.0)


def faults(result: SoakResult) -> list[str]:
    """What is not as it should be, each in a few words; nothing of memory where the run was too short to tell."""
    counts, rest = result.counts, result.rest
    found = []
    if counts.failed:
        found.append(f"{counts.failed} requests failed (first: {counts.failures[0]})")
    if not counts.answered or not rest.routed:
        found.append(f"{counts.answered} requests were answered and {rest.routed} routed")
    for name, count in (("flights", rest.flights), ("streams", rest.streams)):
        if count:
            found.append(f"{count} {name} open {result.rest_s:.0f} s after the last answer")
    if rest.swept_flights:
        found.append(f"{rest.swept_flights} flights had to be swept")
    if result.trend is None:
        return found
    if result.trend.percent > GROWTH_PERCENT:
        found.append(f"memory grew by {result.trend.percent:.1f}% over the second half")
    for name in ("descriptors", "threads"):
        earlier, later = _medians([getattr(one, name) for one in result.judged])
        if later > earlier + FEW:
            found.append(f"{name} went from {earlier:.0f} to {later:.0f} over the second half")
    return found


def _medians(values: Sequence[int]) -> tuple[float, float]:
    """The medians of the first and of the second half of the values."""
    middle = len(values) // 2
    return float(np.median(values[:middle])), float(np.median(values[middle:]))


def verdict(result: SoakResult) -> str:
    """One sentence."""
    if found := faults(result):
        return f"Not as it should be: {'; '.join(found)}."
    rest = f"flights and streams 0 after {result.rest_s:.1f} s, no request failed"
    if result.trend is None:
        return f"As it should be: {rest}; too short to tell whether memory is flat ({JUDGED_FROM_S:.0f} s are needed)."
    median_mb, mb_per_hour, percent = result.trend
    memory = f"memory is flat at {median_mb:.0f} MB ({mb_per_hour:+.1f} MB/h, {percent:+.2f}% over the second half)"
    return f"As it should be: {memory}, {rest}."
