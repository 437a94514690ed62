"""The generated pages of docs/."""

from __future__ import annotations

from pathlib import Path

import pytest

from gorgo_plugin.cli import COMMANDS
from gorgo_plugin.reference import pages
from gorgo_plugin.runtime.metrics import DERIVED, EVENTS
from gorgo_plugin.settings import ProbeSettings, Settings

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def fresh() -> dict[str, str]:
    return pages()


@pytest.mark.parametrize("name", ["settings.md", "cli.md", "metrics.md"])
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
