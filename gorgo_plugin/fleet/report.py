"""What a demo found: one table, one honest paragraph, a plot and a JSON file with every figure behind them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from gorgo_plugin.fleet.demo import DemoSettings, RowResult, Workload
from gorgo_plugin.fleet.machine import machine
from gorgo_plugin.fleet.statistics import Ratio, RunSummary, summarise_run, ttft_ratio
from gorgo_plugin.fleet.topology import REGIONS
from gorgo_plugin.fleet.workload import summarise

REFERENCE = "gorgo"  # the row the others are compared with
RATIO_PERCENTILES = (50, 95)
LATE_MS = 50.0  # a load generator later than this shares the blame for what it measures
_OWN_MARK = "*"


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table: its figures, and gorgo's TTFT over its own per percentile (None for gorgo itself).

    `gateways_own` says that the strategy is the gateway's and not a policy of this plugin.
    """

    name: str
    gateways_own: bool
    summary: RunSummary
    ratios: dict[int, Ratio | None]


def lines(results: Sequence[RowResult]) -> list[Line]:
    """The figures of all rows; ratios only when gorgo ran."""
    reference = next((result for result in results if result.row.name == REFERENCE), None)
    return [
        Line(
            result.row.name,
            result.row.policy is None,
            summarise_run(result.outcomes),
            {
                percentile: ttft_ratio(reference.outcomes, result.outcomes, percentile)
                for percentile in RATIO_PERCENTILES
                if reference is not None and result is not reference
            },
        )
        for result in results
    ]


def table(rows: Sequence[Line], gateway: str) -> Table:
    """The figures as a table for the terminal; `gateway` as people write it."""
    shown = Table(
        title="Time to first token (TTFT) and end to end (E2E) as a client sees them, in ms",
        caption=f"{_OWN_MARK} {gateway}'s own strategy; the others are this plugin's policies. "
        "Ratios: gorgo's TTFT over the row's, with the 95% interval.",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    shown.add_column("strategy", no_wrap=True)
    regions = "/".join(_short(region.name) for region in REGIONS)
    for heading in ("TTFT p50", "p95", "p99", "E2E p95", "cached", regions, "failed"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for percentile in RATIO_PERCENTILES:
        shown.add_column(f"ratio p{percentile}", justify="right", no_wrap=True)
    for row in rows:
        summary = row.summary
        shown.add_row(
            row.name + (_OWN_MARK if row.gateways_own else ""),
            *(f"{value:,.0f}" for value in _times(summary)),
            f"{summary.cached_share:.0%}",
            "/".join(str(summary.by_replica.get(region.name, 0)) for region in REGIONS),
            str(summary.errors),
            *(_shown_ratio(row.ratios.get(percentile)) for percentile in RATIO_PERCENTILES),
        )
    return shown


def _times(summary: RunSummary) -> tuple[float, ...]:
    return summary.ttft_p50_ms, summary.ttft_p95_ms, summary.ttft_p99_ms, summary.e2e_p95_ms


def _short(region: str) -> str:
    return region.split("-")[0]


def _shown_ratio(ratio: Ratio | None) -> str:
    return "-" if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def conclusion(rows: Sequence[Line]) -> str:
    """Which rows gorgo beats and which it does not, in sentences."""
    compared = [(row, percentile, ratio) for row in rows for percentile, ratio in row.ratios.items()]
    if not compared:
        return "gorgo did not run beside another row, so nothing is compared."
    groups: dict[str, list[str]] = {"below": [], "open": [], "above": [], "none": []}
    for row, percentile, ratio in compared:
        place = f"{row.name} p{percentile}"
        groups["none" if ratio is None else ratio.verdict].append(place)
    sentences = []
    if groups["below"]:
        sentences.append(f"gorgo's TTFT is lower, with the whole interval below 1, than: {_listed(groups['below'])}.")
    if groups["open"]:
        sentences.append(f"The interval crosses 1, so this run does not decide: {_listed(groups['open'])}.")
    if groups["above"]:
        sentences.append(f"gorgo does not beat: {_listed(groups['above'])}.")
    if groups["none"]:
        sentences.append(f"No request succeeded in both: {_listed(groups['none'])}.")
    failed = [f"{row.name} ({row.summary.errors})" for row in rows if row.summary.errors]
    if failed:
        sentences.append(f"Requests that failed are left out of the times: {_listed(failed)}.")
    late = [row.name for row in rows if row.summary.late_p99_ms > LATE_MS]
    if late:
        sentences.append(
            f"The load generator itself sent late (p99 over {LATE_MS:.0f} ms) in: {_listed(late)}; "
            "this machine is too busy for the figures to be trusted."
        )
    return " ".join(sentences)


def _listed(places: Sequence[str]) -> str:
    return ", ".join(places)


def describe_workload(workload: Workload) -> dict[str, Any]:
    """The workload's figures, with what part of a trace it is."""
    described: dict[str, Any] = asdict(summarise(workload.requests))
    window = workload.window
    if window is not None:
        described["trace_window"] = {
            "block_reuse": window.reuse,
            "first_request": window.first,
            "span_ms": window.span_ms,
            "kept_share_of_requests": window.kept,
        }
    return described


def write_json(
    path: Path, settings: DemoSettings, workload: Workload, results: Sequence[RowResult], rows: Sequence[Line]
) -> None:
    """Everything, down to each request, so that other figures can be made from it."""
    content = {
        "command": " ".join(["gorgo", *sys.argv[1:]]),
        "settings": {**asdict(settings), "trace": settings.trace and str(settings.trace), "out": str(settings.out)},
        "machine": machine(),
        "workload": describe_workload(workload),
        "fleet": {"kv_tokens": workload.kv_tokens, "regions": [asdict(region) for region in REGIONS]},
        "conclusion": conclusion(rows),
        "rows": [
            {
                "name": line.name,
                "gateways_own": line.gateways_own,
                "summary": asdict(line.summary),
                "ratios": {f"p{percentile}": ratio and asdict(ratio) for percentile, ratio in line.ratios.items()},
                "took_s": result.took_s,
                "outcomes": [asdict(outcome) for outcome in result.outcomes],
            }
            for line, result in zip(rows, results, strict=True)
        ],
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))


def write_plot(path: Path, results: Sequence[RowResult], rows: Sequence[Line]) -> None:
    """TTFT's cumulative distribution per row, and where each row sent its requests."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (distribution, share) = pyplot.subplots(1, 2, figsize=(13, 5), width_ratios=(3, 2))
    for result in results:
        times = np.sort([outcome.ttft_ms for outcome in result.outcomes if outcome.ttft_ms is not None])
        if len(times):
            ours = result.row.name == REFERENCE
            heights = np.arange(1, len(times) + 1) / len(times)
            distribution.step(times, heights, where="post", label=result.row.name, linewidth=2.5 if ours else 1.3)
    distribution.set(xscale="log", xlabel="time to first token (ms)", ylabel="share of requests", ylim=(0, 1))
    distribution.grid(alpha=0.3, which="both")
    distribution.legend()
    left = np.zeros(len(rows))
    for region in REGIONS:
        shares = np.array(
            [line.summary.by_replica.get(region.name, 0) / max(1, line.summary.requests) for line in rows]
        )
        share.barh([line.name for line in rows], shares, left=left, label=f"{region.name} ({region.rtt_ms:.0f} ms)")
        left += shares
    share.invert_yaxis()
    share.set(xlabel="share of requests per region", xlim=(0, 1))
    share.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(REGIONS), fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
