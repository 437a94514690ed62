"""The round trip to each replica, measured off the request path: one job a replica, so a slow one delays no other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from gorgo_plugin.settings import ProbeSettings, ReplicaSettings

if TYPE_CHECKING:
    import aiohttp

_log = logging.getLogger(__name__)

JITTER = 0.2  # share of the interval; keeps the probes of many gateways from falling into step
FAILURES_BEFORE_UNHEALTHY = 2  # one lost packet is no outage
MAX_PROBE_BODY_BYTES = 1 << 20  # a longer body costs the kept connection, not memory
_TCPI_RTT_OFFSET = 68  # struct tcp_info of linux/tcp.h: 8 bytes, then tcpi_rtt is the 16th u32, in microseconds

Measure = Callable[[], Awaitable[float]]


class Observer(Protocol):
    """The part of the Router that probes report to."""

    def observe_rtt(self, name: str, rtt_s: float, /) -> None: ...
    def set_health(self, name: str, ok: bool, /) -> None: ...
    def forget(self, name: str, /) -> None: ...


@dataclass
class Watch:
    """What became of the last attempts to reach one replica; for the status page.

    Attributes:
        successes, failures: attempts since the start.
        failed_in_a_row: failures since the last success.
        last_error: kind of the last failure; None once an attempt succeeds.
    """

    successes: int = 0
    failures: int = 0
    failed_in_a_row: int = 0
    last_error: str | None = None

    def succeed(self) -> None:
        self.successes += 1
        self.failed_in_a_row = 0
        self.last_error = None

    def fail(self, kind: str) -> None:
        self.failures += 1
        self.failed_in_a_row += 1
        self.last_error = kind


class Unreachable(Exception):
    """A replica did not answer as expected; `kind` is a kebab-case word for metrics."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def failure_kind(error: BaseException) -> str:
    """A word for why a connection or request failed: refused, dns, timeout, tls, disconnected, unreachable or error."""
    cause = getattr(error, "os_error", error)  # aiohttp's connector errors wrap the socket's
    kinds: tuple[tuple[type[BaseException], str], ...] = (
        (ConnectionRefusedError, "refused"),
        (socket.gaierror, "dns"),
        (TimeoutError, "timeout"),
        (ssl.SSLError, "tls"),
        (ConnectionError, "disconnected"),
        (OSError, "unreachable"),
    )
    return next((kind for type_, kind in kinds if isinstance(cause, type_)), "error")


def root_url(url: str, path: str) -> str:
    """`path` at the engine's root: an API base ends in /v1, its health and metrics pages lie beside that."""
    return url.rstrip("/").removesuffix("/v1") + "/" + path.lstrip("/")


class Handshakes:
    """Measures TCP handshakes with one address; resolving its name is not part of it."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._lookup: asyncio.Future[list[Any]] | None = None

    async def rtt_s(self) -> float:
        """Seconds of one handshake.

        Raises:
            Unreachable: no address of the host accepted the connection.
        """
        try:
            addresses = await self._addresses()
        except OSError as error:
            raise Unreachable(failure_kind(error)) from error
        failure: OSError = ConnectionRefusedError()
        for family, address in addresses:
            with socket.socket(family, socket.SOCK_STREAM) as sock:
                sock.setblocking(False)
                started = time.perf_counter()
                try:
                    await asyncio.get_running_loop().sock_connect(sock, address)
                except OSError as error:
                    failure = error
                    continue
                elapsed = time.perf_counter() - started
                # A busy process sees the handshake late, a lost SYN costs a second: neither is network.
                return min(elapsed, _kernel_rtt_s(sock) or elapsed)
        raise Unreachable(failure_kind(failure)) from failure

    async def _addresses(self) -> list[tuple[socket.AddressFamily, Any]]:
        for family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError, ValueError):
                socket.inet_pton(family, self._host)
                return [(family, (self._host, self._port))]
        # A lookup that hangs outlives the probe that asked for it and keeps its thread: never start a second one.
        if self._lookup is None or self._lookup.done():
            loop = asyncio.get_running_loop()
            self._lookup = asyncio.ensure_future(loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM))
            self._lookup.add_done_callback(lambda lookup: lookup.cancelled() or lookup.exception())
        found = await asyncio.shield(self._lookup)
        return [(family, address) for family, _, _, _, address in found]


def _kernel_rtt_s(sock: socket.socket) -> float | None:
    """The kernel's own measurement of the handshake in seconds (Linux); None where there is none."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None or not hasattr(socket, "SO_PEERSEC"):  # SO_PEERSEC: only Linux, whose struct layout this is
        return None
    info = sock.getsockopt(socket.IPPROTO_TCP, option, _TCPI_RTT_OFFSET + 4)
    if len(info) < _TCPI_RTT_OFFSET + 4:
        return None
    microseconds: int = struct.unpack_from("=I", info, _TCPI_RTT_OFFSET)[0]
    return microseconds / 1e6 or None


