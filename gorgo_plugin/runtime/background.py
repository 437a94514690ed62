"""One daemon thread with its own event loop, for everything a gateway does off the request path.

Why not tasks on the gateway's loop: a busy gateway's loop lags by tens of milliseconds, which would be read as network,
a page of metrics parsed there holds every request up, and in the sync SDK there is no loop at all.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor

# Name lookups run in threads, made as needed; enough that those that hang do not hold up the others.
LOOKUP_THREADS = 64

Job = Callable[[], Coroutine[object, object, None]]

_log = logging.getLogger(__name__)


class Background:
    """Runs a set of named jobs until told otherwise. All methods may be called from any thread or loop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._jobs: Mapping[Hashable, Job] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: asyncio.Event | None = None
        self._stopped = False

    @property
    def running(self) -> bool:
        """Whether the thread is alive; False in a forked child, where `ensure_started` starts a new one."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def want(self, jobs: Mapping[Hashable, Job]) -> None:
        """Make exactly these jobs run: jobs of other keys are cancelled, new ones started, the rest left alone."""
        with self._lock:
            self._jobs = dict(jobs)
            self._notify()

    def ensure_started(self) -> None:
        """Start the thread unless it runs already or `stop` was called."""
        if self.running or self._stopped:
            return
        with self._lock:
            if self.running or self._stopped:
                return
            self._loop = self._changed = None
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def request_stop(self) -> None:
        """Ask the jobs to end; returns at once."""
        with self._lock:
            self._stopped = True
            self._notify()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end; False when it did not in time."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)
        return not self.running

    def _notify(self) -> None:
        if self._loop is not None and self._changed is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed.set)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception:  # noqa: BLE001 (logged; it must not end in a bare traceback of a thread)
            _log.exception("gorgo: background thread ended by an error")

    async def _serve(self) -> None:
        changed = asyncio.Event()
        with self._lock:
            self._loop, self._changed = asyncio.get_running_loop(), changed
            self._loop.set_default_executor(ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix=self._name))
        tasks: dict[Hashable, asyncio.Task[None]] = {}
        while not self._stopped:
            changed.clear()
            with self._lock:
                jobs = self._jobs
            for key in [key for key in tasks if key not in jobs]:
                tasks.pop(key).cancel()
            for key, job in jobs.items():
                if key not in tasks:
                    tasks[key] = asyncio.create_task(job(), name=f"gorgo {key}")
            await changed.wait()
        # asyncio.run cancels what is left and waits for it.
