"""What simulated runs found: figures, ratios to the first row, a table and plain data for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from gorgo_plugin.fleet.rows import Row
from gorgo_plugin.fleet.simulation_runs import Source
from gorgo_plugin.fleet.simulator import Outcome
from gorgo_plugin.fleet.statistics import Ratio, ratio_over_seeds
from gorgo_plugin.fleet.topology import Fleet

LEARNING_REQUESTS = 500  # before predictions are judged; of short runs the first half
COMPARED = ("ttft_p50_ms", "ttft_p95_ms", "ttft_p99_ms", "e2e_p50_ms", "e2e_p95_ms")
COMPONENTS = ("network", "queue", "prefill")
_GAUGES_MARK = "°"


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted against actual TTFT, seen at the gateway, once something was learned.

    Attributes:
        median_error: median of |predicted - actual| / actual.
        rank_correlation: Spearman's.
        components: network, queue and prefill -> median predicted and median measured milliseconds. Of the measured
            ones the queue ends, and the prefill begins, with the step that the request's first tokens are in.
    """

    median_error: float
    rank_correlation: float
    components: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Figures:
    """One run's figures; times in milliseconds, seen by the clients.

    Attributes:
        hit_rate: cached share of all prompt tokens.
        region_shares: region -> share of the requests that it served.
        prefill_shares, busy_shares: replica -> share of the run that it spent on prefill, and in steps of any kind.
        tried_again: requests that took more than one attempt.
        by_client: client region -> TTFT p50 and p95.
    """

    seed: int
    requests: int
    ttft_mean_ms: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    ttft_p99_ms: float
    e2e_p50_ms: float
    e2e_p95_ms: float
    e2e_p99_ms: float
    hit_rate: float
    region_shares: dict[str, float]
    prefill_shares: dict[str, float]
    busy_shares: dict[str, float]
    tried_again: int
    by_client: dict[str, tuple[float, float]]
    prediction: Prediction


def figures(outcome: Outcome) -> Figures:
    """The figures of one run."""
    p50, p95, p99 = outcome.percentiles_ms("ttft_ms", (50, 95, 99))
    e50, e95, e99 = outcome.percentiles_ms("e2e_ms", (50, 95, 99))
    return Figures(
        seed=outcome.seed,
        requests=len(outcome.at_s),
        ttft_mean_ms=float(outcome.ttft_ms.mean()),
        ttft_p50_ms=p50,
        ttft_p95_ms=p95,
        ttft_p99_ms=p99,
        e2e_p50_ms=e50,
        e2e_p95_ms=e95,
        e2e_p99_ms=e99,
        hit_rate=outcome.hit_rate,
        region_shares=outcome.region_shares(),
        prefill_shares=dict(zip(outcome.replicas, outcome.prefill_share.tolist(), strict=True)),
        busy_shares=dict(zip(outcome.replicas, outcome.busy_share.tolist(), strict=True)),
        tried_again=int((outcome.numbers["attempts"] > 1).sum()),
        by_client=_by_client(outcome),
        prediction=prediction(outcome),
    )


def _by_client(outcome: Outcome) -> dict[str, tuple[float, float]]:
    clients = np.array(outcome.clients)
    found = {}
    for client in sorted(set(outcome.clients)):
        p50, p95 = np.percentile(outcome.ttft_ms[clients == client], (50, 95))
        found[client] = (float(p50), float(p95))
    return found


