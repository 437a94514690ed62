"""What is asked of malloc, tried in processes of its own, because it holds for a process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")

_BUSY_THREADS = """
import ctypes
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from gorgo_plugin.envoy_ext_proc.memory import limit_arenas

print(limit_arenas())
together = Barrier(8)

def allocate(size):
    kept = [bytes(size) for _ in range(100)]
    together.wait()
    return len(kept)

with ThreadPoolExecutor(8) as pool:
    assert list(pool.map(allocate, range(1000, 1008))) == [100] * 8
    ctypes.CDLL(None).malloc_stats()
"""

_HOLES = """
import asyncio
import psutil
from gorgo_plugin.envoy_ext_proc.memory import give_back

async def main():
    blocks = [bytes([1]) * 12_000 for _ in range(4_000)]
    del blocks[::2]
    before = psutil.Process().memory_info().rss
    task = asyncio.create_task(give_back(0.01))
    for _ in range(200):
        await asyncio.sleep(0.05)
        if (given := before - psutil.Process().memory_info().rss) > 8_000_000:
            break
    task.cancel()
    print(given)

asyncio.run(main())
"""


def _run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    without = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=without | environment, capture_output=True, text=True, timeout=60, check=True)


def test_threads_share_two_heaps() -> None:
    done = _run(_BUSY_THREADS)
    assert done.stdout == "True\n"
    assert done.stderr.count("Arena ") == 2


def test_the_environment_says_how_many_heaps() -> None:
    done = _run(_BUSY_THREADS, MALLOC_ARENA_MAX="5")
    assert done.stdout == "False\n"
    assert done.stderr.count("Arena ") == 5


def test_holes_go_back_to_the_system() -> None:
    assert int(_run(_HOLES).stdout) > 8_000_000
