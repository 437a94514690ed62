"""The simulated runs behind `gorgo bench routing`, each kept in a file under a key of all that it depends on."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

import gorgo_plugin
from gorgo_plugin.fleet.rows import Row
from gorgo_plugin.fleet.simulation_report import figures
from gorgo_plugin.fleet.simulation_runs import Source, load
from gorgo_plugin.fleet.simulator import Outcome, simulate
from gorgo_plugin.fleet.topology import Fleet

_KEPT_FORM = 1  # of the files; a file of another form is not read
_FEW_TOKENS = 64  # a prefill of fewer tokens is all overhead
# Parts of the package that no simulated run goes through.
_BESIDE = ("litellm_strategy/", "envoy_ext_proc/", "fleet/bench_", "fleet/simulation_plots")


@dataclass(frozen=True, slots=True)
class Job:
    """One run: `source` through `row` on `fleet`. With `series` the time of each request is kept."""

    row: Row
    fleet: Fleet
    source: Source
    seed: int
    series: bool = False

    def key(self) -> str:
        """A digest of everything that the result depends on, the code included."""
        inputs = {
            "form": _KEPT_FORM,
            "code": _code_digest(),
            "row": asdict(self.row),
            "fleet": self.fleet.model_dump(mode="json"),
            "workload": self.source.workload or _file_digest(self.source.trace),
            "time_scale": self.source.time_scale,
            "limit": self.source.limit,
            "seed": self.seed,
            "series": self.series,
        }
        return _digest([msgspec.json.encode(inputs, order="deterministic")])


@dataclass(frozen=True, slots=True)
class Result:
    """What is kept of one run.

    Attributes:
        figures: as `simulation_report.figures` gives them.
        weights: W_rtt and W_queue at the end of the run.
        overhead_ms: learned fixed milliseconds of a request at the replica that served most, and the median prefill of
            the prompts that were all but cached there; NaN where nothing is known.
        at_s, ttft_ms: of each request, where the job asked for it.
    """

    figures: Mapping[str, Any]
    weights: tuple[float, float]
    overhead_ms: tuple[float | None, float | None]
    at_s: Sequence[float] = field(default_factory=list)
    ttft_ms: Sequence[float] = field(default_factory=list)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


@cache
def _code_digest() -> str:
    root = Path(gorgo_plugin.__file__).parent
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return _digest((root / name).read_bytes() for name in names if not name.startswith(_BESIDE))


@cache
def _file_digest(path: Path | None) -> str:
    return _digest([path.read_bytes()]) if path is not None else ""


def run_jobs(
    jobs: Iterable[Job], store: Path, processes: int, say: Callable[[int, int], None] = lambda _done, _all: None
) -> dict[str, Result]:
    """The results of all jobs by key: read from `store` where they are there, else run and written as they come.

    Args:
        jobs: each is run once, however often it is asked for.
        store: folder of results; a run that was broken off goes on where it stopped.
        processes: runs at a time.
        say: is told how many results are there, and how many there will be.

    Raises:
        GorgoError: as `load` and `simulate`.
    """
    store.mkdir(parents=True, exist_ok=True)
    wanted = {job.key(): job for job in jobs}
    missing = {key: job for key, job in wanted.items() if not _path(store, key).exists()}
    # Neighbours share a workload, which a process keeps.
    ordered = sorted(missing.items(), key=lambda one: (one[1].source.name, one[1].source.time_scale, one[1].seed))
    say(len(wanted) - len(missing), len(wanted))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        runs = [pool.submit(_run_and_keep, job, key, store) for key, job in ordered]
        try:
            for done, run in enumerate(as_completed(runs), len(wanted) - len(missing) + 1):
                run.result()
                say(done, len(wanted))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {key: msgspec.json.decode(_path(store, key).read_bytes(), type=Result) for key in wanted}


def _path(store: Path, key: str) -> Path:
    return store / f"{key}.json"


def _run_and_keep(job: Job, key: str, store: Path) -> None:
    kept = msgspec.json.encode(run(job))
    unfinished = store / f"{key}.{os.getpid()}.part"
    unfinished.write_bytes(kept)
    unfinished.replace(_path(store, key))


def run(job: Job) -> Result:
    """Run one job now."""
    outcome = simulate(job.row, job.fleet, load(job.source, job.seed, job.fleet.block_tokens), job.seed)
    weights = outcome.learned[0].weights[-1]
    return Result(
        figures=asdict(figures(outcome)),
        weights=(float(weights[0]), float(weights[1])),
        overhead_ms=_overhead_ms(outcome),
        at_s=_rounded(outcome.at_s, 3) if job.series else [],
        ttft_ms=_rounded(outcome.ttft_ms, 1) if job.series else [],
    )


def _rounded(values: NDArray[np.float64], decimals: int) -> list[float]:
    rounded: list[float] = values.round(decimals).tolist()
    return rounded


def _overhead_ms(outcome: Outcome) -> tuple[float | None, float | None]:
    number = int(np.bincount(outcome.replica).argmax())
    rates = outcome.learned[0].rates.get(outcome.replicas[number], {})
    learned = float(rates["overhead_ms"][-1]) if "overhead_ms" in rates else None
    few = (outcome.replica == number) & (outcome.prompt_tokens - outcome.cached_tokens <= _FEW_TOKENS)
    return learned, float(np.median(outcome.numbers["prefill_ms"][few])) if few.any() else None
