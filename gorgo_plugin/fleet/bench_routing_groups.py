"""Runs of the routing benchmark by table and line, and figures over their seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gorgo_plugin.fleet.bench_routing_jobs import Result
from gorgo_plugin.fleet.bench_routing_plan import Entry

FIGURES = ("ttft_p50_ms", "ttft_p95_ms", "ttft_p99_ms", "e2e_p95_ms")


@dataclass(frozen=True, slots=True)
class Table:
    """The runs of one case on one fleet: row -> its results, one per seed, in the order of the plan."""

    case: str
    fleet: str
    rows: Mapping[str, Sequence[Result]]

    def figure(self, row: str, name: str) -> float:
        """The geometric mean of a figure over the seeds."""
        return geometric_mean(result.figures[name] for result in self.rows[row])

    def mean(self, row: str, name: str) -> float:
        """The mean over the seeds, for shares."""
        return float(np.mean([result.figures[name] for result in self.rows[row]]))

    def ratio(self, row: str, other: str, name: str) -> float:
        """A figure of one row over that of another."""
        return self.figure(row, name) / self.figure(other, name)


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of numbers above 0."""
    return float(np.exp(np.mean(np.log(np.array(list(values), dtype=np.float64)))))


def grouped(entries: Iterable[Entry], results: Mapping[str, Result]) -> list[Table]:
    """One table per case and fleet, in the order of the entries."""
    found: dict[tuple[str, str], dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        found[entry.case, entry.fleet][entry.job.row.name].append(results[entry.job.key()])
    return [Table(case, fleet, rows) for (case, fleet), rows in found.items()]
