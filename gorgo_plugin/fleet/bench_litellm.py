"""What the plugin costs LiteLLM: the same proxy with simple-shuffle and with gorgo, in turn, before instant upstreams.

Prompts are conversations of about 20,000 tokens that grow by a turn with every request. CPU is the proxy process's own
(user and system, all threads), so the load generator and the upstreams do not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil

from gorgo_plugin.fleet.gateway import MODEL, ROWS, Row, litellm_config, litellm_proxy
from gorgo_plugin.fleet.instant import instant_upstreams
from gorgo_plugin.fleet.loadgen import Shot, Target, replay
from gorgo_plugin.fleet.passages import Passage
from gorgo_plugin.fleet.processes import Child, ProcessError
from gorgo_plugin.fleet.slices import Slice, cpu_s
from gorgo_plugin.fleet.statistics import Ratio, median_ratio

LOOP_WATCH_FILE = "GORGO_LOOP_WATCH"  # environment variable: where `loop_watch` writes
OURS, THEIRS = ROWS["gorgo"], ROWS["simple-shuffle"]
UPSTREAMS = 3
BASE_WORDS = 18_000
TURN_WORDS = 100
# A round in which a proxy dies is done again, and said so, twice at most: on CPython 3.11 LiteLLM's finalizers can
# crash the interpreter (python/cpython issue 148891).
FAILED_ROUNDS = 2
KV_TOKENS = 10_000_000  # instant upstreams have no cache to overflow


@dataclass(frozen=True, slots=True)
class Load:
    """How one figure is measured: clients in a closed loop, in slices of so many turns each.

    The proxies are measured slice by slice in turn, so that a slow second of the machine falls on neither alone. One
    turn before the first slice is not counted.
    """

    clients: int
    slices: int
    slice_turns: int
    cold: bool = False  # every request a prompt never seen before


WARM_UP = Load(4, 5, 1)
LOADS = {
    "1 client": Load(1, 10, 10),
    "16 clients": Load(16, 5, 3),
    "1 client, every prompt new": Load(1, 3, 5, cold=True),
}


@dataclass(frozen=True, slots=True)
class Overhead:
    """gorgo over simple-shuffle under one load.

    A full garbage collection of LiteLLM's takes half a second, once in some hundred requests. The medians, over pairs
    of slices, show a request without one; the totals, over all rounds, hold their share of them.

    Attributes:
        cpu_ratio, throughput_ratio: medians, with the 95% interval of a bootstrap over the pairs.
        cpu_ratio_total, throughput_ratio_total: of the sums.
        cpu_ms, p50_ms: (gorgo, simple-shuffle): per request over all rounds; median time of a request.
    """

    load: str
    cpu_ratio: Ratio
    cpu_ratio_total: float
    throughput_ratio: Ratio
    throughput_ratio_total: float
    cpu_ms: tuple[float, float]
    p50_ms: tuple[float, float]


@dataclass(frozen=True, slots=True)
class LoopFigures:
    """How late the event loop of a proxy ran, and how long the plugin held it at once (None where it is not there).

    A hold is by the clock, so it includes what preempts the loop's thread; work is the CPU time in it.
    """

    name: str
    lag_p50_ms: float
    lag_p99_ms: float
    lag_p999_ms: float
    lag_max_ms: float
    hold_p999_ms: float | None
    hold_max_ms: float | None
    work_p999_ms: float | None
    work_max_ms: float | None


class Conversations:
    """Bodies of growing conversations; no two runs share one, so nothing is warm from before."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def begin(self) -> Iterator[bytes]:
        """The requests of one new conversation."""
        name = f"bench/{next(self._numbers)}"
        messages = [{"role": "system", "content": Passage(name, BASE_WORDS).text}]
        for turn in itertools.count():
            messages.append({"role": "user", "content": Passage(f"{name}/{turn}", TURN_WORDS).text})
            yield msgspec.json.encode(
                {"model": MODEL, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
            )
            messages.append({"role": "assistant", "content": Passage(f"{name}/{turn}/reply", TURN_WORDS).text})


class Run:
    """One proxy under one load: its conversations, and what was measured so far."""

    def __init__(self, target: Target, child: Child, load: Load, talks: Conversations) -> None:
        self._target = target
        self._process = psutil.Process(child.pid)
        self._load = load
        self._talks = talks
        self._bodies = [talks.begin() for _ in range(load.clients)]

    async def warm_up(self) -> None:
        """One turn of each client, not counted.

        Raises:
            ProcessError: a request was not answered.
        """
        await asyncio.gather(*(_turn(self._target, next(body)) for body in self._bodies))

    async def slice(self) -> Slice:
        """One slice of the load.

        Raises:
            ProcessError: a request was not answered.
        """
        began_cpu_s, began_s = cpu_s(self._process), time.monotonic()
        times = await asyncio.gather(*map(self._client, self._bodies))
        wall_s = time.monotonic() - began_s
        return Slice(cpu_s(self._process) - began_cpu_s, wall_s, tuple(itertools.chain(*times)))

    async def _client(self, body: Iterator[bytes]) -> list[float]:
        turns, cold = self._load.slice_turns, self._load.cold
        return [await _turn(self._target, next(self._talks.begin() if cold else body)) for _ in range(turns)]


Proxies = dict[str, tuple[Target, Child]]


async def measure(proxies: Proxies, load: Load, talks: Conversations) -> dict[str, list[Slice]]:
    """Run a load against each proxy, in turn.

    Raises:
        ProcessError: a request was not answered.
    """
    runs = {row: Run(*proxy, load, talks) for row, proxy in proxies.items()}
    for run in runs.values():
        await run.warm_up()
    slices: dict[str, list[Slice]] = {row: [] for row in runs}
    for number in range(load.slices):
        for row in runs if number % 2 == 0 else reversed(runs):
            slices[row].append(await runs[row].slice())
    return slices


async def _turn(target: Target, body: bytes) -> float:
    """Milliseconds from request to the end of the answer."""
    (outcome,) = await replay(target, [Shot(0.0, body)])
    if outcome.error is not None or outcome.e2e_ms is None:
        raise ProcessError(f"{target.url} did not answer: {outcome.error}")
    return outcome.e2e_ms


@contextlib.asynccontextmanager
async def _both(folder: Path, watched: bool = False) -> AsyncIterator[Proxies]:
    """The two proxies side by side, each with upstreams of its own."""
    async with contextlib.AsyncExitStack() as stack:
        proxies: Proxies = {}
        for row in (THEIRS, OURS):
            urls = await stack.enter_async_context(instant_upstreams(UPSTREAMS, row.name))
            config = _config(row, urls, watched)
            name = f"{row.name}-watched" if watched else row.name
            if watched:
                os.environ[LOOP_WATCH_FILE] = str(folder / f"{name}.watch")
            proxies[row.name] = await stack.enter_async_context(litellm_proxy(config, folder, name))
        yield proxies


def _config(row: Row, urls: dict[str, str], watched: bool) -> dict[str, Any]:
    config = litellm_config(row, urls, KV_TOKENS, seed=0)
    if row is OURS:
        del config["router_settings"]["routing_strategy_args"]["probe"]  # the instant upstreams have no /health
    if watched:
        config.setdefault("litellm_settings", {}).setdefault("callbacks", []).append(
            "gorgo_plugin.fleet.loop_watch.callback"
        )
    return config


async def bench_overhead(
    folder: Path, rounds: int, done: Callable[[str], None], failed: Callable[[str], None]
) -> list[Overhead]:
    """CPU per request and throughput of both proxies, in turn, `rounds` times for each load.

    Each round starts both anew: two processes that do the same differ by some percent for as long as they live, by how
    their memory happens to lie.
    """
    talks = Conversations()
    slices: dict[tuple[str, str], list[Slice]] = {}
    left, failures = rounds, 0
    while left:
        try:
            measured = await _round(folder, talks, f"round {rounds - left + 1} of {rounds}", done)
        except ProcessError as error:
            failed(f"round {rounds - left + 1} begins anew: {error}")
            failures += 1
            if failures > FAILED_ROUNDS:
                raise
            continue
        left -= 1
        for key, some in measured.items():
            slices.setdefault(key, []).extend(some)
    return [overhead(name, slices[name, OURS.name], slices[name, THEIRS.name]) for name in LOADS]


async def _round(
    folder: Path, talks: Conversations, number: str, done: Callable[[str], None]
) -> dict[tuple[str, str], list[Slice]]:
    slices: dict[tuple[str, str], list[Slice]] = {}
    async with _both(folder) as proxies:
        await measure(proxies, WARM_UP, talks)  # imports, connections and the first cold prompt
        for name, load in LOADS.items():
            for row, measured in (await measure(proxies, load, talks)).items():
                slices[name, row] = measured
            done(f"{number}: {name}")
    return slices


def overhead(load: str, ours: Sequence[Slice], theirs: Sequence[Slice]) -> Overhead:
    """Compare slices that were measured in pairs and hold as many requests each."""
    both = (ours, theirs)
    cpu = [np.array([one.cpu_s for one in slices]) for slices in both]
    wall = [np.array([one.wall_s for one in slices]) for slices in both]
    times = [list(itertools.chain(*(one.times_ms for one in slices))) for slices in both]
    return Overhead(
        load,
        median_ratio(cpu[0] / cpu[1]),
        float(cpu[0].sum() / cpu[1].sum()),
        median_ratio(wall[1] / wall[0]),
        float(wall[1].sum() / wall[0].sum()),
        (float(cpu[0].sum() * 1e3 / len(times[0])), float(cpu[1].sum() * 1e3 / len(times[1]))),
        (float(np.median(times[0])), float(np.median(times[1]))),
    )


async def bench_loop(folder: Path, rounds: int, done: Callable[[str], None]) -> list[LoopFigures]:
    """Event-loop lag of both proxies under 16 clients with new prompts among the growing ones, in turn."""
    talks = Conversations()
    spans: dict[str, list[tuple[float, float]]] = {THEIRS.name: [], OURS.name: []}
    async with _both(folder, watched=True) as proxies:
        await measure(proxies, WARM_UP, talks)
        for number in range(rounds):
            for row, proxy in proxies.items():
                began_s = time.monotonic()
                only = {row: proxy}
                await asyncio.gather(
                    measure(only, Load(15, 6, 1), talks), measure(only, Load(1, 6, 1, cold=True), talks)
                )
                spans[row].append((began_s, time.monotonic()))
            done(f"event loop: round {number + 1} of {rounds}")
        await asyncio.sleep(1.5)  # the watchers write twice a second
    return [_loop_figures(row, folder / f"{row}-watched.watch", spans[row]) for row in spans]


def _loop_figures(name: str, path: Path, spans: Sequence[tuple[float, float]]) -> LoopFigures:
    noted: dict[str, list[float]] = {"lag": [], "hold": [], "work": []}
    for line in path.read_text().splitlines():
        kind, at_s, ms = line.split()
        if any(began_s <= float(at_s) <= ended_s for began_s, ended_s in spans):
            noted[kind].append(float(ms))
    lag = np.percentile(noted["lag"], (50, 99, 99.9, 100)).tolist()
    own = [
        np.percentile(noted[kind], (99.9, 100)).tolist() if noted[kind] else [None, None] for kind in ("hold", "work")
    ]
    return LoopFigures(name, *lag, *own[0], *own[1])
