"""What `gorgo bench routing` found: tables for the terminal, and everything as plain data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from gorgo_plugin.fleet.bench_routing import Disturbed, Measured
from gorgo_plugin.fleet.bench_routing_goals import Cell, Check
from gorgo_plugin.fleet.bench_routing_groups import FIGURES, Table
from gorgo_plugin.fleet.bench_routing_jobs import Result
from gorgo_plugin.fleet.bench_routing_plan import OURS, Plan
from gorgo_plugin.fleet.machine import machine
from gorgo_plugin.fleet.rows import ROWS
from gorgo_plugin.fleet.simulation_report import COMPONENTS

HEADINGS = dict(zip(FIGURES, ("TTFT p50", "p95", "p99", "E2E p95"), strict=True))
TITLES = {
    "grid": "every row",
    "load": "load sweep",
    "hacking": "W_queue near 0",
    "windows": "windows",
}
_GAUGES_MARK = "°"
_GAUGES_CAPTION = f" {_GAUGES_MARK} decides by engine gauges, which it gets once a second, so up to a second old."
_RATIOS = {"ratio p50": FIGURES[0], "p95": FIGURES[1], "E2E p95": FIGURES[3]}
_KEPT_FIGURES = (*FIGURES, "e2e_p50_ms", "hit_rate", "region_shares", "prefill_shares", "requests")


def tables(measured: Measured) -> Iterator[RichTable]:
    """Everything as tables, the verdicts last."""
    for part, title in TITLES.items():
        for table in measured.tables.get(part, []):
            yield _figures(f"{table.case} on {table.fleet} ms: {title}", table)
    if "components" in measured.tables:
        yield _predictions(measured.tables["components"])
    for disturbed in measured.disturbed:
        yield _recoveries(disturbed)
    if measured.cells:
        yield _cells(measured.cells)
    if measured.checks:
        yield _checks(measured.checks)


def _plain(title: str, headings: Sequence[str], caption: str | None = None) -> RichTable:
    made = RichTable(
        title=title, caption=caption, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    for heading in headings:
        made.add_column(heading, justify="left" if heading == headings[0] else "right", no_wrap=True)
    return made


def _figures(title: str, table: Table) -> RichTable:
    """One line per row, in ms; the last columns are gorgo's figures over the row's."""
    marked = [row for row in table.rows if row in ROWS and ROWS[row].reads_gauges]
    caption = f"Ratios: {OURS} over the row." + (_GAUGES_CAPTION if marked else "")
    compared = _RATIOS if OURS in table.rows else {}
    made = _plain(title, ("row", *HEADINGS.values(), "cached", *compared), caption)
    for row in table.rows:
        made.add_row(
            row + (_GAUGES_MARK if row in marked else ""),
            *(f"{table.figure(row, name):,.0f}" for name in FIGURES),
            f"{table.mean(row, 'hit_rate'):.1%}",
            *("-" if row == OURS else f"{table.ratio(OURS, row, name):.2f}" for name in compared.values()),
        )
    return made


def _predictions(of_profiles: Sequence[Table]) -> RichTable:
    headings = ("engines", "median error", "rank correlation", *(f"{name} ms" for name in (*COMPONENTS, "overhead")))
    made = _plain("Predicted against measured TTFT and its parts (medians, predicted / measured)", headings)
    for found in map(prediction, of_profiles):
        made.add_row(
            found["engines"],
            f"{found['median_error']:.1%}",
            f"{found['rank_correlation']:.3f}",
            *("{:,.1f} / {:,.1f}".format(*found["components"][name]) for name in (*COMPONENTS, "overhead")),
        )
    return made


def prediction(table: Table) -> dict[str, Any]:
    """How true predictions were on one kind of engine, means over the seeds."""
    runs: Sequence[Result] = table.rows[OURS]
    predictions = [run.figures["prediction"] for run in runs]
    parts = {name: _means([one["components"][name] for one in predictions]) for name in COMPONENTS}
    return {
        "engines": table.case,
        "median_error": float(np.mean([one["median_error"] for one in predictions])),
        "rank_correlation": float(np.mean([one["rank_correlation"] for one in predictions])),
        "components": {**parts, "overhead": _means([run.overhead_ms for run in runs])},
    }


def _means(pairs: Sequence[Sequence[float | None]]) -> list[float]:
    """Means of (predicted, measured) over the seeds, what is unknown left out; NaN where all is."""
    columns = [[value for value in column if value is not None] for column in zip(*pairs, strict=True)]
    return [float(np.mean(column)) if column else float("nan") for column in columns]


def _recoveries(disturbed: Disturbed) -> RichTable:
    made = _plain(
        disturbed.event,
        ("row", "p95 before", "worst", "new best", "within 10% of it after"),
        "TTFT p95 in ms; worst and new best as a multiple of that of the same requests without the event.",
    )
    for row, found in disturbed.rows.items():
        settled = "not before the end" if found.settled_s is None else f"{found.settled_s:.0f} s"
        made.add_row(row, f"{found.before_ms:,.0f}", f"{found.worst:,.2f}", f"{found.best:,.2f}", settled)
    return made


def _cells(cells: Sequence[Cell]) -> RichTable:
    made = _plain(f"{OURS} over the best other row", ("cell", *HEADINGS.values()))
    for cell in cells:
        made.add_row(
            f"{cell.case} on {cell.fleet}",
            *(f"{against.ratio:.2f}\n{against.row}" for against in cell.against.values()),
        )
    return made


def _checks(checks: Sequence[Check]) -> RichTable:
    made = _plain(f"What is asked of {OURS}", ("over", "figure", "ratio", "goal", "floor", "met"))
    for check in checks:
        made.add_row(
            check.what,
            HEADINGS[check.figure],
            f"{check.value:.3f}",
            f"{check.goal.goal:.3f}",
            f"{check.goal.floor:.3f}",
            check.verdict,
        )
    return made


def content(measured: Measured, plan: Plan) -> dict[str, Any]:
    """Everything as plain data, with the commit, the command and the machine."""
    return {
        "commit": _commit(),
        "command": " ".join(["gorgo", *(_shown_argument(argument) for argument in sys.argv[1:])]),
        "machine": machine(),
        "seeds": list(plan.seeds),
        "requests_at_most": plan.limit,
        "left_out": list(measured.left_out),
        "checks": [{**asdict(check), "verdict": check.verdict} for check in measured.checks],
        "cells": [asdict(cell) for cell in measured.cells],
        "disturbances": [asdict(one) for one in measured.disturbed],
        "predictions": [prediction(table) for table in measured.tables.get("components", [])],
        "tables": {part: [_described(table) for table in found] for part, found in measured.tables.items()},
    }


def _described(table: Table) -> dict[str, Any]:
    return {
        "case": table.case,
        "fleet": table.fleet,
        "rows": {row: [_kept(result.figures, result.weights) for result in runs] for row, runs in table.rows.items()},
    }


def _kept(figures: Mapping[str, Any], weights: tuple[float, float]) -> dict[str, Any]:
    return {"seed": figures["seed"], **{name: figures[name] for name in _KEPT_FIGURES}, "weights": weights}


def _shown_argument(argument: str) -> str:
    """An argument as it is worth keeping: a path by its last name."""
    return Path(argument).name if "/" in argument else argument


def _commit() -> str | None:
    """The commit of the code that ran, `-dirty` behind it where files differ; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
