"""A stretch of load on one process, measured from outside."""

from __future__ import annotations

from dataclasses import dataclass

import psutil


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
    """User and system time a process has taken so far, in seconds; counted in hundredths."""
    times = process.cpu_times()
    return float(times.user + times.system)
