from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from gorgo_plugin.cli import main
from gorgo_plugin.fleet import bench_tuning
from gorgo_plugin.fleet.bench_tuning import Outcome, mean_ratio, report, stationary


def test_a_run_that_tunes_nothing_new_is_the_run_without_tuning() -> None:
    outcome = stationary(0, requests=60)  # screened only: nothing was tried yet
    assert (outcome.ttft_p95, outcome.e2e_p95, outcome.untuned) == (1.0, 1.0, 1.0)
    assert outcome.weights == {"rtt": 1.0, "queue": 1.0}


def test_the_report_has_a_line_a_seed_and_the_means() -> None:
    outcomes = [
        Outcome(seed, ratio, 1.0, 2.0, 0.5, {"rtt": 1.0, "queue": 1.0}, {"accepted": 1, "same": 0})
        for seed, ratio in enumerate((0.9, 1.1))
    ]
    lines = report("recovery", outcomes)
    assert "seed  1: TTFT p95 1.100 (left alone 2.00)" in lines[2]
    assert "1 accepted" in lines[1]
    assert "same" not in lines[1]
    assert "TTFT p95: 0.995" in lines[3]
    mean = mean_ratio([0.5, 2.0])
    assert mean.value == pytest.approx(1.0)
    assert mean.low == pytest.approx(0.5)
    assert mean.high == pytest.approx(2.0)


def test_the_command_prints_the_report_and_keeps_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_tuning, "KINDS", {"short": partial(stationary, requests=20)})
    out = tmp_path / "deep" / "figures.json"
    done = CliRunner().invoke(main, ["bench", "tuning", "--kinds", "short", "--seeds", "2", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "TTFT p95: 1.000 [1.000, 1.000] over 2 seeds" in done.output
    figures = json.loads(out.read_text())
    assert [outcome["seed"] for outcome in figures["outcomes"]["short"]] == [0, 1]
    assert figures["means"]["short"]["E2E p95"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_an_unknown_kind_is_named() -> None:
    done = CliRunner().invoke(main, ["bench", "tuning", "--kinds", "recovery,stationery"])
    assert done.exit_code == 2
    assert "unknown kind 'stationery'; known: recovery, stationary" in done.output
