"""A stretch of load on one process, measured from outside."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass

import psutil

_clock_of = getattr(ctypes.CDLL(None), "clock_getcpuclockid", None)  # macOS has none


@dataclass(frozen=True, slots=True)
class Slice:
    """What a process did in one slice of a load.

    Attributes:
        cpu_s: user and system time of all its threads.
        wall_s: how long the slice took.
        times_ms: of each request, to the end of its answer.
    """

    cpu_s: float
    wall_s: float
    times_ms: tuple[float, ...]


def cpu_s(process: psutil.Process) -> float:
    """User and system time a process has taken so far, in seconds: by its own clock, in nanoseconds.

    The system's tables count in hundredths, of which a request takes a fifth.

    Raises:
        OSError: there is no such process.
    """
    if _clock_of is None:
        times = process.cpu_times()
        return float(times.user + times.system)
    clock = ctypes.c_int()
    if error := _clock_of(process.pid, ctypes.byref(clock)):
        raise OSError(error, os.strerror(error))
    return time.clock_gettime(clock.value)
