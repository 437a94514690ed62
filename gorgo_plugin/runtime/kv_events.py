"""Follows the KV-cache events that an engine publishes over ZeroMQ, one job a replica, off the request path.

vLLM publishes `[topic, 8-byte big-endian sequence number, payload]` on a PUB socket and answers an 8-byte sequence
number on a ROUTER socket with the batches it still has from there on, up to an end marker. Numbers start at 0 with the
engine. Whatever goes wrong here costs exactness, never a decision: the router falls back to its own credit.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gorgo_plugin.errors import SettingsError
from gorgo_plugin.prefix import KvEvent
from gorgo_plugin.runtime.kv_wire import Unreadable, WireReader
from gorgo_plugin.runtime.probes import jittered
from gorgo_plugin.settings import KvEventsSettings, ReplicaSettings, Settings

_log = logging.getLogger(__name__)

END_SEQUENCE = b"\xff" * 8  # -1: the end of a replay
MAX_FRAME_BYTES = 16 * 2**20  # a batch of a million tokens has about 4 MB
LIVE_HWM = 2000  # batches queued here; what a publisher sends beyond them is lost, which shows as a gap
REPLAY_HWM = 20_000  # vLLM keeps 10,000 batches and drops what a reader does not take at once
REPLAY_TIMEOUT_S = 3.0  # without a batch; a publisher looks for requests every 0.1 s
REPLAY_EVERY_S = 1.0  # a publisher that loses batches all the time is not asked for them all the time
RESYNC_EVERY_S = 30.0  # how often a history that is not complete is asked for from its start
RETRY_S = 1.0  # after an error of our own
LOST_AFTER_S = 5.0  # a connection away for longer is a source lost; a shorter break is bridged by a replay
HEARTBEAT_MS = 2000  # ZeroMQ's own, which finds a peer that hangs
TURN_S = 0.005  # work between two pauses; a pause of less than a millisecond is none
DUTY = 0.5  # share of its thread a publisher may use; probes and scrapes run there too


class Observer(Protocol):
    """The part of the Router that events are told to."""

    def observe(self, name: str, events: Sequence[KvEvent], from_start: bool = False, /) -> bool: ...
    def lost(self, name: str, /) -> None: ...


@dataclass
class KvWatch:
    """What became of the events of one replica; for the status page.

    Attributes:
        connected: the publisher is connected.
        batches, bad_frames, gaps, duplicates, restarts, replays: counted since the start. A gap is counted whether a
            replay filled it or not.
        skipped: events left out or not understood.
    """

    connected: bool = False
    batches: int = 0
    bad_frames: int = 0
    gaps: int = 0
    duplicates: int = 0
    restarts: int = 0
    replays: int = 0
    skipped: int = 0


def check_installed(settings: Settings) -> None:
    """See that what the settings ask for can be had.

    Raises:
        SettingsError: pyzmq is missing.
    """
    for replica in settings.replicas:
        if replica.kv_events is not None and importlib.util.find_spec("zmq") is None:
            raise SettingsError(
                f"replicas: '{replica.name}' has kv_events, which need pyzmq: pip install 'gorgo-plugin[kv-events]'"
            )


@dataclass
class KvEventJob:
    """Follows the events of one replica and tells the router."""

    replica: ReplicaSettings
    settings: KvEventsSettings
    router: Observer
    on_trouble: Callable[[str, str], None]
    """(replica name, kind of trouble), for metrics."""
    on_events: Callable[[str, int], None]
    """(replica name, events taken in), for metrics."""
    watch: KvWatch = field(default_factory=KvWatch)
    _next: int | None = None  # the sequence number expected; None: nothing is known
    _last_ts: float = float("-inf")
    _replayed_s: float = float("-inf")
    _disconnected_s: float | None = None

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                await self._follow()
            except Exception:  # noqa: BLE001 (logged; following goes on)
                _log.exception(
                    "gorgo: following the KV events of '%s' failed by an error of its own", self.replica.name
                )
                self._lose("error")
            await asyncio.sleep(jittered(RETRY_S))

    async def _follow(self) -> None:
        import zmq
        import zmq.asyncio

        context = zmq.asyncio.Context(io_threads=1)
        socket = context.socket(zmq.SUB)
        reader = WireReader()
        watching: asyncio.Task[None] | None = None
        try:
            _harden(socket, LIVE_HWM)
            socket.subscribe(self.settings.topic.encode())
            watching = asyncio.create_task(self._watch_connection(socket.get_monitor_socket()))
            if "*" in self.settings.endpoint:
                socket.bind(self.settings.endpoint)
            else:
                socket.connect(self.settings.endpoint)
                await self._replay(context, reader, 0)
            worked_s = 0.0
            while True:
                frames = await socket.recv_multipart()
                started = time.perf_counter()
                await self._live(context, reader, frames)
                self.watch.skipped = reader.skipped
                worked_s += time.perf_counter() - started
                if worked_s < TURN_S:
                    await asyncio.sleep(0)
                else:
                    await asyncio.sleep(worked_s * (1 - DUTY) / DUTY)
                    worked_s = 0.0
        finally:
            if watching is not None:
                watching.cancel()
            context.destroy(linger=0)

    async def _watch_connection(self, monitor: Any) -> None:
        import zmq
        from zmq.utils.monitor import parse_monitor_message

        while True:
            away_s = None if self._disconnected_s is None else time.monotonic() - self._disconnected_s
            wait_s = None if away_s is None else max(LOST_AFTER_S - away_s, 0.0)  # whatever is tried meanwhile
            try:
                async with asyncio.timeout(wait_s):
                    event = parse_monitor_message(await monitor.recv_multipart())["event"]
            except TimeoutError:
                self._disconnected_s = None
                self._lose("lost")
                continue
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:  # for a process that hangs, its system still accepts
                self.watch.connected, self._disconnected_s = True, None
            elif event == zmq.EVENT_DISCONNECTED and self.watch.connected:
                self.watch.connected, self._disconnected_s = False, time.monotonic()

    async def _live(self, context: Any, reader: WireReader, frames: list[bytes]) -> None:
        """Take one message of the publisher."""
        try:
            sequence, ts, events = _parse(frames[1:] if len(frames) == 3 else [], reader)
        except Unreadable:
            self._bad_frame()
            return
        if self._next is not None and sequence < self._next:
            if ts <= self._last_ts:  # sent twice, or a replay has brought it
                self.watch.duplicates += 1
                return
            self.watch.restarts += 1  # an engine counts from 0 when it starts
            self._lose("restart")
        if sequence and sequence != self._next:
            await self._bridge_gap(context, reader, sequence)
        if self._next is None or sequence >= self._next:
            complete = self._take(sequence, ts, events)
            if not complete and self.settings.replay and self._due(RESYNC_EVERY_S):
                await self._replay(context, reader, 0)

    async def _bridge_gap(self, context: Any, reader: WireReader, sequence: int) -> None:
        """Have the batches before `sequence` replayed; without them the history begins anew, incomplete."""
        known = self._next is not None
        if known:
            self.watch.gaps += 1
            self.on_trouble(self.replica.name, "gap")
        if self._due(REPLAY_EVERY_S):
            await self._replay(context, reader, self._next or 0)
        if known and (self._next is None or self._next < sequence):
            self._lose("unfilled-gap")

    def _due(self, every_s: float) -> bool:
        return time.monotonic() - self._replayed_s >= every_s

    async def _replay(self, context: Any, reader: WireReader, start: int) -> None:
        """Ask for the batches from number `start` on and take those that follow on what is known."""
        if self.settings.replay is None:
            return
        self._replayed_s = time.monotonic()
        self.watch.replays += 1
        first = True
        async for frames in _replayed(context, self.settings.replay, start):
            try:
                sequence, ts, events = _parse(frames, reader)
            except Unreadable:
                self._bad_frame()
                return
            if first and start == 0:
                self._next = None  # told from its beginning, or from as far back as the publisher remembers
            if not first and sequence != self._next:
                return  # dropped on the way
            if first and start and sequence != start:
                return  # no longer remembered
            first = False
            self._take(sequence, ts, events)
            await asyncio.sleep(0)

    def _take(self, sequence: int, ts: float, events: Sequence[KvEvent]) -> bool:
        self._next, self._last_ts = sequence + 1, max(ts, self._last_ts)
        self.watch.batches += 1
        self.on_events(self.replica.name, len(events))
        return self.router.observe(self.replica.name, events, sequence == 0)

    def _bad_frame(self) -> None:
        self.watch.bad_frames += 1
        self.on_trouble(self.replica.name, "bad-frame")

    def _lose(self, kind: str) -> None:
        """Forget the history; what comes next begins a new one."""
        self._next, self._last_ts = None, float("-inf")
        self.on_trouble(self.replica.name, kind)
        self.router.lost(self.replica.name)


def _parse(frames: Sequence[bytes], reader: WireReader) -> tuple[int, float, list[KvEvent]]:
    """(sequence number, publisher's time, events) of `[sequence number, payload]`."""
    if len(frames) != 2 or len(frames[0]) != 8:
        raise Unreadable("expected a sequence number of 8 bytes and a payload")
    return int.from_bytes(frames[0], "big"), *reader.read(frames[1])


async def _replayed(context: Any, endpoint: str, start: int) -> AsyncIterator[list[bytes]]:
    """`[sequence number, payload]` of each batch replayed; ends early where the publisher does not answer."""
    import zmq

    socket = context.socket(zmq.DEALER)
    try:
        _harden(socket, REPLAY_HWM)
        socket.connect(endpoint)
        await socket.send_multipart([b"", start.to_bytes(8, "big")])
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(REPLAY_TIMEOUT_S):
                    frames = await socket.recv_multipart()
                frames = frames[-2:]  # behind an empty frame, and with a topic before them since vLLM 0.32
                if frames[0] == END_SEQUENCE:
                    return
                yield frames
    finally:
        socket.close(linger=0)


def _harden(socket: Any, hwm: int) -> None:
    """Bound what a peer can make us keep."""
    import zmq

    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVHWM, hwm)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2 * HEARTBEAT_MS)
