"""The tables of the papers and what is asked of gorgo, from simulated runs: `gorgo bench routing`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gorgo_plugin.fleet.bench_routing_events import Recovery, recovery
from gorgo_plugin.fleet.bench_routing_goals import Cell, Check, cells, checks, sweep_checks
from gorgo_plugin.fleet.bench_routing_groups import Table, grouped
from gorgo_plugin.fleet.bench_routing_jobs import Result, run_jobs
from gorgo_plugin.fleet.bench_routing_plan import (
    EVENT_S,
    EVENTS,
    PARTS,
    UNDISTURBED,
    Entry,
    Plan,
    held_out_windows,
)

WITHOUT_TRACE = "Without --trace the cells of the trace are left out."


@dataclass(frozen=True, slots=True)
class Disturbed:
    """How every row went through one event: row -> what p95 did."""

    event: str
    rows: Mapping[str, Recovery]


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that was found.

    Attributes:
        tables: part -> its tables.
        cells: gorgo in every cell of the grid.
        checks: what is asked of it, over the cells and of the load sweep.
        disturbed: one per event.
        left_out: sentences on what did not run.
    """

    tables: Mapping[str, Sequence[Table]]
    cells: Sequence[Cell]
    checks: Sequence[Check]
    disturbed: Sequence[Disturbed]
    left_out: Sequence[str]


def measure(
    plan: Plan,
    parts: Sequence[str],
    store: Path,
    processes: int | None = None,
    say: Callable[[int, int], None] = lambda _done, _all: None,
) -> Measured:
    """Run what is not in `store` yet, and put everything together.

    Args:
        plan: how much is run.
        parts: names of `PARTS`.
        store: folder of results.
        processes: runs at a time; None: as many as there are processors.
        say: is told how many results are there, and how many there will be.

    Raises:
        GorgoError: the trace cannot be read, or does not fit the engines.
    """
    processes = processes or os.cpu_count() or 1
    entries = {part: PARTS[part](plan) for part in parts}
    results = run_jobs([entry.job for of_part in entries.values() for entry in of_part], store, processes, say)
    if "windows" in entries:
        later = list(held_out_windows(plan, _with_results(entries["windows"], results)))
        results |= run_jobs([entry.job for entry in later], store, processes, say)
        entries["windows"] += later
    tables = {part: grouped(of_part, results) for part, of_part in entries.items()}
    found = cells(tables.get("grid", []))
    return Measured(
        tables=tables,
        cells=found,
        checks=checks(found) + sweep_checks(tables.get("load", [])),
        disturbed=_disturbed(tables.get("disturbances", [])),
        left_out=_left_out(plan, parts),
    )


def _with_results(entries: Sequence[Entry], results: Mapping[str, Result]) -> list[tuple[Entry, Result]]:
    return [(entry, results[entry.job.key()]) for entry in entries]


def _disturbed(tables: Sequence[Table]) -> list[Disturbed]:
    by_case = {table.case: table for table in tables}
    calm = by_case.pop(UNDISTURBED, None)
    if calm is None:
        return []
    found = []
    for case, table in by_case.items():
        best_from_s = EVENT_S + float(EVENTS[case].get("for_s", 0.0))
        rows = {row: recovery(runs, calm.rows[row], EVENT_S, best_from_s) for row, runs in table.rows.items()}
        found.append(Disturbed(case, rows))
    return found


def _left_out(plan: Plan, parts: Sequence[str]) -> list[str]:
    sentences = []
    if plan.trace is None and "grid" in parts:
        sentences.append(WITHOUT_TRACE)
    return sentences
