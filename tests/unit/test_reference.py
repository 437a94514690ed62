"""The generated pages of docs/."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gorgo_plugin.cli import COMMANDS
from gorgo_plugin.fleet.engine import EngineProfile
from gorgo_plugin.fleet.topology import Fleet
from gorgo_plugin.reference import pages
from gorgo_plugin.runtime.metrics import DERIVED, EVENTS
from gorgo_plugin.settings import ProbeSettings, Settings

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def fresh() -> dict[str, str]:
    return pages()


@pytest.mark.parametrize("name", ["settings.md", "cli.md", "metrics.md", "fleets.md"])
def test_a_page_that_is_stale_is_found_out(fresh: dict[str, str], name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == fresh[name], "run `make docs`"


def test_every_setting_stands_on_the_page_with_its_meaning(fresh: dict[str, str]) -> None:
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in fresh["settings.md"].splitlines()}
    for name, field in ProbeSettings.model_fields.items():
        assert (field.description or "?") in rows[f"`probe.{name}`"]
    assert {f"`{name}`" for name in Settings.model_fields} <= rows.keys()
    assert all(line.count(" | ") == 3 and not line.endswith("|  |") for name, line in rows.items() if name[:1] == "`")


def test_types_and_bounds_are_put_in_words(fresh: dict[str, str]) -> None:
    page = fresh["settings.md"]
    assert "| `mode` | `on` or `shadow` or `off` | `on` |" in page
    assert "| `probe.alpha` | number > 0 ≤ 1 | `0.3` |" in page
    assert "| `metrics.interval_s` | number > 0 or none | none |" in page
    assert "| `replicas[].name` | text | required |" in page


def test_every_command_and_every_metric_has_its_entry(fresh: dict[str, str]) -> None:
    assert all(f"## `gorgo {name}`" in fresh["cli.md"] for name in COMMANDS)
    assert all(f"| `{family.name}` |" in fresh["metrics.md"] for family in (*EVENTS, *DERIVED))


def test_every_field_of_a_fleet_file_has_its_meaning(fresh: dict[str, str]) -> None:
    rows = [line for line in fresh["fleets.md"].splitlines() if line.startswith("| `")]
    assert {f"`{name}`" for name in Fleet.model_fields} <= {row.split(" | ")[0].removeprefix("| ") for row in rows}
    assert not [row for row in rows if row.endswith("|  |")]
    assert "## `events[]` of kind `slow`" in fresh["fleets.md"]
    assert all(f"| `{field.name}` |" in fresh["fleets.md"] for field in dataclasses.fields(EngineProfile))
