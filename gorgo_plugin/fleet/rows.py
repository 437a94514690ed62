"""The systems that are compared, by name: each a policy with its settings, and where its routers stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gorgo_plugin.errors import GorgoError
from gorgo_plugin.policies import POLICIES
from gorgo_plugin.settings import Settings, did_you_mean


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
    Row("gorgo-online", {"tuning": {"mode": "online"}}),
    Row("gorgo-paper:art-chat", {"policy": "gorgo-paper", "weights": "art-chat"}),
    Row("gorgo-paper:wildchat", {"policy": "gorgo-paper", "weights": "wildchat"}),
    # The paper's own start.
    Row(
        "gorgo-paper-online",
        {"policy": "gorgo-paper", "weights": {"rtt": 0.5, "queue": 0.1}, "tuning": {"mode": "online"}},
    ),
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


def row_of_file(path: Path) -> Row:
    """A router's settings in a YAML file as a row of that name; the replicas that it lists are left out.

    Raises:
        RowError: it cannot be read or holds no mapping.
        SettingsError: a setting is wrong.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RowError(f"policies: {path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise RowError(f"policies: {path}: expected a mapping of settings")
    settings.pop("replicas", None)
    Settings.model_validate(settings)
    return Row(path.stem, settings)


def rows_named(names: Sequence[str]) -> list[Row]:
    """The rows of these names, in their order; a name that ends in .yaml or .yml is a file of settings.

    Raises:
        RowError: there is none of that name, or one is named twice.
        SettingsError: a setting in a file is wrong.
    """
    rows = [row_of_file(Path(name)) if name.endswith((".yaml", ".yml")) else row_named(name) for name in names]
    if len({row.name for row in rows}) < len(rows):
        raise RowError(f"policies: a row is named twice in {', '.join(names)}")
    return rows