@contextlib.asynccontextmanager
async def measuring(replica: ReplicaSettings, probe: ProbeSettings) -> AsyncIterator[Measure]:
    """A coroutine function that measures one round trip in seconds; raises Unreachable within `probe.timeout_s`."""
    if probe.path is None:
        parts = urlsplit(replica.url)
        host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
        handshakes = Handshakes(host, port)
        yield lambda: _bounded(handshakes.rtt_s(), probe.timeout_s)
        return
    async with _http_session(probe) as session:
        url = root_url(replica.url, probe.path)
        yield lambda: _warm_get_rtt(session, url)  # the session bounds each request


async def _bounded(measurement: Awaitable[float], timeout_s: float) -> float:
    try:
        async with asyncio.timeout(timeout_s):
            return await measurement
    except TimeoutError as error:
        raise Unreachable("timeout") from error


@contextlib.asynccontextmanager
async def _http_session(probe: ProbeSettings) -> AsyncIterator[aiohttp.ClientSession]:
    import aiohttp  # comes with an extra; TCP probes do without

    async def setup_started(_: aiohttp.ClientSession, context: SimpleNamespace, __: Any) -> None:
        context.trace_request_ctx.setup_started = time.perf_counter()

    async def setup_ended(_: aiohttp.ClientSession, context: SimpleNamespace, __: Any) -> None:
        request = context.trace_request_ctx
        request.setup_s += time.perf_counter() - request.setup_started

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_start.append(setup_started)
    trace.on_connection_create_end.append(setup_ended)
    kept_s = 2 * (probe.interval_s * (1 + JITTER) + probe.timeout_s)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=1, keepalive_timeout=kept_s),
        timeout=aiohttp.ClientTimeout(total=probe.timeout_s),
        trace_configs=[trace],
    ) as session:
        yield session


async def _warm_get_rtt(session: aiohttp.ClientSession, url: str) -> float:
    """Seconds from request to response headers on a connection that stood already."""
    elapsed, setup_s = await _get(session, url)
    if setup_s:  # a new connection costs further round trips: take the next one, on the warm connection
        elapsed, setup_s = await _get(session, url)
    return elapsed - setup_s  # set up again: the server keeps no connection


async def _get(session: aiohttp.ClientSession, url: str) -> tuple[float, float]:
    """(seconds to the response headers, seconds of these spent on setting up a connection)."""
    import aiohttp

    context = SimpleNamespace(setup_started=0.0, setup_s=0.0)
    started = time.perf_counter()
    try:
        async with session.get(url, trace_request_ctx=context, allow_redirects=False) as response:
            elapsed = time.perf_counter() - started
            if response.status >= 500:
                raise Unreachable("http-5xx")
            await read_bounded(response, MAX_PROBE_BODY_BYTES)
    except (aiohttp.ClientError, OSError) as error:
        raise Unreachable(failure_kind(error)) from error
    return elapsed, context.setup_s


async def read_bounded(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    """The body, which a kept connection must read to its end.

    Raises:
        Unreachable: the body is longer than the limit.
    """
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit_bytes:
            raise Unreachable("too-large")
    return bytes(body)


@dataclass
class ProbeJob:
    """Measures one replica again and again, and tells the router what that means for its health and its cache."""

    replica: ReplicaSettings
    settings: ProbeSettings
    router: Observer
    on_failure: Callable[[str, str], None]
    """(replica name, kind of failure), for metrics."""
    watch: Watch = field(default_factory=Watch)
    _refused: bool = False

    async def run(self) -> None:
        """Probe until cancelled."""
        async with measuring(self.replica, self.settings) as measure:
            while True:
                try:
                    await self.probe(measure)
                except Exception:  # noqa: BLE001 (logged; probing goes on)
                    _log.exception("gorgo: probing replica '%s' failed by an error of its own", self.replica.name)
                await asyncio.sleep(jittered(self.settings.interval_s))

    async def probe(self, measure: Measure) -> None:
        """Measure once and report."""
        try:
            rtt_s = await measure()
        except Unreachable as failure:
            self._failed(failure.kind)
        else:
            self._succeeded(rtt_s)

    def _failed(self, kind: str) -> None:
        self.watch.fail(kind)
        self.on_failure(self.replica.name, kind)
        self._refused = self._refused or kind == "refused"
        if self.watch.failed_in_a_row == FAILURES_BEFORE_UNHEALTHY:
            _log.warning("gorgo: replica '%s' does not answer probes (%s)", self.replica.name, kind)
        # Each time anew: an answer that comes late opens the replica.
        if self.watch.failed_in_a_row >= FAILURES_BEFORE_UNHEALTHY:
            self.router.set_health(self.replica.name, False)

    def _succeeded(self, rtt_s: float) -> None:
        name = self.replica.name
        if self._refused:  # nothing listened there for a while: the engine restarted and its cache is gone
            self._refused = False
            self.router.forget(name)
        if self.watch.failed_in_a_row >= FAILURES_BEFORE_UNHEALTHY:
            _log.warning("gorgo: replica '%s' answers probes again", name)
        self.watch.succeed()
        self.router.observe_rtt(name, rtt_s)
        self.router.set_health(name, True)


def jittered(interval_s: float) -> float:
    """The interval, up to 20% shorter or longer."""
    return interval_s * random.uniform(1 - JITTER, 1 + JITTER)
