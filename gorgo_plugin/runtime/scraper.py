"""Engine gauges from the engines' Prometheus pages, one job a replica, off the request path."""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from prometheus_client.parser import text_string_to_metric_families

from gorgo_plugin.runtime.probes import Unreachable, Watch, failure_kind, jittered, read_bounded, root_url
from gorgo_plugin.settings import MetricsSettings, ReplicaSettings
from gorgo_plugin.signals.gauges import EngineGauges

if TYPE_CHECKING:
    import aiohttp

_log = logging.getLogger(__name__)

FAST_INTERVAL_S = 1.0  # the papers' rate, for the policies that decide by gauges
SLOW_INTERVAL_S = 10.0  # restarts and status can wait this long
PAUSE_MAX_S = 60.0  # an address without a metrics page is asked ever more rarely, but still
NO_PAGE = frozenset({"http-4xx", "no-gauges", "unreadable"})  # kinds of failure that time alone does not mend
MAX_PAGE_BYTES = 1 << 20  # pages are 50-100 KB; a larger one is something else

RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs")
WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs")
KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage")
USED_TOKENS = ("sglang:num_used_tokens",)
CACHE_CONFIG = ("vllm:cache_config_info",)
TOTAL_TOKENS = ("sglang:max_total_num_tokens",)
START_TIME = ("process_start_time_seconds",)

# Only these lines of a page are parsed: the parser takes 10 ms for a whole one, this search a tenth of one. It starts
# at line ends and not at `^`, because that the search finds with memchr.
_WANTED = re.compile(
    b"\n((?:%s)[ {][^\n]*)"
    % b"|".join(
        re.escape(name.encode())
        for names in (RUNNING, WAITING, KV_USAGE, USED_TOKENS, CACHE_CONFIG, TOTAL_TOKENS, START_TIME)
        for name in names
    )
)


class Observer(Protocol):
    """The part of the Router that scrapes report to."""

    def observe_gauges(self, name: str, gauges: EngineGauges, /) -> None: ...
    def forget(self, name: str, /) -> None: ...


@dataclass(frozen=True)
class Page:
    """What one metrics page says: the gauges, None when the page has none, and when its process started (Unix time)."""

    gauges: EngineGauges | None
    start_time_s: float | None


def parse_page(page: bytes) -> Page:
    """Read the wanted lines of an engine's metrics page.

    Values of several data-parallel ranks are added up, their KV usage averaged.

    Raises:
        ValueError: a wanted line is not in Prometheus text form, or its value is not finite.
    """
    samples: dict[str, list[float]] = {}
    config: list[dict[str, str]] = []
    lines = b"\n".join(_WANTED.findall(b"\n" + page)).decode("utf-8", "replace") + "\n"
    for family in text_string_to_metric_families(lines):
        for sample in family.samples:
            if not math.isfinite(sample.value):
                raise ValueError(f"{sample.name} is {sample.value}")
            samples.setdefault(sample.name, []).append(sample.value)
            if sample.name in CACHE_CONFIG:
                config.append(sample.labels)

    def values(names: tuple[str, ...]) -> list[float]:
        return next((samples[name] for name in names if name in samples), [])

    running, waiting, usage, used = values(RUNNING), values(WAITING), values(KV_USAGE), values(USED_TOKENS)
    starts = values(START_TIME)
    gauges = None
    if running and waiting:
        kv_usage = sum(usage) / len(usage) if usage else 0.0
        capacity = sum(_capacity_tokens(labels) or 0 for labels in config)
        used_tokens = sum(used) if used else kv_usage * capacity if usage and capacity else None
        sizes = {int(labels["block_size"]) for labels in config if labels.get("block_size", "").isdecimal()}
        gauges = EngineGauges(
            sum(running),
            sum(waiting),
            kv_usage,
            used_tokens,
            kv_tokens=capacity or int(sum(values(TOTAL_TOKENS))) or None,
            block_tokens=sizes.pop() if len(sizes) == 1 else None,
        )
    return Page(gauges, max(starts) if starts else None)


def _capacity_tokens(labels: dict[str, str]) -> int | None:
    def number(name: str) -> int | None:
        text = labels.get(name, "")
        return int(text) if text.isdecimal() else None

    blocks, block_size = number("num_gpu_blocks"), number("block_size")
    return number("kv_cache_size_tokens") or (blocks * block_size if blocks and block_size else None)


def interval_s(settings: MetricsSettings, reads_gauges: bool) -> float:
    """Seconds between two scrapes of one replica."""
    return settings.interval_s or (FAST_INTERVAL_S if reads_gauges else SLOW_INTERVAL_S)


@dataclass
class ScrapeJob:
    """Reads one replica's metrics page again and again, and tells the router its gauges and its restarts."""

    replica: ReplicaSettings
    settings: MetricsSettings
    interval_s: float
    router: Observer
    on_failure: Callable[[str, str], None]
    """(replica name, kind of failure), for metrics."""
    block_tokens: frozenset[int] = frozenset()
    """Tokens of a block as set for the models served there."""
    watch: Watch = field(default_factory=Watch)
    _start_time_s: float | None = None
    _warned: bool = False

    async def run(self) -> None:
        """Scrape until cancelled."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=self.settings.timeout_s)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1), timeout=timeout) as session:
            while True:
                try:
                    await self.scrape(session)
                except Exception:  # noqa: BLE001 (logged; scraping goes on)
                    _log.exception("gorgo: scraping replica '%s' failed by an error of its own", self.replica.name)
                await asyncio.sleep(self._pause_s())

    async def scrape(self, session: aiohttp.ClientSession) -> None:
        """Read the page once and report."""
        try:
            page = await self._page(session)
        except Unreachable as failure:
            self.watch.fail(failure.kind)
            self.on_failure(self.replica.name, failure.kind)
            return
        self.watch.succeed()
        if page.start_time_s is not None:
            # Later, not only other: an address may stand for several processes that answer in turn.
            if self._start_time_s is not None and page.start_time_s > self._start_time_s:
                self.router.forget(self.replica.name)
            self._start_time_s = max(page.start_time_s, self._start_time_s or 0.0)
        if page.gauges is not None:
            self.router.observe_gauges(self.replica.name, page.gauges)
            self._compare_blocks(page.gauges.block_tokens)

    def _compare_blocks(self, block_tokens: int | None) -> None:
        if block_tokens is None or not self.block_tokens or block_tokens in self.block_tokens or self._warned:
            return
        self._warned = True
        _log.warning(
            "gorgo: replica '%s' caches blocks of %d tokens, block_tokens is %s; set it to %d for exact estimates",
            self.replica.name,
            block_tokens,
            " and ".join(map(str, sorted(self.block_tokens))),
            block_tokens,
        )

    async def _page(self, session: aiohttp.ClientSession) -> Page:
        import aiohttp

        url = root_url(self.replica.url, self.settings.path or "")
        try:
            async with session.get(url, allow_redirects=False) as response:
                if response.status != 200:
                    raise Unreachable("http-5xx" if response.status >= 500 else "http-4xx")
                body = await read_bounded(response, MAX_PAGE_BYTES)
            page = parse_page(body)
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(failure_kind(error)) from error
        except ValueError as error:
            raise Unreachable("unreadable") from error
        if page.gauges is None and page.start_time_s is None:
            raise Unreachable("no-gauges")
        return page

    def _pause_s(self) -> float:
        if self.watch.last_error not in NO_PAGE:
            return jittered(self.interval_s)
        doubled = self.interval_s * 2.0 ** min(self.watch.failed_in_a_row - 1, 10)
        return jittered(min(doubled, max(PAUSE_MAX_S, self.interval_s)))
