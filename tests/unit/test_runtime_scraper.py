"""Reading engines' metrics pages."""

from __future__ import annotations

import time

import pytest

from gorgo_plugin.runtime.scraper import interval_s, parse_page
from gorgo_plugin.settings import MetricsSettings
from gorgo_plugin.signals.gauges import EngineGauges

VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000",other="x"} 1.0
vllm:num_requests_running_total{engine="0"} 77.0
process_start_time_seconds 1.7e+09
"""
SGLANG = b"""sglang:num_running_reqs{model_name="m",tp_rank="0"} 4.0
sglang:num_queue_reqs{model_name="m",tp_rank="0"} 1.0
sglang:num_used_tokens{model_name="m",tp_rank="0"} 1234.0
sglang:token_usage{model_name="m",tp_rank="0"} 0.5
"""


def test_a_vllm_page_gives_gauges_and_used_tokens_from_its_cache_config() -> None:
    page = parse_page(VLLM)
    assert page.gauges == EngineGauges(3.0, 2.0, kv_usage=0.25, used_tokens=4000.0, kv_tokens=16000, block_tokens=16)
    assert page.start_time_s == 1.7e9


def test_a_vllm_page_that_gives_its_cache_in_tokens_is_believed_over_blocks() -> None:
    page = parse_page(VLLM.replace(b'other="x"', b'kv_cache_size_tokens="20000"'))
    assert page.gauges is not None
    assert page.gauges.used_tokens == 5000.0


def test_a_vllm_page_without_a_block_count_leaves_used_tokens_unknown() -> None:
    page = parse_page(VLLM.replace(b'num_gpu_blocks="1000"', b'num_gpu_blocks="None"'))
    assert page.gauges is not None
    assert page.gauges.used_tokens is None


def test_an_sglang_page_gives_its_own_used_tokens() -> None:
    assert parse_page(SGLANG).gauges == EngineGauges(running=4.0, waiting=1.0, kv_usage=0.5, used_tokens=1234.0)


def test_an_sglang_page_tells_how_many_tokens_its_cache_holds() -> None:
    page = parse_page(SGLANG + b'sglang:max_total_num_tokens{model_name="m"} 471258.0\n')
    assert page.gauges is not None
    assert page.gauges.kv_tokens == 471_258


def test_data_parallel_ranks_are_added_up_and_their_usage_averaged() -> None:
    second = VLLM.replace(b'engine="0"', b'engine="1"').replace(b"0.25", b"0.75")
    page = parse_page(VLLM + second)
    assert page.gauges == EngineGauges(6.0, 4.0, kv_usage=0.5, used_tokens=16000.0, kv_tokens=32000, block_tokens=16)


def test_a_page_of_something_else_has_no_gauges() -> None:
    page = parse_page(b"python_info 1.0\nprocess_start_time_seconds 5\n")
    assert page.gauges is None
    assert page.start_time_s == 5.0


@pytest.mark.parametrize("value", [b"NaN", b"+Inf", b"many"])
def test_a_value_that_is_no_finite_number_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_page(VLLM.replace(b" 3.0\n", b" " + value + b"\n"))


def test_a_long_page_is_read_in_a_few_milliseconds() -> None:
    histogram = b"".join(
        b'vllm:time_to_first_token_seconds_bucket{engine="0",le="%d",model_name="m"} 9.0\n' % i for i in range(20_000)
    )
    page = histogram + VLLM + histogram
    assert len(page) > 1_000_000
    best = min(_timed(page) for _ in range(5))
    assert best < 0.1  # parsing every line takes over a second


def _timed(page: bytes) -> float:
    started = time.perf_counter()
    parse_page(page)
    return time.perf_counter() - started


def test_engines_are_read_every_second_only_where_the_policy_decides_by_gauges() -> None:
    assert interval_s(MetricsSettings(), reads_gauges=True) == 1.0
    assert interval_s(MetricsSettings(), reads_gauges=False) == 10.0
    assert interval_s(MetricsSettings(interval_s=3.0), reads_gauges=True) == 3.0
