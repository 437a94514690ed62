"""Simulated runs on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gorgo_plugin.fleet.rows import Row
from gorgo_plugin.fleet.simulation_runs import Source, run_all
from gorgo_plugin.fleet.simulator import Outcome
from gorgo_plugin.fleet.topology import Fleet


def run_with_bar(
    console: Console, rows: Sequence[Row], seeds: Sequence[int], fleet: Fleet, source: Source, jobs: int, requests: int
) -> list[list[Outcome]]:
    """As `run_all`, with a progress bar; `requests` are those of one run."""
    runs = len(rows) * len(seeds)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task(f"{source.name}: {runs} runs of {requests:,} requests", total=runs * requests)
        return run_all(rows, seeds, fleet, source, jobs, lambda served: progress.update(task, completed=served))
