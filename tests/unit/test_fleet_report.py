from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from gorgo_plugin.fleet.bench_litellm import Slice, overhead
from gorgo_plugin.fleet.demo import DemoSettings, RowResult, Workload, load_workload
from gorgo_plugin.fleet.gateway import GATEWAYS, ROWS, Gateway, Row, Setup, envoy_row_settings, litellm_config
from gorgo_plugin.fleet.loadgen import Outcome
from gorgo_plugin.fleet.report import conclusion, lines, table, write_json, write_plot
from gorgo_plugin.fleet.statistics import summarise_run, ttft_ratio
from gorgo_plugin.policies import POLICIES


def outcome(ttft_ms: float, replica: str = "us-east", cached: int = 0) -> Outcome:
    return Outcome(0.1, ttft_ms, 2 * ttft_ms, replica, prompt_tokens=100, cached_tokens=cached, output_tokens=5)


FAILED = Outcome(0.1, error="status 500")


def spread(factor: float, seed: int = 0) -> list[Outcome]:
    """300 times to first token, log-normal around 100 ms times `factor`."""
    return [outcome(ms) for ms in np.random.default_rng(seed).lognormal(math.log(100 * factor), 0.8, 300).tolist()]


def test_a_run_is_summarised_by_its_successful_requests_and_counts_the_others() -> None:
    summary = summarise_run([outcome(100, cached=50), outcome(300, "ap-northeast"), FAILED])
    assert (summary.requests, summary.errors) == (3, 1)
    assert summary.ttft_p50_ms == 200
    assert summary.e2e_p95_ms == pytest.approx(580)
    assert summary.cached_share == 0.25
    assert summary.by_replica == {"us-east": 1, "ap-northeast": 1}


def test_a_run_in_which_nothing_succeeded_has_no_times() -> None:
    summary = summarise_run([FAILED])
    assert math.isnan(summary.ttft_p50_ms)
    assert summary.errors == 1


def test_the_ratio_of_two_runs_is_of_their_percentiles_and_its_interval_holds_it() -> None:
    ratio = ttft_ratio(spread(0.5), spread(1.0), 50)
    assert ratio is not None
    assert ratio.value == pytest.approx(0.5)
    assert ratio.low == pytest.approx(0.5)  # the same requests, each twice as fast: pairing leaves nothing open
    assert ratio.high == pytest.approx(0.5)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(30):
        ratio = ttft_ratio(spread(0.8, seed), spread(1.0, seed + 1_000), 50, seed)
        assert ratio is not None
        covered += ratio.low <= 0.8 <= ratio.high
    assert covered >= 25  # of 30 at 95% each, fewer would be a chance of 1 in 300


def test_requests_that_failed_in_one_run_are_left_out_of_both() -> None:
    ratio = ttft_ratio([outcome(50), FAILED, outcome(50)], [outcome(100), outcome(9_999), outcome(100)], 50)
    assert ratio is not None
    assert ratio.value == 0.5
    assert ttft_ratio([FAILED], [outcome(1)], 50) is None


def results(**factors: float) -> list[RowResult]:
    return [
        RowResult(ROWS[name.replace("_", "-")], spread(factor, seed), 1.0)
        for seed, (name, factor) in enumerate(factors.items())
    ]


def test_the_conclusion_says_which_rows_are_beaten_which_are_open_and_which_are_not_beaten() -> None:
    said = conclusion(lines(results(simple_shuffle=2.0, session_affinity=1.0, nearest=0.5, gorgo=1.0)))
    beaten, undecided, lost = said.split(". ")
    assert beaten.endswith("than: simple-shuffle p50, simple-shuffle p95")
    assert undecided.endswith("session-affinity p50, session-affinity p95")
    assert lost == "gorgo does not beat: nearest p50, nearest p95."


def test_the_conclusion_says_so_when_gorgo_did_not_run() -> None:
    assert "nothing is compared" in conclusion(lines(results(nearest=1.0)))


def test_the_conclusion_says_how_many_requests_the_times_leave_out() -> None:
    ran = [RowResult(ROWS["nearest"], [FAILED, *spread(1.0)[1:]], 1.0), *results(gorgo=1.0)]
    assert conclusion(lines(ran)).endswith("Requests that failed are left out of the times: nearest (1).")


def test_the_conclusion_warns_of_a_load_generator_that_was_late() -> None:
    late = RowResult(ROWS["gorgo"], [Outcome(200.0, 1.0, 2.0)] * 300, 1.0)
    assert "too busy" in conclusion(lines([*results(nearest=1.0), late]))


