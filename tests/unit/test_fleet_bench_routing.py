from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gorgo_plugin.cli import main
from gorgo_plugin.fleet import bench_routing_plan
from gorgo_plugin.fleet.bench_routing_events import recovery
from gorgo_plugin.fleet.bench_routing_goals import P50, P95, cells, checks, sweep_checks
from gorgo_plugin.fleet.bench_routing_groups import FIGURES, Table
from gorgo_plugin.fleet.bench_routing_jobs import Job, Result, run_jobs
from gorgo_plugin.fleet.bench_routing_plan import (
    EVENTS,
    FLEETS,
    NEAR,
    PARTS,
    UNDISTURBED,
    UNEQUAL,
    WIDE,
    Entry,
    Plan,
    disturbances,
    held_out_windows,
    load_sweep,
    offered_load,
)
from gorgo_plugin.fleet.rows import ROWS, Row
from gorgo_plugin.fleet.simulation_runs import Source, load
from gorgo_plugin.fleet.topology import read_fleet

EXAMPLES = Path(__file__).parents[2] / "examples" / "fleets"
CHAT = Source(workload="art-chat", limit=60)
JOB = Job(ROWS["nearest"], FLEETS[WIDE], CHAT, 0)


@pytest.mark.parametrize(("name", "file"), [(WIDE, "wide"), (NEAR, "near"), (UNEQUAL, "unequal")])
def test_the_fleets_are_those_of_the_examples(name: str, file: str) -> None:
    assert FLEETS[name] == read_fleet(EXAMPLES / f"{file}.yaml")


def test_a_run_that_was_broken_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    jobs = [JOB, dataclasses.replace(JOB, seed=1), JOB]
    told: list[tuple[int, int]] = []
    first = run_jobs(jobs, tmp_path, 1, lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]
    (tmp_path / f"{jobs[1].key()}.json").unlink()
    kept = tmp_path / f"{JOB.key()}.json"
    untouched = kept.stat().st_mtime_ns
    told.clear()
    assert run_jobs(jobs, tmp_path, 1, lambda done, total: told.append((done, total))) == first
    assert told == [(1, 2), (2, 2)]
    assert kept.stat().st_mtime_ns == untouched


@pytest.mark.parametrize(
    "change",
    [
        {"row": Row("nearest", {"policy": "random"})},
        {"fleet": FLEETS[NEAR]},
        {"source": dataclasses.replace(CHAT, limit=61)},
        {"source": dataclasses.replace(CHAT, time_scale=2.0)},
        {"source": dataclasses.replace(CHAT, workload="agentic")},
        {"seed": 1},
        {"series": True},
    ],
)
def test_a_result_is_kept_under_all_that_it_depends_on(change: Mapping[str, object]) -> None:
    assert dataclasses.replace(JOB, **change).key() != JOB.key()  # type: ignore[arg-type]
    assert dataclasses.replace(JOB).key() == JOB.key()


def test_a_trace_counts_by_what_it_holds(tmp_path: Path) -> None:
    keys = set()
    for name, content in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(content)
        keys.add(dataclasses.replace(JOB, source=Source(tmp_path / name)).key())
    assert len(keys) == 2


def result(*times_ms: float, weights: tuple[float, float] = (1.0, 1.0)) -> Result:
    return Result(dict(zip(FIGURES, times_ms, strict=True)), weights, (None, None))


def table(case: str, rows: Mapping[str, Result]) -> Table:
    return Table(case, WIDE, {name: [one, one] for name, one in rows.items()})


GRID = [
    table("trace x3", {"gorgo": result(90, 80, 70, 50), "a": result(100, 200, 70, 50), "b": result(300, 100, 90, 100)}),
    table(
        "art-chat",
        {"gorgo": result(50, 90, 90, 99), "a": result(100, 100, 100, 90), "gorgo-online": result(1, 1, 1, 1)},
    ),
]


def test_gorgo_is_held_against_the_best_other_row_at_each_percentile() -> None:
    trace, chats = cells(GRID)
    assert [(one.row, round(one.ratio, 3)) for one in trace.against.values()] == [
        ("a", 0.9), ("b", 0.8), ("a", 1.0), ("a", 1.0)
    ]  # fmt: skip
    assert {one.row for one in chats.against.values()} == {"a"}


def test_goals_are_asked_of_geometric_means_and_of_the_worst_cell() -> None:
    found = {(check.what, check.figure): check for check in checks(cells(GRID))}
    assert found["trace cells", P95].value == pytest.approx(0.8)
    assert found["trace cells", P95].verdict == "floor"
    assert found["generated cells", P50].verdict == "goal"
    assert found["all cells", "e2e_p95_ms"].value == pytest.approx((1.0 * 1.1) ** 0.5)
    assert found["worst cell", "e2e_p95_ms"].verdict == "missed"
    assert len(found) == 10


