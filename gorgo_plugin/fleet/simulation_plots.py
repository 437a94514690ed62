"""Plots of simulated runs: TTFT, who served when, what was learned, predicted against actual."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.fleet.simulator import Learned, Outcome

WINDOWS = 60  # of a run, in which shares are counted
_PANEL = (5.0, 3.2)  # inches
_RATES = ("ms_per_token",)
_COLOURS, _STYLES = 10, ("-", "--", ":")  # of lines: matplotlib's colours repeat after ten


def write_plots(folder: Path, outcomes: Sequence[Outcome]) -> list[Path]:
    """Write four pictures of one run per row into `folder`, which must exist; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = {
        "ttft.png": _distributions(pyplot, outcomes),
        "regions.png": _regions(pyplot, outcomes),
        "learned.png": _learned(pyplot, outcomes),
        "predicted.png": _predicted(pyplot, outcomes),
    }
    paths = []
    for name, figure in figures.items():
        figure.tight_layout()
        figure.savefig(folder / name, dpi=120)
        pyplot.close(figure)
        paths.append(folder / name)
    return paths


def _distributions(pyplot: Any, outcomes: Sequence[Outcome]) -> Any:
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, outcome in enumerate(outcomes):
        times = np.sort(outcome.ttft_ms)
        heights = np.arange(1, len(times) + 1) / len(times)
        style = _STYLES[number // _COLOURS % len(_STYLES)]
        width = 2.5 if number == 0 else 1.3
        axes.step(times, heights, where="post", label=outcome.row, linewidth=width, linestyle=style)
    axes.set(xscale="log", xlabel="time to first token (ms)", ylabel="share of requests", ylim=(0, 1))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    return figure


def _panels(pyplot: Any, count: int, **options: Any) -> tuple[Any, list[Any]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    size = (_PANEL[0] * columns, _PANEL[1] * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, **options)
    panels = list(axes.flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def window_shares(outcome: Outcome) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """(middles of the windows in seconds, region -> its share of the requests sent in each window, NaN in empty ones).

    All arrays have shape (windows,).
    """
    edges = np.linspace(0.0, max(float(outcome.at_s.max()), 1e-9), WINDOWS + 1)
    names = np.array(outcome.regions)[outcome.replica]
    total = np.histogram(outcome.at_s, edges)[0].astype(np.float64)
    total[total == 0] = np.nan
    regions = dict.fromkeys(outcome.regions)
    shares = {region: np.histogram(outcome.at_s[names == region], edges)[0] / total for region in regions}
    return (edges[1:] + edges[:-1]) / 2, shares


def _regions(pyplot: Any, outcomes: Sequence[Outcome]) -> Any:
    figure, panels = _panels(pyplot, len(outcomes), sharey=True)
    for outcome, axes in zip(outcomes, panels, strict=True):
        at_s, shares = window_shares(outcome)
        for region, share in shares.items():
            axes.plot(at_s, share, label=region)
        axes.set(title=outcome.row, xlabel="s", ylim=(0, 1))
    panels[0].set_ylabel("share of requests")
    panels[0].legend(fontsize="small")
    return figure


def _learned(pyplot: Any, outcomes: Sequence[Outcome]) -> Any:
    """The two weights, and each row's rates; of several gateways the first one's."""
    figure, panels = _panels(pyplot, 2 + len(outcomes))
    for axes, number, name in ((panels[0], 0, "W_rtt"), (panels[1], 1, "W_queue")):
        for outcome in outcomes:
            axes.plot(outcome.learned[0].at_s, outcome.learned[0].weights[:, number], label=outcome.row)
        axes.set(title=name, xlabel="s")
    panels[0].legend(fontsize="x-small")
    for axes, outcome in zip(panels[2:], outcomes, strict=True):
        _rates(axes, outcome.learned[0], outcome.row)
    return figure


def _rates(axes: Any, learned: Learned, row: str) -> None:
    for replica, rates in learned.rates.items():
        for name in _RATES:
            if name in rates:
                axes.plot(learned.at_s, rates[name], label=replica)
    axes.set(title=f"{row}: ms per uncached token", xlabel="s")
    axes.legend(fontsize="x-small")


def _predicted(pyplot: Any, outcomes: Sequence[Outcome]) -> Any:
    figure, panels = _panels(pyplot, len(outcomes), sharex=True, sharey=True)
    for outcome, axes in zip(outcomes, panels, strict=True):
        actual, predicted = outcome.gateway_ttft_ms, np.maximum(outcome.predicted_ms, 1.0)
        ends = [float(actual.min()), float(actual.max())]
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.scatter(actual, predicted, s=2, alpha=0.25, linewidths=0)
        axes.set(title=outcome.row, xscale="log", yscale="log", xlabel="actual TTFT (ms)")
    panels[0].set_ylabel("predicted TTFT (ms)")
    return figure
