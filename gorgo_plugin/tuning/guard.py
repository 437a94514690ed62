"""The guard: what candidates may cost end to end.

Weights can win TTFT by herding everything to the nearest replica, and take E2E p95 to three times what it was (the
second paper's own warning). So what accepted steps cost in E2E p95 is added up, and the sum may not exceed the margin;
otherwise each of many steps could spend it anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gorgo_plugin.tuning.objectives import Comparison

CLEARLY = 2.0  # standard errors from which a breach is believed before the trial is over


@dataclass(frozen=True, slots=True)
class Guard:
    """What may still be spent.

    Attributes:
        margin: share by which E2E p95 may rise over the best the search has had.
        spent: what accepted steps have cost already, ln(now / best); never below 0.
    """

    margin: float
    spent: float = 0.0

    def allows(self, e2e: Comparison) -> bool:
        """Whether the candidate stays within the margin."""
        return self.spent + e2e.log_ratio <= math.log1p(self.margin)

    def is_breached(self, e2e: Comparison) -> bool:
        """Whether it clearly does not."""
        return not self.allows(e2e) and e2e.z >= CLEARLY

    def after(self, e2e: Comparison) -> Guard:
        """The guard once the candidate was accepted."""
        return Guard(self.margin, max(self.spent + e2e.log_ratio, 0.0))
