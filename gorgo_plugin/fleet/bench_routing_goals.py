"""gorgo against the best other row, cell by cell, and what was asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gorgo_plugin.fleet.bench_routing_groups import FIGURES, Table, geometric_mean
from gorgo_plugin.fleet.bench_routing_plan import OURS
from gorgo_plugin.fleet.goals import Goal

P50, P95, P99, E2E_P95 = FIGURES
TRACE_CELLS, GENERATED_CELLS, ALL_CELLS, WORST_CELL = "trace cells", "generated cells", "all cells", "worst cell"


@dataclass(frozen=True, slots=True)
class Against:
    """One figure of gorgo over that of the best other row, and which row that is."""

    ratio: float
    row: str


@dataclass(frozen=True, slots=True)
class Cell:
    """gorgo in one cell: figure -> how it stands."""

    case: str
    fleet: str
    against: dict[str, Against]


@dataclass(frozen=True, slots=True)
class Check:
    """One figure over several cells, or the figure of a sweep, with its goal and its verdict."""

    what: str
    figure: str
    value: float
    goal: Goal

    @property
    def verdict(self) -> str:
        """`goal`, `floor` or `missed`."""
        return self.goal.verdict(self.value)


def _at_most(goal: float, floor: float) -> Goal:
    return Goal(goal, floor, at_most=True)


_GOALS = {
    (TRACE_CELLS, P95): _at_most(0.72, 0.82),
    (TRACE_CELLS, P50): _at_most(1.00, 1.08),
    (TRACE_CELLS, P99): _at_most(0.72, 0.85),
    (GENERATED_CELLS, P95): _at_most(0.80, 0.92),
    (GENERATED_CELLS, P50): _at_most(0.65, 0.80),
    (GENERATED_CELLS, P99): _at_most(0.85, 0.98),
    (ALL_CELLS, E2E_P95): _at_most(0.92, 0.98),
    (WORST_CELL, P95): _at_most(0.95, 1.00),
    (WORST_CELL, P50): _at_most(1.02, 1.12),
    (WORST_CELL, E2E_P95): _at_most(1.02, 1.08),
}
# On the papers' fleet: their claims of a median 2.5 times lower and a p95 15.5% lower, and a median below the others'.
_SWEEP_GOALS = (
    (P50, ("prefix-similarity", "session-affinity"), _at_most(1 / 2.5, 1 / 2.5)),
    (P50, ("nearest", "least-request"), _at_most(1.0, 1.0)),
    (P95, ("session-affinity", "prefix-cache"), _at_most(1 - 0.155, 1 - 0.155)),
)


def cells(tables: Sequence[Table]) -> list[Cell]:
    """How gorgo stands in every cell of the grid."""
    return [
        Cell(table.case, table.fleet, {figure: _against(table, figure) for figure in FIGURES})
        for table in tables
        if OURS in table.rows
    ]


def _against(table: Table, figure: str) -> Against:
    others = [
        row for row in table.rows if row not in (OURS, f"{OURS}-online", f"{OURS}-frozen")
    ]  # tuned it is gorgo too
    best = min(others, key=lambda row: table.figure(row, figure))
    return Against(table.ratio(OURS, best, figure), best)


def checks(found: Sequence[Cell]) -> list[Check]:
    """The geometric means over the cells, and the worst cell, that something is asked of."""
    groups = {
        TRACE_CELLS: [cell for cell in found if cell.case.startswith("trace")],
        GENERATED_CELLS: [cell for cell in found if not cell.case.startswith("trace")],
        ALL_CELLS: found,
        WORST_CELL: found,
    }
    made = []
    for (group, figure), goal in _GOALS.items():
        ratios = [cell.against[figure].ratio for cell in groups[group]]
        if ratios:
            value = max(ratios) if group == WORST_CELL else geometric_mean(ratios)
            made.append(Check(group, figure, value, goal))
    return made


def sweep_checks(tables: Sequence[Table]) -> list[Check]:
    """What is asked at every load."""
    return [
        Check(f"{table.case}, against {other}", figure, table.ratio(OURS, other, figure), goal)
        for table in tables
        for figure, others, goal in _SWEEP_GOALS
        for other in others
    ]
