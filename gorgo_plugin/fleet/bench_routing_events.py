"""How long a row takes to be itself again after a fleet changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.fleet.bench_routing_jobs import Result

WINDOW_S = 60.0  # over which p95 is taken: with five seeds some 1,700 requests
STEP_S = 5.0
BEST_WINDOW_S = 120.0  # the new best is taken over longer ones
BEST_PERCENTILE = 25  # of these windows: the very lowest is luck
SETTLED = 1.1  # times the new best
_FIRST_USERS_S = 100.0  # whose prompts are all cold


@dataclass(frozen=True, slots=True)
class Recovery:
    """How one row went through an event.

    What a p95 is after it depends on the requests of the moment, too. So it is compared with that of the very same
    requests in runs without the event: the figures are one over the other.

    Attributes:
        before_ms: p95 TTFT from the first users on until the event.
        worst: of all windows since then.
        best: the new best, which a quarter of the windows reaches.
        settled_s: from the event to the first window, from the worst one on, whose p95 is within a tenth of the new
            best; 0 where it never was further off, None where it stayed so to the end.
    """

    before_ms: float
    worst: float
    best: float
    settled_s: float | None


def recovery(results: Sequence[Result], calm: Sequence[Result], event_s: float, best_from_s: float) -> Recovery:
    """Of the runs of one row, whose requests are taken together: all seeds have the event at the same time.

    Args:
        results: with the time of each request.
        calm: of the same requests on the same fleet without the event.
        event_s: when the fleet changed.
        best_from_s: from when on the new best may be: the event, or the return of what it took.
    """
    at_s = np.concatenate([np.array(result.at_s) for result in results])
    disturbed_ms, calm_ms = (np.concatenate([np.array(result.ttft_ms) for result in runs]) for runs in (results, calm))
    end_s = float(at_s.max())
    after = list(_windows(at_s, disturbed_ms, calm_ms, event_s, end_s, WINDOW_S))
    later = [ratio for _, ratio in _windows(at_s, disturbed_ms, calm_ms, best_from_s, end_s, BEST_WINDOW_S)]
    best = float(np.percentile(later, BEST_PERCENTILE))
    return Recovery(
        before_ms=float(np.percentile(disturbed_ms[(at_s >= _FIRST_USERS_S) & (at_s < event_s)], 95)),
        worst=max(ratio for _, ratio in after),
        best=best,
        settled_s=_settled_s(after, SETTLED * best, event_s),
    )


def _settled_s(windows: Sequence[tuple[float, float]], limit: float, event_s: float) -> float | None:
    """When, from the worst window on, p95 is at the limit."""
    worst = int(np.argmax([ratio for _, ratio in windows]))
    if windows[worst][1] <= limit:
        return 0.0
    return next((start_s - event_s for start_s, ratio in windows[worst:] if ratio <= limit), None)


def _windows(
    at_s: NDArray[np.float64],
    disturbed_ms: NDArray[np.float64],
    calm_ms: NDArray[np.float64],
    from_s: float,
    to_s: float,
    length_s: float,
) -> Iterator[tuple[float, float]]:
    """(start, p95 over the p95 without the event) of the windows of this length that lie between two times."""
    for start_s in np.arange(from_s, to_s - length_s, STEP_S).tolist():
        inside = (at_s >= start_s) & (at_s < start_s + length_s)
        disturbed, calm = (float(np.percentile(times_ms[inside], 95)) for times_ms in (disturbed_ms, calm_ms))
        yield start_s, disturbed / calm