def prediction(outcome: Outcome, learning: int = LEARNING_REQUESTS) -> Prediction:
    """How true the predictions were, without the first `learning` requests and without those tried again."""
    judged = outcome.numbers["attempts"] == 1
    judged[: min(learning, len(judged) // 2)] = False
    predicted, actual = outcome.predicted_ms[judged], outcome.gateway_ttft_ms[judged]
    if not len(actual):
        return Prediction(float("nan"), float("nan"), {})
    measured = {"network": outcome.network_ms, "queue": outcome.numbers["queue_ms"]}
    measured["prefill"] = outcome.numbers["prefill_ms"]
    return Prediction(
        median_error=float(np.median(np.abs(predicted - actual) / actual)),
        rank_correlation=_rank_correlation(predicted, actual),
        components={
            name: (
                float(np.median(outcome.numbers[f"predicted_{name}_ms"][judged])),
                float(np.median(measured[name][judged])),
            )
            for name in COMPONENTS
        },
    )


def _rank_correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    if len(one) < 2:
        return float("nan")
    first, second = (np.argsort(np.argsort(values, kind="stable")) for values in (one, other))
    return float(np.corrcoef(first, second)[0, 1])


@dataclass(frozen=True, slots=True)
class Line:
    """One row: its figures per seed, and of each compared figure the ratio to the first row (none for that one)."""

    row: Row
    runs: tuple[Figures, ...]
    ratios: dict[str, Ratio]

    def mean(self, name: str) -> float:
        """The mean of a figure over the seeds."""
        return float(np.mean([getattr(run, name) for run in self.runs]))

    def region_shares(self) -> dict[str, float]:
        """Mean share of the requests that each region served."""
        return {
            name: float(np.mean([run.region_shares[name] for run in self.runs])) for name in self.runs[0].region_shares
        }


def lines(rows: Sequence[Row], outcomes: Sequence[Sequence[Outcome]]) -> list[Line]:
    """The figures of all rows; outcomes[row][seed]."""
    runs = [tuple(figures(outcome) for outcome in of_row) for of_row in outcomes]
    return [
        Line(row, own, {} if own is runs[0] else {name: _ratio(own, runs[0], name) for name in COMPARED})
        for row, own in zip(rows, runs, strict=True)
    ]


def _ratio(own: Sequence[Figures], first: Sequence[Figures], name: str) -> Ratio:
    return ratio_over_seeds([getattr(run, name) for run in own], [getattr(run, name) for run in first])


def table(shown: Sequence[Line]) -> Table:
    """The figures for the terminal: means over the seeds, and ratios to the first row with their intervals."""
    seeds, regions = len(shown[0].runs), list(shown[0].runs[0].region_shares)
    caption = f"Ratios: the row's TTFT over that of {shown[0].row.name}"
    caption += f", geometric mean of {seeds} seeds with the 95% bootstrap interval over them." if seeds > 1 else "."
    if any(line.row.reads_gauges for line in shown):
        caption += f" {_GAUGES_MARK} decides by engine gauges, which it gets once a second, so up to a second old."
    made = Table(
        title="Time to first token (TTFT) and end to end (E2E) as clients see them, in ms",
        caption=caption,
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    made.add_column("row", no_wrap=True)
    for heading in ("TTFT p50", "p95", "p99", "E2E p50", "p95", "cached", "/ ".join(regions), "ratio p50", "ratio p95"):
        made.add_column(heading, justify="right")
    for line in shown:
        made.add_row(
            line.row.name + (_GAUGES_MARK if line.row.reads_gauges else ""),
            *(f"{line.mean(name):,.0f}" for name in COMPARED),
            f"{line.mean('hit_rate'):.1%}",
            "/".join(f"{share:.0%}" for share in line.region_shares().values()),
            *(_shown(line.ratios.get(name)) for name in ("ttft_p50_ms", "ttft_p95_ms")),
        )
    return made


def _shown(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio.value:.2f}" if np.isnan(ratio.low) else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def content(source: Source, fleet: Fleet, shown: Sequence[Line]) -> dict[str, Any]:
    """Everything as plain data; the same runs give the same, wherever and however fast they ran."""
    return {
        "gorgo_plugin": version("gorgo-plugin"),
        "workload": {
            "name": source.name,
            "requests": shown[0].runs[0].requests,
            "time_scale": source.time_scale,
        },
        "fleet": _fleet(fleet),
        "rows": [
            {
                "name": line.row.name,
                "settings": dict(line.row.settings),
                "reads_gauges": line.row.reads_gauges,
                "means": {name: line.mean(name) for name in (*COMPARED, "hit_rate")},
                "ratios": {name: dataclasses.asdict(ratio) for name, ratio in line.ratios.items()},
                "runs": [dataclasses.asdict(run) for run in line.runs],
            }
            for line in shown
        ],
    }


def _fleet(fleet: Fleet) -> dict[str, Any]:
    described: dict[str, Any] = fleet.model_dump(mode="json")
    return described