def test_the_table_has_a_line_for_each_row_and_fits_its_width() -> None:
    console = Console(file=io.StringIO(), width=128)
    console.print(table(lines(results(latency_based_routing=20.0, gorgo=1.0)), "LiteLLM"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "* LiteLLM's own strategy" in shown
    assert "latency-based-routing*" in shown
    assert "300/0/0" in shown
    assert "…" not in shown


def test_every_figure_is_written_down_and_the_plot_is_a_picture(tmp_path: Path) -> None:
    settings = DemoSettings(requests=10, rows=("nearest", "gorgo"), out=tmp_path)
    workload = load_workload(settings)
    ran = results(nearest=2.0, gorgo=1.0)
    write_json(tmp_path / "demo.json", settings, workload, ran, lines(ran))
    write_plot(tmp_path / "demo.png", ran, lines(ran))
    written = json.loads((tmp_path / "demo.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["nearest", "gorgo"]
    assert len(written["rows"][0]["outcomes"]) == 300
    assert written["rows"][0]["ratios"]["p95"]["high"] < 1
    assert written["settings"]["gateway"] == "litellm"
    assert all(written["machine"]["versions"][package] for package in ("litellm", "grpcio", "xds-protos"))
    assert written["workload"]["reuse"] > 0
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_time_scale_stretches_the_same_requests() -> None:
    once, twice = (load_workload(DemoSettings(requests=50, time_scale=scale)).requests for scale in (None, 2.0))
    assert [request.messages for request in once] == [request.messages for request in twice]
    assert [2 * request.at_s for request in once] == [request.at_s for request in twice]


@pytest.mark.parametrize("gateway", GATEWAYS.values(), ids=GATEWAYS)
def test_every_policy_can_be_a_row_of_every_gateway(gateway: Gateway) -> None:
    assert set(POLICIES) - {"gorgo-proxy"} == {row.policy for row in gateway.rows.values()} - {None}  # an alias
    assert set(gateway.default_rows) <= set(gateway.rows)
    assert all((row.strategy is None) != (row.policy is None) for row in gateway.rows.values())


def test_a_policy_that_shares_its_name_with_a_strategy_of_the_gateway_is_another_row() -> None:
    rows = GATEWAYS["envoy"].rows
    assert rows["least-request"] == Row("least-request", strategy="LEAST_REQUEST")
    assert rows["plugin-least-request"] == Row("plugin-least-request", policy="least-request")


def test_litellms_own_rows_know_nothing_of_the_plugin() -> None:
    config = litellm_config(ROWS["simple-shuffle"], {"us-east": "http://127.0.0.1:1"}, 1_000, 0)
    assert "gorgo" not in yaml.safe_dump(config)
    assert config["router_settings"] == {"routing_strategy": "simple-shuffle"}


def test_a_policy_meets_the_same_settings_behind_either_gateway(tmp_path: Path) -> None:
    setup = Setup({"us-east": "http://127.0.0.1:1"}, 1_000, 7, tmp_path)
    content = envoy_row_settings(GATEWAYS["envoy"].rows["nearest"], setup)
    litellm = litellm_config(ROWS["nearest"], setup.replicas, setup.kv_tokens, setup.seed)
    assert content["replicas"] == [
        {"url": "http://127.0.0.1:1", **entry["model_info"]["gorgo"]} for entry in litellm["model_list"]
    ]
    own = {name: value for name, value in content.items() if name not in ("replicas", "envoy")}
    assert own == litellm["router_settings"]["routing_strategy_args"]


def test_our_rows_differ_from_litellms_only_in_the_lines_a_user_adds() -> None:
    config = litellm_config(ROWS["nearest"], {"us-east": "http://127.0.0.1:1"}, 1_000, 7)
    assert config["litellm_settings"] == {"callbacks": ["gorgo_plugin.litellm_strategy.callback"]}
    assert config["router_settings"]["routing_strategy"] == "gorgo"
    assert config["router_settings"]["routing_strategy_args"]["policy"] == "nearest"
    assert config["model_list"][0]["model_info"] == {
        "gorgo": {"name": "us-east", "region": "us-east", "kv_tokens": 1_000}
    }


def test_a_workload_of_a_trace_keeps_its_window(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 100 * turn, "input_length": 1024, "output_length": 3, "hash_ids": [turn % 5, 100 + turn % 5]}
        for turn in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    workload: Workload = load_workload(DemoSettings(trace=path, requests=40))
    assert workload.window is not None
    assert workload.window.reuse > 0.8
    assert workload.requests[-1].at_s == pytest.approx(3.9 * 2.0)


def test_an_overhead_is_the_median_of_pairs_of_slices_and_the_ratio_of_sums() -> None:
    ours = [Slice(cpu_s, 2.0, (10.0, 10.0)) for cpu_s in (1.1, 1.1, 1.1, 6.0)]  # one held a full garbage collection
    theirs = [Slice(1.0, 1.0, (5.0, 5.0)) for _ in range(4)]
    found = overhead("load", ours, theirs)
    assert found.cpu_ratio.value == pytest.approx(1.1)
    assert found.cpu_ratio.low <= 1.1 <= found.cpu_ratio.high
    assert found.cpu_ratio_total == pytest.approx(9.3 / 4)
    assert found.throughput_ratio.value == found.throughput_ratio_total == 0.5
    assert found.cpu_ms == (pytest.approx(9300 / 8), pytest.approx(500.0))
    assert found.p50_ms == (10.0, 5.0)
