"""Probes and scrapes against real sockets and HTTP servers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp
import pytest
from aiohttp import web

from gorgo_plugin.runtime.probes import Handshakes, ProbeJob, Unreachable, measuring, root_url
from gorgo_plugin.runtime.scraper import ScrapeJob
from gorgo_plugin.settings import MetricsSettings, ProbeSettings, ReplicaSettings
from gorgo_plugin.signals.gauges import EngineGauges

WAIT_S = 10.0
PAGE = "vllm:num_requests_running 3\nvllm:num_requests_waiting 1\nvllm:kv_cache_usage_perc 0.5\n"


@dataclass
class Seen:
    """Notes what a job tells the router, in order."""

    events: list[tuple[str, object]] = field(default_factory=list)
    rtts_s: list[float] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def _note(self, kind: str, value: object) -> None:
        if not self.events or self.events[-1] != (kind, value):
            self.events.append((kind, value))
        self.changed.set()

    def observe_rtt(self, name: str, rtt_s: float, /) -> None:
        self.rtts_s.append(rtt_s)
        self.changed.set()

    def set_health(self, name: str, ok: bool, /) -> None:
        self._note("health", ok)

    def forget(self, name: str, /) -> None:
        self._note("forget", name)

    def observe_gauges(self, name: str, gauges: EngineGauges, /) -> None:
        self._note("gauges", gauges)

    def failed(self, name: str, kind: str) -> None:
        self._note("failed", kind)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def replica(port: int, path: str = "") -> ReplicaSettings:
    return ReplicaSettings(name="r", url=f"http://127.0.0.1:{port}{path}")


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.asynccontextmanager
async def running(job: ProbeJob | ScrapeJob) -> AsyncIterator[None]:
    task = asyncio.create_task(job.run())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@contextlib.asynccontextmanager
async def serving(handler: Callable[[web.Request], Awaitable[web.StreamResponse]], port: int = 0) -> AsyncIterator[int]:
    app = web.Application()
    app.router.add_get("/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
    await site.start()
    assert isinstance(site._server, asyncio.Server)
    yield int(site._server.sockets[0].getsockname()[1])
    await runner.cleanup()


async def answer(_: web.Request) -> web.Response:
    return web.Response(text="ok")


async def test_a_handshake_is_measured_without_the_lag_of_a_busy_loop() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        measured = asyncio.create_task(Handshakes("127.0.0.1", server.getsockname()[1]).rtt_s())
        await asyncio.sleep(0)
        time.sleep(0.5)
        assert 0.0 < await measured < 0.3


@pytest.mark.parametrize(
    ("host", "kind"), [("127.0.0.1", "refused"), ("localhost", "refused"), ("nowhere.invalid", "dns")]
)
async def test_a_failed_handshake_says_why(host: str, kind: str) -> None:
    with pytest.raises(Unreachable, match=f"^{kind}$"):
        await Handshakes(host, closed_port()).rtt_s()


async def test_a_handshake_over_ipv6_is_measured() -> None:
    with socket.socket(socket.AF_INET6) as server:
        server.bind(("::1", 0))
        server.listen()
        assert 0.0 < await Handshakes("::1", server.getsockname()[1]).rtt_s() < 0.5


async def test_a_name_lookup_that_hangs_is_not_asked_again_while_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups: list[str] = []
    answered = asyncio.Event()

    async def hang(host: str, port: int, **_: object) -> list[object]:
        lookups.append(host)
        await answered.wait()
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", hang)
    slow = ReplicaSettings(name="r", url="http://slow.invalid")
    async with measuring(slow, ProbeSettings(timeout_s=0.2)) as measure:
        for _ in range(3):
            with pytest.raises(Unreachable, match=r"^timeout$"):
                await measure()
        assert lookups == ["slow.invalid"]
        answered.set()
        with pytest.raises(Unreachable, match=r"^dns$"):
            await measure()


async def test_a_handshake_that_hangs_times_out() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with contextlib.ExitStack() as fillers:
            for _ in range(4):  # a full backlog drops further SYNs
                filler = fillers.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
            async with measuring(replica(full.getsockname()[1]), ProbeSettings(timeout_s=0.2)) as measure:
                with pytest.raises(Unreachable, match=r"^timeout$"):
                    await measure()


async def test_an_http_probe_does_not_count_setting_up_its_connection() -> None:
    connections: set[object] = set()
    requests: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        requests.append(request.path)
        if request.transport not in connections:
            connections.add(request.transport)
            await asyncio.sleep(2.5)  # only what travels on a new connection is this slow
        return web.Response(text="ok")

    async with (
        serving(handle) as port,
        measuring(replica(port, "/v1"), ProbeSettings(path="/health", timeout_s=10.0)) as measure,
    ):
        assert [await measure() < 2.0 for _ in range(3)] == [True] * 3
    assert requests == ["/health"] * 4
    assert len(connections) == 1


async def test_an_http_probe_of_a_server_that_keeps_no_connection_still_measures() -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(text="ok", headers={"Connection": "close"})

    async with serving(handle) as port, measuring(replica(port), ProbeSettings(path="/health")) as measure:
        assert await measure() > 0.0


async def test_an_http_probe_takes_a_server_error_for_a_failure_and_a_missing_page_for_an_answer() -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(status=int(request.path.strip("/")))

    async with serving(handle) as port:
        async with measuring(replica(port), ProbeSettings(path="/503")) as measure:
            with pytest.raises(Unreachable, match=r"^http-5xx$"):
                await measure()
        async with measuring(replica(port), ProbeSettings(path="/404")) as measure:
            assert await measure() > 0.0


async def test_an_http_probe_that_is_not_answered_times_out() -> None:
    async def handle(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with serving(handle) as port, measuring(replica(port), ProbeSettings(path="/x", timeout_s=0.2)) as measure:
        with pytest.raises(Unreachable, match=r"^timeout$"):
            await measure()


async def test_two_failures_in_a_row_make_a_replica_unhealthy_and_its_return_means_a_restart() -> None:
    port, seen = closed_port(), Seen()
    job = ProbeJob(replica(port), ProbeSettings(interval_s=0.02), seen, seen.failed)
    async with running(job):
        await seen.until(lambda: ("health", False) in seen.events)
        assert job.watch.failures >= 2
        assert job.watch.last_error == "refused"
        async with serving(answer, port):
            await seen.until(lambda: ("health", True) in seen.events)
            assert job.watch.last_error is None
    told = [event for event in seen.events if event[0] != "failed"]
    assert list(dict.fromkeys(told)) == [("health", False), ("forget", "r"), ("health", True)]


async def test_every_further_failure_closes_the_replica_anew_as_a_late_answer_may_have_opened_it() -> None:
    seen = Seen()
    job = ProbeJob(replica(1), ProbeSettings(), seen, seen.failed)

    async def lost() -> float:
        raise Unreachable("timeout")

    for _ in range(4):
        await job.probe(lost)
    assert seen.events.count(("health", False)) == 3


async def test_one_lost_probe_is_no_outage_and_no_restart() -> None:
    seen = Seen()
    job = ProbeJob(replica(1), ProbeSettings(), seen, seen.failed)

    async def lost() -> float:
        raise Unreachable("timeout")

    async def fine() -> float:
        return 0.01

    for measure in (fine, lost, fine, lost, fine):
        await job.probe(measure)
    assert ("health", False) not in seen.events
    assert ("forget", "r") not in seen.events
    assert seen.rtts_s == [0.01] * 3


async def test_an_error_of_the_router_does_not_end_the_job(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Seen):
        def observe_rtt(self, name: str, rtt_s: float, /) -> None:
            super().observe_rtt(name, rtt_s)
            raise RuntimeError("broken")

    seen = Broken()
    async with (
        serving(answer) as port,
        running(ProbeJob(replica(port), ProbeSettings(interval_s=0.01), seen, seen.failed)),
    ):
        await seen.until(lambda: len(seen.rtts_s) >= 3)
    assert "broken" in caplog.text


async def test_gauges_are_read_off_the_engines_root_and_a_new_start_time_means_a_restart() -> None:
    started, paths, seen = 100.0, set(), Seen()

    async def handle(request: web.Request) -> web.Response:
        paths.add(request.path)
        return web.Response(text=f"{PAGE}process_start_time_seconds {started}\n")

    async with serving(handle) as port:
        job = ScrapeJob(replica(port, "/v1/"), MetricsSettings(), 0.02, seen, seen.failed)
        async with running(job):
            await seen.until(lambda: job.watch.successes >= 2)
            assert seen.events == [("gauges", EngineGauges(3.0, 1.0, 0.5, None))]
            started = 200.0
            await seen.until(lambda: ("forget", "r") in seen.events)
            started, scraped = 100.0, job.watch.successes  # another process behind the same address
            await seen.until(lambda: job.watch.successes > scraped + 2)
            assert [kind for kind, _ in seen.events].count("forget") == 1
    assert paths == {"/metrics"}


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (404, "", "http-4xx"),
        (500, "", "http-5xx"),
        (200, "hello", "no-gauges"),
        (200, PAGE.replace("3", "x"), "unreadable"),
    ],
)
async def test_a_page_that_cannot_be_used_is_counted_and_asked_for_ever_more_rarely(
    status: int, text: str, kind: str
) -> None:
    seen = Seen()

    async def handle(_: web.Request) -> web.Response:
        return web.Response(status=status, text=text)

    async with serving(handle) as port, aiohttp.ClientSession() as session:
        job = ScrapeJob(replica(port), MetricsSettings(), 1.0, seen, seen.failed)
        for _ in range(12):
            await job.scrape(session)
        assert seen.events == [("failed", kind)]
        assert (job._pause_s() > 40.0) == (kind != "http-5xx")


async def test_an_engine_that_is_down_is_scraped_as_often_as_before() -> None:
    seen = Seen()
    async with aiohttp.ClientSession() as session:
        job = ScrapeJob(replica(closed_port()), MetricsSettings(), 1.0, seen, seen.failed)
        for _ in range(12):
            await job.scrape(session)
        assert seen.events == [("failed", "refused")]
        assert job._pause_s() < 2.0


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:8000", "http://h:8000/metrics"),
        ("http://h:8000/v1", "http://h:8000/metrics"),
        ("http://h:8000/v1/", "http://h:8000/metrics"),
        ("https://h/replica/v1", "https://h/replica/metrics"),
        ("https://h/mev1", "https://h/mev1/metrics"),
    ],
)
def test_pages_beside_the_api_lie_at_the_engines_root(url: str, expected: str) -> None:
    assert root_url(url, "/metrics") == expected
    assert root_url(url, "metrics") == expected
