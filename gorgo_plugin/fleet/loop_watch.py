"""A LiteLLM callback for benchmarks: how late the proxy's event loop runs, and how long the plugin holds it.

Named in `litellm_settings.callbacks` and given a file in GORGO_LOOP_WATCH, it appends lines `lag|hold|work SECONDS MS`:
SECONDS is the system's monotonic clock. A lag is how much later than due the loop woke; a hold is one uninterrupted
stretch of the plugin's own code on the loop, whatever preempted it included, and work is the CPU time of that stretch.
Garbage collections that happen to begin in a stretch are left out: LiteLLM's heap is what they go through.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import os
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

from gorgo_plugin.fleet.bench_litellm import LOOP_WATCH_FILE

PERIOD_S = 0.005
WRITE_EVERY_S = 0.5
MIN_HOLD_MS = 0.05  # shorter ones are too many to write and too short to matter

_lines: list[str] = []


def _note(kind: str, ms: float) -> None:
    _lines.append(f"{kind} {time.monotonic():.3f} {ms:.3f}\n")


class _Collections:
    """Seconds that garbage collections have taken in this process."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0
        self._began = 0.0, 0.0
        gc.callbacks.append(self._note)

    def _note(self, phase: str, _: dict[str, int]) -> None:
        now = time.perf_counter(), time.thread_time()
        if phase == "start":
            self._began = now
        else:
            self.wall_s += now[0] - self._began[0]
            self.cpu_s += now[1] - self._began[1]


_collections = _Collections()


@contextlib.contextmanager
def _stretch() -> Iterator[None]:
    """Note one stretch of the plugin's code."""
    began_s, worked_s = time.perf_counter() - _collections.wall_s, time.thread_time() - _collections.cpu_s
    try:
        yield
    finally:
        held_ms = (time.perf_counter() - _collections.wall_s - began_s) * 1e3
        if held_ms >= MIN_HOLD_MS:
            _note("hold", held_ms)
            _note("work", (time.thread_time() - _collections.cpu_s - worked_s) * 1e3)


async def _watch(path: Path) -> None:
    written_s = time.monotonic()
    while True:
        due_s = time.monotonic() + PERIOD_S
        await asyncio.sleep(PERIOD_S)
        now_s = time.monotonic()
        _note("lag", (now_s - due_s) * 1e3)
        if now_s - written_s > WRITE_EVERY_S:
            written_s = now_s
            lines = "".join(_lines)
            _lines.clear()
            await asyncio.to_thread(_append, path, lines)


def _append(path: Path, lines: str) -> None:
    with path.open("a") as file:
        file.write(lines)


class _Stepped:
    """Awaits a coroutine and times each step between two suspensions."""

    def __init__(self, coroutine: Awaitable[Any]) -> None:
        self._steps = coroutine.__await__()

    def __await__(self) -> Generator[Any, Any, Any]:
        send: Callable[[], Any] = functools.partial(next, self._steps)
        while True:
            try:
                with _stretch():
                    waited_for = send()
            except StopIteration as end:
                return end.value
            try:
                value = yield waited_for
                send = functools.partial(self._steps.send, value)
            except BaseException as error:  # noqa: BLE001 (handed on, into the coroutine)
                send = functools.partial(self._steps.throw, error)


def _timed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def stepped(*args: Any, **kwargs: Any) -> Any:
        return await _Stepped(function(*args, **kwargs))

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with _stretch():
            return function(*args, **kwargs)

    return stepped if inspect.iscoroutinefunction(function) else called


def _time_class(cls: type) -> None:
    for name, member in list(vars(cls).items()):
        if inspect.isfunction(member) and not name.startswith("_"):
            setattr(cls, name, _timed(member))


class LoopWatch(CustomLogger):  # type: ignore[misc]  # LiteLLM is not typed
    """Has no hooks, so that LiteLLM does nothing for it."""


callback = LoopWatch()
if LOOP_WATCH_FILE in os.environ:
    if "gorgo_plugin.litellm_strategy" in sys.modules:
        from gorgo_plugin.litellm_strategy.hooks import GorgoCallback
        from gorgo_plugin.litellm_strategy.selector import Selector

        _time_class(GorgoCallback)
        _time_class(Selector)
    _task = asyncio.get_running_loop().create_task(_watch(Path(os.environ[LOOP_WATCH_FILE])))
