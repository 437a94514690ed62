from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gorgo_plugin.cli import main
from gorgo_plugin.fleet.generated import NAMES, generate
from gorgo_plugin.fleet.rows import ROWS, rows_named
from gorgo_plugin.fleet.simulation_runs import Source, load, run_all
from gorgo_plugin.fleet.topology import read_fleet

FLEETS = Path(__file__).parents[2] / "examples/fleets"
TRACE_LINES = [
    {"timestamp": 400 * number, "input_length": 700, "output_length": 20, "hash_ids": [number % 7, 100 + number]}
    for number in range(60)
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, TRACE_LINES)))
    return path


def simulate(*arguments: object, fleet: Path = FLEETS / "unequal.yaml") -> Result:
    return CliRunner().invoke(main, ["simulate", "--fleet", str(fleet), *map(str, arguments)])


def figures(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_same_command_writes_the_same_json_in_one_process_or_two(trace: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{jobs}.json" for jobs in (1, 2)]
    for jobs, file in enumerate(files, 1):
        done = simulate("--trace", trace, "--policies=gorgo,random", "--seeds=2", "--jobs", jobs, "--json", file)
        assert done.exit_code == 0, done.output
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_table_tells_who_gets_gauges_late_and_what_is_compared(trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "out" / "figures.json"
    arguments = ("--policies", "gorgo,least-load", "--time-scale=2", "--requests=40", "--jobs=1", "--json", file)
    done = simulate("--trace", trace, *arguments)
    shown = " ".join(done.output.split())
    assert "least-load°" in shown
    assert "up to a second old" in shown
    assert "us-east/ us-west/ eu-west" in shown
    content = figures(file)
    assert content["workload"] == {"name": "trace.jsonl", "requests": 40, "time_scale": 2.0}
    first, second = content["rows"]
    assert first["ratios"] == {}
    means = (first["means"]["ttft_p95_ms"], second["means"]["ttft_p95_ms"])
    assert second["ratios"]["ttft_p95_ms"]["value"] == pytest.approx(means[1] / means[0])
    assert second["ratios"]["ttft_p95_ms"]["low"] is None
    assert content["fleet"]["replicas"][0]["engine"]["a_ms"] == 0.2


def test_plots_are_written(trace: Path, tmp_path: Path) -> None:
    done = simulate("--trace", trace, "--policies=gorgo,nearest,random,least-load", "--jobs=1", "--plots", tmp_path)
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.glob("*.png")} == {"ttft.png", "regions.png", "learned.png", "predicted.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --trace or --workload"),
        (["--workload", "conversations", "--trace", "x"], "give either --trace or --workload"),
        (["--workload", "conversation"], "Invalid value for '--workload'"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (
            ["--workload", "conversations", "--policies", "gorgo,nearst"],
            "unknown row 'nearst' (did you mean 'nearest'?)",
        ),
        (["--workload", "conversations", "--policies", "gorgo,gorgo"], "a row is named twice"),
    ],
)
def test_wrong_arguments_are_explained_in_a_sentence(arguments: Sequence[str], message: str) -> None:
    done = simulate(*arguments)
    assert done.exit_code != 0
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_a_wrong_fleet_file_is_explained_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("gateways: [{region: a}]\nreplicas: [{name: a, region: b}]\n")
    done = simulate("--workload=conversations", fleet=path)
    assert done.output.strip() == f"Error: fleet {path}: links: none between 'a' and 'b', which requests go between"


def test_errors_of_a_run_in_another_process_are_explained_too(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("gateways: [{region: a}]\nreplicas: [{name: a, region: a, engine: {kv_tokens: 500}}]\n")
    done = simulate("--trace", trace, "--policies=gorgo,random", "--jobs=2", fleet=path)
    assert "replicas.0.engine: request 0 of the workload" in " ".join(done.output.split())
    assert done.exit_code == 1


def test_a_file_of_settings_is_a_row(trace: Path, tmp_path: Path) -> None:
    path, file = tmp_path / "mine.yaml", tmp_path / "figures.json"
    path.write_text("replicas: [{name: a, url: 'http://a:80'}]\nweights: {rtt: 2, queue: 0.5}\nseed: 9\n")
    done = simulate("--trace", trace, "--policies", f"gorgo,{path}", "--jobs=1", "--json", file)
    assert done.exit_code == 0, done.output
    assert figures(file)["rows"][1]["name"] == "mine"
    assert figures(file)["rows"][1]["settings"]["weights"] == {"rtt": 2, "queue": 0.5}
    path.write_text("weight: 1\n")
    assert "weight: unknown setting (did you mean 'weights'?)" in simulate("--trace", trace, "--policies", path).output
    path.write_text("[")
    assert "cannot be read as YAML" in simulate("--trace", trace, "--policies", path).output


def test_progress_counts_the_requests_of_all_runs(trace: Path) -> None:
    seen: list[int] = []
    run_all(rows_named(["gorgo", "random"]), [0], read_fleet(FLEETS / "near.yaml"), Source(trace), 1, seen.append)
    assert seen == list(range(1, 121))


def test_generated_workloads_come_from_a_seed_at_a_rate() -> None:
    for name in NAMES:
        requests = generate(name, 1, rate_scale=2.0, block_tokens=16)
        slower = generate(name, 1, rate_scale=1.0, block_tokens=16)
        times = [request.at_s for request in requests]
        assert times == sorted(times)
        assert times == [request.at_s for request in generate(name, 1, rate_scale=2.0, block_tokens=16)]
        assert slower[-1].at_s / requests[-1].at_s == pytest.approx(2.0, rel=0.1)
        assert all(request.session for request in requests)


def test_time_scale_stretches_generated_workloads_as_it_does_traces(trace: Path) -> None:
    for source in (Source(trace), Source(workload="conversations")):
        spans = []
        for scale in (1.0, 3.0):
            stretched = Source(source.trace, source.workload, scale)
            spans.append(load(stretched, 0, 16)[-1].at_s)
        assert spans[1] / spans[0] == pytest.approx(3.0)


def test_every_row_is_in_the_help() -> None:
    shown = "".join(CliRunner().invoke(main, ["simulate", "--help"]).output.split())  # lines break at hyphens
    assert all(name in shown for name in ROWS)
