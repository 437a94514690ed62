"""How long a row takes to be itself again after a fleet changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.fleet.bench_routing_jobs import Result

WINDOW_S = 30.0  # over which p95 is taken: with five seeds some 1,200 requests, of which it is known to 5%
STEP_S = 5.0
BEST_WINDOW_S = 120.0  # the new best is taken over longer ones, so that luck makes none
SETTLED = 1.1  # times the new best


@dataclass(frozen=True, slots=True)
class Recovery:
    """How one row went through an event; p95 TTFT in milliseconds.

    Attributes:
        before_ms: from the first users on until the event.
        worst_ms: of the worst window since then.
        best_ms: the new best.
        settled_s: from the event until p95, once it was worst, is within a tenth of the new best in two windows that
            follow each other; 0 where it never was further off, None where it stayed so to the end.
    """

    before_ms: float
    worst_ms: float
    best_ms: float
    settled_s: float | None


def recovery(results: Sequence[Result], event_s: float, best_from_s: float) -> Recovery:
    """Of the runs of one row, whose requests are taken together: all seeds have the event at the same time.

    Args:
        results: with the time of each request.
        event_s: when the fleet changed.
        best_from_s: from when on the new best may be: the event, or the return of what it took.
    """
    at_s = np.concatenate([np.array(result.at_s) for result in results])
    ttft_ms = np.concatenate([np.array(result.ttft_ms) for result in results])
    end_s = float(at_s.max())
    after = list(_windows(at_s, ttft_ms, event_s, end_s, WINDOW_S))
    best_ms = min(p95_ms for _, p95_ms in _windows(at_s, ttft_ms, best_from_s, end_s, BEST_WINDOW_S))
    return Recovery(
        before_ms=_p95_ms(at_s, ttft_ms, event_s / 4, event_s),
        worst_ms=max(p95_ms for _, p95_ms in after),
        best_ms=best_ms,
        settled_s=_settled_s(after, SETTLED * best_ms, event_s),
    )


def _settled_s(windows: Sequence[tuple[float, float]], limit_ms: float, event_s: float) -> float | None:
    """When, from the worst window on, p95 is first at the limit in two windows that follow each other."""
    worst = int(np.argmax([p95_ms for _, p95_ms in windows]))
    if windows[worst][1] <= limit_ms:
        return 0.0
    apart = round(WINDOW_S / STEP_S)
    for (start_s, p95_ms), (_, next_ms) in zip(windows[worst:], windows[worst + apart :], strict=False):
        if max(p95_ms, next_ms) <= limit_ms:
            return start_s - event_s
    return None


def _windows(
    at_s: NDArray[np.float64], ttft_ms: NDArray[np.float64], from_s: float, to_s: float, length_s: float
) -> Iterator[tuple[float, float]]:
    """(start, p95) of the windows of this length that lie between two times."""
    for start_s in np.arange(from_s, to_s - length_s, STEP_S).tolist():
        yield start_s, _p95_ms(at_s, ttft_ms, start_s, start_s + length_s)


def _p95_ms(at_s: NDArray[np.float64], ttft_ms: NDArray[np.float64], from_s: float, to_s: float) -> float:
    return float(np.percentile(ttft_ms[(at_s >= from_s) & (at_s < to_s)], 95))
