"""Keeps the state file of a live gateway: read at the start, written on an interval and at the end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gorgo_plugin.errors import GorgoError
from gorgo_plugin.router import Router
from gorgo_plugin.runtime.state_file import StateFile
from gorgo_plugin.settings import Settings

_log = logging.getLogger(__name__)


class Keeper:
    """The state file that the settings name, if they name one. Thread-safe: the end comes from another thread.

    Attributes:
        error: why the last write failed; None when it did not.
    """

    def __init__(self, settings: Settings) -> None:
        self.error: str | None = None
        self._lock = threading.Lock()
        self._path = settings.state.path
        self._file = None if self._path is None else StateFile(Path(self._path).expanduser())
        self._saved_s: float | None = None

    def restored(self, settings: Settings, build: Callable[[Mapping[str, Any] | None], Router]) -> Router:
        """The router that `build` makes of the state in the file; of none where that cannot be used."""
        state = None if self._file is None else self._file.read(settings)
        if self._file is None or state is None:
            return build(None)
        try:
            return build(state)
        except GorgoError:
            raise
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            self._file.set_aside(f"its content is not as expected ({type(error).__name__}: {error!s:.80})")
            return build(None)

    def set_settings(self, settings: Settings, router: Router) -> None:
        """Follow a reload; what was kept in another file is saved there once more."""
        if settings.state.path != self._path:
            self.close(router)
            with self._lock:
                self._path = settings.state.path
                self._file = None if self._path is None else StateFile(Path(self._path).expanduser())

    async def run(self, router: Router, interval_s: float) -> None:
        """Save every `interval_s`, in a thread."""
        while True:
            await asyncio.sleep(interval_s)
            await asyncio.to_thread(self.save, router)

    def save(self, router: Router) -> None:
        """Write the file; a failure is logged once, and shown."""
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(router)
            except (ArithmeticError, OSError, ValueError) as error:
                if self.error is None:
                    _log.warning("gorgo: state.path: %s cannot be written (%s)", self._file.path, error)
                self.error = str(error)
            else:
                self.error, self._saved_s = None, time.monotonic()

    def close(self, router: Router) -> None:
        """Save once more, and let another worker have the file."""
        self.save(router)
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def describe(self) -> dict[str, Any] | None:
        """File, seconds since it was written, and what went wrong; None where no state is kept."""
        with self._lock:
            if self._file is None:
                return None
            age_s = None if self._saved_s is None else time.monotonic() - self._saved_s
            return {"path": str(self._file.path), "saved_age_s": age_s, "error": self.error}
