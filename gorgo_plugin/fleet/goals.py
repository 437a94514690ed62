"""What a figure should be, and what it must be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Goal:
    """What a ratio should be and what it must be: at least, or at most.

    With `p99` the 99th percentile is held to it too.
    """

    goal: float
    floor: float
    at_most: bool = False
    p99: bool = False

    def verdict(self, *values: float) -> str:
        """`goal`, `floor` or `missed`: what the worst of the values meets."""
        worst = max(values) if self.at_most else min(values)
        for name, limit in (("goal", self.goal), ("floor", self.floor)):
            if worst <= limit if self.at_most else worst >= limit:
                return name
        return "missed"
