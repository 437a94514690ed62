"""Many simulated runs, in as many processes as asked for: every row with every seed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from gorgo_plugin.fleet.generated import generate
from gorgo_plugin.fleet.mooncake import read_trace
from gorgo_plugin.fleet.replay_inputs import trace_requests
from gorgo_plugin.fleet.requests import ReplayRequest
from gorgo_plugin.fleet.rows import Row
from gorgo_plugin.fleet.simulator import Outcome, simulate
from gorgo_plugin.fleet.topology import Fleet
from gorgo_plugin.fleet.workload import WorkloadError

LOOK_EVERY_S = 0.2  # how often a progress bar moves


@dataclass(frozen=True, slots=True)
class Source:
    """Where requests come from; a trace is the same for every seed.

    Attributes:
        trace: a Mooncake-format file; None: `workload` is generated.
        workload: name of a generated workload.
        time_scale: stretches arrivals: 2 halves their rate.
        limit: takes only the first so many requests.
    """

    trace: Path | None = None
    workload: str = ""
    time_scale: float = 1.0
    limit: int | None = None

    @property
    def name(self) -> str:
        """The trace's file name, or the workload's name."""
        return self.workload if self.trace is None else self.trace.name


def load(source: Source, seed: int, block_tokens: int) -> Sequence[ReplayRequest]:
    """The requests of a source, for engines with blocks of so many tokens.

    Raises:
        WorkloadError: the trace cannot be read or does not fit the blocks, or no requests are left.
    """
    return _load(source, seed if source.trace is None else 0, block_tokens)


@lru_cache(maxsize=1)  # a process serves all rows of a seed, one after the other
def _load(source: Source, seed: int, block_tokens: int) -> Sequence[ReplayRequest]:
    if source.trace is None:
        requests = generate(source.workload, seed, rate_scale=1.0 / source.time_scale, block_tokens=block_tokens)
    else:
        requests = trace_requests(read_trace(source.trace), source.time_scale, block_tokens)
    taken = list(islice(requests, source.limit))
    if not taken:
        raise WorkloadError(f"workload {source.name}: holds no request")
    return taken


def run_all(
    rows: Sequence[Row],
    seeds: Sequence[int],
    fleet: Fleet,
    source: Source,
    jobs: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[list[Outcome]]:
    """Serve the workload with every row and seed; what comes out does not depend on `jobs`.

    Returns outcomes[row][seed]. `on_progress` is told how many requests were served so far, of all runs together.

    Raises:
        GorgoError: as `load` and `simulate`.
    """
    tasks = [(row, fleet, source, seed) for seed in seeds for row in rows]
    counter = multiprocessing.get_context("spawn").Value("Q", 0)
    if jobs == 1:
        _begin_worker(counter, on_progress)
        done = [_run(task) for task in tasks]
    else:
        done = _in_processes(tasks, min(jobs, len(tasks)), counter, on_progress)
    return [done[number :: len(rows)] for number in range(len(rows))]


Task = tuple[Row, Fleet, Source, int]
_counter: Any = None  # of this process: what all runs have served, in shared memory
_tell: Callable[[int], None] = lambda _: None  # noqa: E731 (set once a process begins)


def _begin_worker(counter: Any, tell: Callable[[int], None] = lambda _: None) -> None:
    global _counter, _tell
    _counter, _tell = counter, tell


def _served() -> None:
    with _counter.get_lock():
        _counter.value += 1
    _tell(_counter.value)


def _run(task: Task) -> Outcome:
    row, fleet, source, seed = task
    return simulate(row, fleet, load(source, seed, fleet.block_tokens), seed, on_served=_served)


def _in_processes(tasks: Sequence[Task], jobs: int, counter: Any, on_progress: Callable[[int], None]) -> list[Outcome]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _begin_worker, (counter,)) as pool:
        runs = [pool.submit(_run, task) for task in tasks]
        waiting: set[Future[Outcome]] = set(runs)
        try:
            while waiting:
                done, waiting = wait(waiting, LOOK_EVERY_S, FIRST_COMPLETED)
                on_progress(counter.value)
                for run in done:
                    run.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [run.result() for run in runs]
