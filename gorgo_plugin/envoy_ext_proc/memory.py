"""Keeps the resident memory of a service near what it uses.

Bodies come in all sizes and live for milliseconds: each heap of glibc's malloc is left with ever more holes. Where the
C library is another one, nothing is done.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from typing import Any

GIVE_BACK_S = 10.0  # it takes 1 to 2 ms, in which other threads may have to wait for memory
ARENAS = 2  # heaps; by default each thread gets one, up to eight for each core, and all have holes
_M_ARENA_MAX = -8  # mallopt(3)


def limit_arenas() -> bool:
    """Let threads share `ARENAS` heaps, unless the environment says how many; true if it took effect.

    To be called before threads are started: what has a heap keeps it.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return False
    mallopt = _of_the_c_library("mallopt")
    return mallopt is not None and mallopt(_M_ARENA_MAX, ARENAS) == 1


async def give_back(every_s: float = GIVE_BACK_S) -> None:
    """Return what malloc keeps free to the system, now and then, until cancelled."""
    trim = _of_the_c_library("malloc_trim")
    while trim is not None:
        await asyncio.sleep(every_s)
        await asyncio.to_thread(trim, 0)


def _of_the_c_library(name: str) -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), name, None)
