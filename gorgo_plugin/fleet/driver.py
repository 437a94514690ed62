"""Drives an engine model in real time on an asyncio loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence

from gorgo_plugin.fleet.block_cache import Change
from gorgo_plugin.fleet.engine import Engine, EngineRequest, Event, Finished


class EngineLost(Exception):
    """The engine restarted while it held the request."""


class EngineDriver:
    """Advances an engine by the loop's clock and hands each request its events through a queue.

    Must be created on, and used from, one running loop.
    """

    def __init__(self, engine: Engine, on_changes: Callable[[Sequence[Change]], None] | None = None) -> None:
        """`on_changes` is given the changes of the prefix cache, of an engine that records them."""
        self.engine = engine
        self._on_changes = on_changes
        self._loop = asyncio.get_running_loop()
        self._queues: dict[Hashable, asyncio.Queue[Event | None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, request: EngineRequest) -> asyncio.Queue[Event | None]:
        """Give a request to the engine; its events arrive in the queue, None instead when the engine restarts.

        Raises:
            ValueError: the engine can never serve it.
        """
        self.engine.submit(request, self._loop.time())
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._queues[request.id] = queue
        self._arm()
        return queue

    def cancel(self, request_id: Hashable) -> None:
        """Drop a request; one that ended already is ignored."""
        if self._queues.pop(request_id, None) is not None:
            self.engine.cancel(request_id, self._loop.time())
            self._arm()

    def restart(self) -> None:
        """Restart the engine: what it held is lost, and so is its cache."""
        self._tick()
        for request_id in self.engine.restart(self._loop.time()):
            queue = self._queues.pop(request_id, None)
            if queue is not None:
                queue.put_nowait(None)
        self._arm()

    def close(self) -> None:
        """Stop the clock."""
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        if self._on_changes is not None and (changes := self.engine.take_changes()):
            self._on_changes(changes)
        if self._timer is not None:
            self._timer.cancel()
        at_s = self.engine.next_event_s()
        self._timer = None if at_s is None else self._loop.call_at(at_s, self._tick)

    def _tick(self) -> None:
        for event in self.engine.advance(self._loop.time()):
            queue = self._queues.get(event.id)
            if queue is None:
                continue
            queue.put_nowait(event)
            if isinstance(event, Finished):
                del self._queues[event.id]
        self._arm()
