"""What `gorgo bench estimator` found: one table with the goals beside the figures, and the same as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from gorgo_plugin.fleet.bench_estimator import (
    ALL_SEEN,
    COLD,
    END,
    FROM_LIST,
    FROM_NUMPY,
    HASHED_LOOKUP,
    LOOKUP,
    NEW_TURN,
    Measured,
    Samples,
    sized_lookup,
)
from gorgo_plugin.fleet.bench_estimator_index import OURS, Memory
from gorgo_plugin.fleet.bench_estimator_sides import RIVAL
from gorgo_plugin.fleet.goals import Goal
from gorgo_plugin.fleet.machine import machine
from gorgo_plugin.fleet.statistics import Ratio, percentile_ratio

CASES = (LOOKUP, HASHED_LOOKUP, FROM_LIST, FROM_NUMPY, END, NEW_TURN, ALL_SEEN, COLD)
MICROSECONDS, BYTES = "us", "bytes per token"


GOALS = {
    LOOKUP: Goal(400, 200),
    FROM_LIST: Goal(15, 8),
    FROM_NUMPY: Goal(70, 40),
    NEW_TURN: Goal(75, 25),
    COLD: Goal(1, 1, p99=True),
}
MEMORY_GOAL = Goal(8, 6)
FLEET_GOAL = Goal(1.2, 1.2, at_most=True)
SIZE_GOAL = Goal(1.5, 1.5, at_most=True)


@dataclass(frozen=True, slots=True)
class Line:
    """One row.

    Attributes:
        label: what was measured.
        replicas: in the fleet.
        unit: of the four figures: `us` or `bytes per token`.
        ours, theirs: (p50, p99), the same figure twice for memory; None where it was not measured.
        ratio, ratio_p99: of the medians and of the 99th percentiles: theirs over ours; in a row whose goal is a most,
            ours over ours in the smaller fleet or index.
        goal: None where nothing is asked.
    """

    label: str
    replicas: int
    unit: str
    ours: tuple[float, float]
    theirs: tuple[float, float] | None
    ratio: Ratio | None
    ratio_p99: Ratio | None
    goal: Goal | None

    @property
    def verdict(self) -> str | None:
        """`goal`, `floor` or `missed`; None where nothing is asked."""
        if self.goal is None or self.ratio is None:
            return None
        held = [self.ratio, self.ratio_p99 if self.goal.p99 else None]
        return self.goal.verdict(*(ratio.value for ratio in held if ratio is not None))


def lines(measured: Measured) -> list[Line]:
    """All rows."""
    return [*_against_the_rival(measured), *_memory(measured.memory), *_growth(measured)]


def _against_the_rival(measured: Measured) -> Iterator[Line]:
    for case in (*CASES, *map(sized_lookup, measured.plan.sizes)):
        for replicas in measured.plan.fleets:
            one = measured.samples[case, replicas]
            theirs = _percentiles(one.theirs) if one.theirs else None
            p50, p99 = _ratios(one.theirs, one.ours) if one.theirs else (None, None)
            yield Line(case, replicas, MICROSECONDS, _percentiles(one.ours), theirs, p50, p99, GOALS.get(case))


def _memory(measured: Sequence[Memory]) -> Iterator[Line]:
    for ours in (memory for memory in measured if memory.side == OURS):
        theirs = next(memory for memory in measured if memory.side != OURS and memory.replicas == ours.replicas)
        own, other = ours.bytes_per_token, theirs.bytes_per_token
        ratio = Ratio(other / own, other / own, other / own)
        label = f"memory at {ours.cached_tokens / 1e6:.3g}M cached tokens"
        yield Line(label, ours.replicas, BYTES, (own, own), (other, other), ratio, None, MEMORY_GOAL)


def _growth(measured: Measured) -> Iterator[Line]:
    """What a larger fleet and a larger index cost us."""
    samples, (few, *more), sizes = measured.samples, measured.plan.fleets, measured.plan.sizes
    for case in (LOOKUP, FROM_NUMPY, NEW_TURN, *map(sized_lookup, sizes)):
        for many in more:
            label = f"{case}: {many} replicas over {few}"
            yield _ours_over_ours(label, many, samples[case, many], samples[case, few], FLEET_GOAL)
    small, *larger = sizes
    for replicas in measured.plan.fleets:
        for size in larger:
            large = samples[sized_lookup(size), replicas]
            label = f"lookup: {size / 1e6:g}M tokens over {small / 1e6:g}M"
            yield _ours_over_ours(label, replicas, large, samples[sized_lookup(small), replicas], SIZE_GOAL)


def _ours_over_ours(label: str, replicas: int, large: Samples, small: Samples, goal: Goal) -> Line:
    p50, p99 = _ratios(large.ours, small.ours)
    return Line(label, replicas, MICROSECONDS, _percentiles(large.ours), None, p50, p99, goal)


def _ratios(upper: Sequence[int], lower: Sequence[int]) -> tuple[Ratio, Ratio]:
    return percentile_ratio(upper, lower, 50), percentile_ratio(upper, lower, 99)


def _percentiles(nanoseconds: Sequence[int]) -> tuple[float, float]:
    p50, p99 = np.percentile(nanoseconds, (50, 99)) / 1e3
    return float(p50), float(p99)


def table(rows: Sequence[Line], measured: Measured) -> Table:
    """The rows for the terminal."""
    plan = measured.plan
    shown = Table(
        title=f"The estimator against {RIVAL}: {plan.rounds} rounds, prompts of about {plan.prompt_tokens:,} tokens",
        caption=f"Times in us, memory in bytes per cached token. Ratios: theirs over ours, in the last rows ours over "
        f"ours; with the 95% interval. Their raw JSON: json.loads, ChatML, {measured.encoder} of the whole prompt "
        f"({measured.chat_tokens[0]:,} to {measured.chat_tokens[1]:,} tokens), their trie.",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    headings = ("replicas", "ours p50", "p99", "theirs p50", "p99", "ratio p50", "p99", "goal", "floor", "met")
    shown.add_column("measured", no_wrap=True)
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        asked = row.goal
        sign = "<=" if asked is not None and asked.at_most else ""
        shown.add_row(
            row.label,
            str(row.replicas),
            *_shown_figures(row.ours, row.unit),
            *_shown_figures(row.theirs, row.unit),
            _shown_ratio(row.ratio),
            f"{row.ratio_p99.value:.3g}" if row.ratio_p99 else "",
            *((f"{sign}{asked.goal:g}", f"{sign}{asked.floor:g}") if asked else ("", "")),
            row.verdict or "",
        )
    return shown


def _shown_figures(figures: tuple[float, float] | None, unit: str) -> tuple[str, str]:
    if figures is None:
        return "", ""
    if unit == BYTES:
        return f"{figures[0]:.2f}", ""
    p50, p99 = (f"{figure:,.1f}" if figure < 1_000 else f"{figure:,.0f}" for figure in figures)
    return p50, p99


def _shown_ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    if ratio.low == ratio.high:
        return f"{ratio.value:.3g}"
    return f"{ratio.value:.3g} [{ratio.low:.3g}, {ratio.high:.3g}]"


def content(rows: Sequence[Line], measured: Measured) -> dict[str, Any]:
    """Everything as plain data."""
    return {
        "machine": machine(),
        "rival": RIVAL,
        "plan": asdict(measured.plan),
        "encoder": measured.encoder,
        "chat_tokens": measured.chat_tokens,
        "rows": [asdict(row) | {"verdict": row.verdict} for row in rows],
        "memory": list(map(asdict, measured.memory)),
    }