def test_the_load_sweep_is_held_to_the_claims_of_the_papers() -> None:
    swept = {"gorgo": result(40, 84, 1, 1), "prefix-similarity": result(100, 1, 1, 1)}
    swept |= {"session-affinity": result(99, 100, 1, 1), "prefix-cache": result(1, 99, 1, 1)}
    swept |= {"nearest": result(39, 1, 1, 1), "least-request": result(41, 1, 1, 1)}
    found = {(check.what, check.figure): check.verdict for check in sweep_checks([table("utilisation 0.5", swept)])}
    assert found == {
        ("utilisation 0.5, against prefix-similarity", P50): "goal",
        ("utilisation 0.5, against session-affinity", P50): "missed",
        ("utilisation 0.5, against nearest", P50): "missed",
        ("utilisation 0.5, against least-request", P50): "goal",
        ("utilisation 0.5, against session-affinity", P95): "goal",
        ("utilisation 0.5, against prefix-cache", P95): "missed",
    }


def course(ratio_at: Mapping[float, float]) -> list[float]:
    """TTFT of a request each 0.1 s, 100 ms times the ratio that holds from the latest of these times on."""
    at_s = np.arange(0.0, 1_000.0, 0.1)
    times = sorted(ratio_at)
    return [100.0 * ratio_at[times[place - 1]] for place in np.searchsorted(times, at_s, "right")]


def recovered(ratio_at: Mapping[float, float], best_from_s: float = 400.0) -> tuple[float, float, float | None]:
    at_s = np.arange(0.0, 1_000.0, 0.1).tolist()
    disturbed, calm = course(ratio_at), course({0.0: 1.0})
    found = recovery(
        [Result({}, (1.0, 1.0), (None, None), at_s, disturbed)],
        [Result({}, (1.0, 1.0), (None, None), at_s, calm)],
        400.0,
        best_from_s,
    )
    return found.worst, found.best, found.settled_s


def test_a_row_has_recovered_once_its_p95_stays_near_its_new_best() -> None:
    worst, best, settled_s = recovered({0.0: 1.0, 410.0: 5.0, 600.0: 1.5})
    assert (worst, best) == pytest.approx((5.0, 1.5))
    assert settled_s == pytest.approx(200.0, abs=5.0)


def test_a_row_that_an_event_does_not_touch_has_recovered_at_once() -> None:
    assert recovered({0.0: 1.0, 500.0: 1.05})[2] == 0.0


def test_a_lull_does_not_count_as_recovery() -> None:
    assert recovered({0.0: 1.0, 400.0: 5.0, 500.0: 1.0, 555.0: 4.0, 700.0: 1.0})[2] == pytest.approx(300.0, abs=5.0)


def test_a_row_that_is_worst_at_the_end_has_not_recovered() -> None:
    assert recovered({0.0: 1.0, 400.0: 2.0, 900.0: 9.0})[2] is None


def test_the_new_best_of_a_replica_that_returns_is_from_after_its_return() -> None:
    assert recovered({0.0: 1.0, 530.0: 1.4, 560.0: 1.2}, best_from_s=520.0)[1] == pytest.approx(1.2)


def test_every_event_is_run_beside_the_same_requests_without_it() -> None:
    entries = disturbances(Plan(seeds=(0,)))
    assert {entry.case for entry in entries} == {UNDISTURBED, *EVENTS}
    assert {len(entry.job.fleet.events) for entry in entries if entry.case == UNDISTURBED} == {0}
    assert {len(entry.job.fleet.events) for entry in entries if entry.case != UNDISTURBED} == {1}


def test_the_load_sweep_asks_for_the_load_it_names() -> None:
    entries = {entry.case: entry.job for entry in load_sweep(Plan(seeds=(0,)))}
    job = entries["utilisation 0.8"]
    assert offered_load(load(job.source, 0, 16), job.fleet) == pytest.approx(0.8, rel=0.03)


def test_held_out_windows_hold_the_weights_that_were_learned() -> None:
    tuned = Row("gorgo-online", {"tuning": {"mode": "online"}})
    entry = Entry("tuning window", WIDE, Job(tuned, FLEETS[WIDE], CHAT, 3))
    later = list(held_out_windows(Plan(seeds=(3,)), [(entry, result(1, 1, 1, 1, weights=(0.5, 2.0)))]))
    weights = {"rtt": 0.5, "queue": 2.0}
    settings = {one.job.row.name: one.job.row.settings for one in later}
    assert settings["gorgo-frozen"] == {"weights": weights}
    assert settings["gorgo-online"] == {"weights": weights, "tuning": {"mode": "online"}}
    assert settings["gorgo"] == {}
    assert all(one.job.seed > 1_000 for one in later)
    assert {one.case for one in later} == {"held-out window 1", "held-out window 2"}


def test_the_command_prints_tables_and_writes_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_routing_plan, "QUICK_LIMIT", 600)
    options = ["--quick", "--seeds=1", "--parts=components", "--jobs=1", f"--out={tmp_path}"]
    found = CliRunner().invoke(main, ["bench", "routing", *options])
    assert found.exit_code == 0, found.output
    assert "Predicted against measured" in found.output
    figures = json.loads((tmp_path / "bench-routing.json").read_text())
    assert figures["commit"]
    assert [one["engines"] for one in figures["predictions"]] == list(bench_routing_plan.PROFILES)
    assert all(len(one["components"]) == 4 for one in figures["predictions"])
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_an_unknown_part_is_named_with_the_known_ones() -> None:
    found = CliRunner().invoke(main, ["bench", "routing", "--parts=grit"])
    assert found.exit_code == 2
    assert f"unknown part 'grit'; known: {', '.join(PARTS)}" in " ".join(found.output.split())
