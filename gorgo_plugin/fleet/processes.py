"""Child processes that end with their parent: mock replicas and gateways of a demo or a test."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gorgo_plugin.errors import GorgoError

READY_S = 120.0  # a gateway imports for some ten seconds on a busy machine
STOP_S = 5.0  # from the polite signal to the final one
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TAIL_LINES = 15


class ProcessError(GorgoError, RuntimeError):
    """A process of the fleet did not start, or ended before its time."""


def _die_with_parent() -> None:
    """Linux ends the child even when the parent was killed without a chance to clean up."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """One running process."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.process = process
        self._log = log

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def check(self) -> None:
        """Raise `ProcessError` with the end of its log when it is not running any more."""
        if self.process.returncode is not None:
            raise self.failure(f"ended with status {self.process.returncode}")

    def failure(self, what: str) -> ProcessError:
        """An error that quotes the end of the log."""
        lines = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:] if self._log.exists() else []
        return ProcessError("\n".join([f"{self.name} {what}; the end of {self._log}:", *lines]))

    async def stop(self) -> None:
        """End it: politely, then for certain."""
        for send in (self.process.terminate, self.process.kill):
            if self.process.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                send()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), STOP_S)


@contextlib.asynccontextmanager
async def running(
    name: str,
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    *,
    read_output: bool = False,
) -> AsyncIterator[Child]:
    """Run a process for the length of the block; its output goes to `log` (standard output not, if it is to be read).

    Raises:
        ProcessError: it cannot be started.
    """
    with log.open("wb") as sink:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if read_output else sink,
                stderr=sink,
                env=dict(os.environ) | dict(environment or {}),
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            raise ProcessError(f"{name}: '{command[0]}' cannot be started: {error.strerror}") from None
    child = Child(name, process, log)
    try:
        yield child
    finally:
        await asyncio.shield(child.stop())


async def first_line(child: Child) -> dict[str, Any]:
    """The JSON object that a process prints when it is ready.

    Raises:
        ProcessError: it ended, or printed nothing in time.
    """
    assert child.process.stdout is not None
    try:
        line = await asyncio.wait_for(child.process.stdout.readline(), READY_S)
    except TimeoutError:
        raise child.failure(f"was not ready after {READY_S:.0f} s") from None
    if not line:
        await child.process.wait()
        child.check()
    ready: dict[str, Any] = json.loads(line)
    return ready


async def until(child: Child, ready: Callable[[], Any], interval_s: float = 0.1) -> None:
    """Await `ready()` again and again until it gives true.

    Raises:
        ProcessError: the process ended, or was not ready in time.
    """
    deadline_s = asyncio.get_running_loop().time() + READY_S
    while not await ready():
        child.check()
        if asyncio.get_running_loop().time() > deadline_s:
            raise child.failure(f"was not ready after {READY_S:.0f} s")
        await asyncio.sleep(interval_s)


def program(name: str, hint: str) -> str:
    """The path of a program, beside this interpreter or elsewhere.

    Raises:
        ProcessError: it is not installed; `hint` says how it comes to be.
    """
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise ProcessError(f"{name} is not installed; {hint}")
    return found


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
