"""The systems that are compared, by name: each a policy with its settings, and where its routers stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gorgo_plugin.errors import GorgoError
from gorgo_plugin.policies import POLICIES
from gorgo_plugin.settings import did_you_mean


class RowError(GorgoError, ValueError):
    """No row has that name."""


@dataclass(frozen=True, slots=True)
class Row:
    """One system.

    Attributes:
        name: heading of its line.
        settings: what of the router's settings differs from the defaults.
        distributed: a balancer in each region that has replicas, instead of the fleet's gateways.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    distributed: bool = False

    @property
    def reads_gauges(self) -> bool:
        """Whether it decides by the engines' gauges, which it gets a second old."""
        return POLICIES[self.settings.get("policy", "gorgo")].reads_gauges


_ALL = (
    Row("gorgo"),
    Row("gorgo-paper:art-chat", {"policy": "gorgo-paper", "weights": "art-chat"}),
    Row("gorgo-paper:wildchat", {"policy": "gorgo-paper", "weights": "wildchat"}),
    Row("gorgo-v1-proxy", {"policy": "gorgo-v1-proxy"}),
    Row("gorgo-v1-distributed", {"policy": "gorgo-v1-distributed"}, distributed=True),
    Row("least-load", {"policy": "least-load"}),
    Row("least-request", {"policy": "least-request"}),
    Row("prefix-cache", {"policy": "prefix-cache"}),
    Row("prefix-similarity", {"policy": "prefix-similarity"}),
    Row("session-affinity", {"policy": "session-affinity"}),
    Row("nearest", {"policy": "nearest"}),
    Row("random", {"policy": "random"}),
)
ROWS: dict[str, Row] = {row.name: row for row in _ALL}


def row_named(name: str) -> Row:
    """The row of that name.

    Raises:
        RowError: there is none.
    """
    if name not in ROWS:
        raise RowError(f"policies: unknown row '{name}'{did_you_mean(name, ROWS)}")
    return ROWS[name]


def rows_named(names: Sequence[str]) -> list[Row]:
    """The rows of these names, in their order.

    Raises:
        RowError: there is none of that name, or one is named twice.
    """
    if len(set(names)) < len(names):
        raise RowError(f"policies: a row is named twice in {', '.join(names)}")
    return [row_named(name) for name in names]
