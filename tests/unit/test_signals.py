from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from gorgo_plugin.settings import HealthSettings, ProbeSettings, RateSettings
from gorgo_plugin.signals import EngineGauges, Flight, Flights, GaugeTable, HealthTable, LatencyTable, RateTable
from gorgo_plugin.signals.rates import HALF_LIFE_S, REFIT_EVERY, REFIT_PAUSE_S, Sample, token_pairs, weighted_medians

ONE = np.array([0])


# Latency table


def latency(**settings: float) -> LatencyTable:
    table = LatencyTable(ProbeSettings.model_validate(settings))
    table.grow(2)
    return table


def test_a_replica_never_measured_is_priced_at_the_prior_and_doubted_by_as_much() -> None:
    table = latency(prior_ms=150.0)
    assert table.price_ms(ONE, 0.0)[0][0] == 150.0
    assert table.price_ms(ONE, 0.0)[1][0] == 150.0


def test_round_trips_are_smoothed_with_the_papers_alpha() -> None:
    table = latency()
    table.observe(0, 0.100, 0.0)
    table.observe(0, 0.200, 1.0)
    assert table.price_ms(ONE, 0.0)[0][0] == pytest.approx(130.0)
    assert table.price_ms(ONE, 1.0)[1][0] == 0.0


def test_a_stale_value_is_marked_and_its_doubt_grows_to_a_bound() -> None:
    table = latency(stale_after_s=10.0)
    table.observe(0, 0.100, 0.0)
    assert not table.describe(0, 10.0)["stale"]
    assert table.describe(0, 10.1)["stale"]
    doubts = [table.price_ms(ONE, at)[1][0] for at in (9.0, 11.0, 30.0, 1e3, 1e9)]
    assert doubts[0] == 0.0
    assert doubts[0] < doubts[1] < doubts[2] < doubts[3] == doubts[4]


@pytest.mark.parametrize("sample", [math.nan, math.inf, -0.1])
def test_a_sample_that_is_no_duration_changes_nothing(sample: float) -> None:
    table = latency()
    table.observe(0, 0.1, 0.0)
    table.observe(0, sample, 1.0)
    assert table.price_ms(ONE, 0.0)[0][0] == pytest.approx(100.0)
    assert table.describe(0, 1.0)["age_s"] == 1.0


def test_a_sample_longer_than_any_round_trip_stays_a_price() -> None:
    table = latency()
    table.observe(0, 1.7e305, 0.0)
    assert table.price_ms(ONE, 0.0)[0][0] == 60_000.0
    assert np.isfinite(table.price_ms(ONE, 1e9)[1][0])


def test_a_clock_that_jumps_back_does_not_make_a_negative_age() -> None:
    table = latency()
    table.observe(0, 0.1, 100.0)
    assert table.describe(0, 50.0)["age_s"] == 0.0
    assert table.price_ms(ONE, 50.0)[1][0] == 0.0


# Health


def health() -> HealthTable:
    table = HealthTable(HealthSettings(backoff_s=1.0, backoff_max_s=8.0))
    table.grow(1)
    return table


def test_pauses_double_up_to_the_longest() -> None:
    table, now = health(), 0.0
    pauses = []
    for _ in range(6):
        table.failed(0, dispatched_s=now, now_s=now)
        pauses.append(table.describe(0, now)["paused_s"])
        now += float(pauses[-1]) + 0.1
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_burst_that_was_under_way_counts_as_one_failure() -> None:
    table = health()
    for at in (1.0, 1.1, 1.2):
        table.failed(0, dispatched_s=0.5, now_s=at)
    assert table.describe(0, 1.2)["failures_in_a_row"] == 1


def test_after_the_pause_one_trial_decides_and_others_wait_for_it() -> None:
    table = health()
    table.failed(0, 0.0, 0.0)
    assert table.unavailable(0.5) == [0]
    assert table.unavailable(1.1) == []
    table.dispatched(0, flight_id=7, now_s=1.1)
    assert table.unavailable(1.2) == [0]
    table.answered(0)
    assert table.unavailable(1.3) == []


def test_an_old_request_that_fails_does_not_free_the_trial() -> None:
    table = health()
    table.failed(0, dispatched_s=0.0, now_s=1.0)
    table.dispatched(0, flight_id=7, now_s=2.1)
    table.failed(0, dispatched_s=0.5, now_s=2.2)  # it was under way when the first one failed
    assert table.unavailable(2.3) == [0]
    table.failed(0, dispatched_s=2.1, now_s=2.4)  # the trial itself
    assert table.describe(0, 2.4)["failures_in_a_row"] == 2


def test_a_trial_that_ends_without_a_verdict_lets_the_next_request_try() -> None:
    table = health()
    table.failed(0, 0.0, 0.0)
    table.dispatched(0, flight_id=7, now_s=1.1)
    table.ended(0, flight_id=7)
    assert table.unavailable(1.2) == []


def test_a_trial_that_never_ends_does_not_close_the_replica_for_good() -> None:
    table = health()
    table.failed(0, 0.0, 0.0)
    table.dispatched(0, flight_id=7, now_s=1.1)
    assert table.unavailable(10.0) == []


def test_a_clock_that_jumps_back_does_not_prolong_a_pause_beyond_the_longest() -> None:
    table = health()
    table.failed(0, 1000.0, 1000.0)
    assert table.unavailable(10.0) == []


def test_a_failed_probe_closes_and_a_good_one_opens() -> None:
    table = health()
    table.probed(0, False)
    assert table.unavailable(0.0) == [0]
    table.probed(0, True)
    assert table.unavailable(0.0) == []


def test_a_good_probe_does_not_end_the_pause_after_failed_requests() -> None:
    table = health()
    table.failed(0, 0.0, 0.0)
    table.probed(0, True)
    assert table.unavailable(0.5) == [0]


# Rates


def rates() -> RateTable:
    table = RateTable(RateSettings(ms_per_token=0.09, overhead_ms=10.0))
    table.grow(1)
    return table


SECONDS = itertools.count()


def first_token(tokens: float, ms: float, at_s: float | None = None, prompt_tokens: float | None = None) -> Sample:
    """Of `tokens` uncached tokens, behind cached ones up to `prompt_tokens`; a second after the last, if not `at_s`."""
    pairs = token_pairs(tokens if prompt_tokens is None else prompt_tokens, tokens)
    return Sample(0.0, tokens, pairs, ms, float(next(SECONDS)) if at_s is None else at_s)


def test_rates_start_at_the_prior() -> None:
    assert rates().describe(0) == {"ms_per_token": 0.09, "overhead_ms": 10.0, "tokens_per_pair": 0.0, "samples": 0}


def test_slope_and_overhead_are_learned_although_a_third_of_the_samples_are_outliers() -> None:
    table, rng = rates(), random.Random(1)
    for number in range(200):
        tokens = rng.uniform(100, 8000)
        outlier = number % 3 == 0
        ms = 30.0 + 0.2 * tokens * rng.gauss(1.0, 0.02) + (20_000.0 if outlier else 0.0)
        table.observe(0, first_token(tokens, ms))
    learned = table.describe(0)
    assert learned["ms_per_token"] == pytest.approx(0.2, rel=0.15)
    assert learned["overhead_ms"] < 200.0


def test_clean_samples_are_fitted_within_five_percent() -> None:
    table, rng = rates(), random.Random(1)
    for _ in range(64):
        tokens = rng.uniform(16, 8000)
        table.observe(0, first_token(tokens, 30.0 + 0.05 * tokens * rng.gauss(1.0, 0.02)))
    assert table.describe(0)["ms_per_token"] == pytest.approx(0.05, rel=0.05)
    assert table.describe(0)["overhead_ms"] == pytest.approx(30.0, abs=10.0)


def test_slow_first_answers_to_short_prompts_leave_the_slope_at_the_prior() -> None:
    table = rates()
    for slow_ms in (2000.0, 900.0, 450.0, 440.0, 60.0):  # imports, connections: nothing that tokens would explain
        table.observe(0, first_token(330.0, slow_ms))
    assert table.describe(0)["ms_per_token"] == pytest.approx(0.09, rel=0.3)
    assert table.describe(0)["overhead_ms"] <= 60.0


def test_an_engine_that_slows_down_is_followed_within_a_window() -> None:
    table, rng = rates(), random.Random(1)
    for slope in (0.05, 0.15):
        for _ in range(65):
            tokens = rng.uniform(100, 8000)
            table.observe(0, first_token(tokens, 20.0 + slope * tokens))
    assert table.describe(0)["ms_per_token"] == pytest.approx(0.15, rel=0.05)


@pytest.mark.parametrize(("tokens", "ms"), [(0, 5.0), (100, -1.0), (100, math.nan), (math.inf, 1.0)])
def test_a_sample_that_makes_no_sense_is_ignored(tokens: float, ms: float) -> None:
    table = rates()
    table.observe(0, first_token(tokens, ms))
    assert table.describe(0)["samples"] == 0


def test_rates_are_never_negative_or_zero() -> None:
    table = rates()
    for _ in range(64):
        table.observe(0, first_token(5000.0, 0.001))
    assert table.describe(0)["ms_per_token"] > 0.0
    assert table.describe(0)["overhead_ms"] >= 0.0


def test_what_attention_adds_is_learned_from_an_engine_that_slows_with_context() -> None:
    table, rng = rates(), random.Random(1)
    t0_ms, a_ms, b_ms = 9.8, 0.051, 5.7e-5  # vLLM 0.32 on one CPU core
    errors = []
    for number in range(300):
        prompt = rng.uniform(500, 8000)
        tokens = prompt * rng.uniform(0.05, 1.0)
        ms = t0_ms + a_ms * tokens + b_ms * token_pairs(prompt, tokens)
        if number >= 100:
            predicted = table.overhead_ms(ONE)[0] + table.ms_per_token(ONE)[0] * table.slot_work_tokens(
                0, prompt, tokens
            )
            errors.append(abs(predicted - ms) / ms)
        table.observe(0, first_token(tokens, ms * rng.lognormvariate(0.0, 0.03), prompt_tokens=prompt))
    assert table.describe(0)["tokens_per_pair"] == pytest.approx(b_ms / a_ms, rel=0.5)
    assert sorted(errors)[len(errors) // 2] < 0.08


def test_a_linear_engine_is_given_no_attention() -> None:
    table, rng = rates(), random.Random(1)
    for _ in range(300):
        prompt = rng.uniform(500, 20_000)
        tokens = prompt * rng.uniform(0.05, 1.0)
        table.observe(0, first_token(tokens, 15.0 + 0.1 * tokens * rng.lognormvariate(0.0, 0.1), prompt_tokens=prompt))
    assert table.describe(0)["tokens_per_pair"] == 0.0
    assert not table.curved


def test_a_replica_that_is_not_asked_any_more_is_not_believed_slow_for_ever() -> None:
    table = rates()
    for _ in range(64):
        table.observe(0, first_token(8000.0, 8000.0, at_s=0.0))
    assert table.describe(0)["ms_per_token"] == pytest.approx(1.0, rel=0.05)
    table.refit_old(HALF_LIFE_S)
    assert table.describe(0)["ms_per_token"] > 0.9
    table.refit_old(6 * HALF_LIFE_S)
    assert table.describe(0)["ms_per_token"] == pytest.approx(0.09)


def test_a_busy_replica_is_not_fitted_for_every_few_of_its_answers() -> None:
    table = rates()
    for ms, at_s in ((800.0, 0.0), (1600.0, REFIT_PAUSE_S / 2)):
        for _ in range(64):
            table.observe(0, first_token(8000.0, ms, at_s))
    assert table.describe(0)["ms_per_token"] == pytest.approx(0.1, rel=0.05)
    for _ in range(REFIT_EVERY):
        table.observe(0, first_token(8000.0, 1600.0, REFIT_PAUSE_S))
    assert table.describe(0)["ms_per_token"] == pytest.approx(0.2, rel=0.05)


def test_restored_rates_outlast_the_first_samples() -> None:
    table, other = rates(), rates()
    for _ in range(64):
        other.observe(0, first_token(8000.0, 4000.0))
    table.restore(0, other.describe(0), now_s=float(next(SECONDS)))
    assert table.ms_per_token(ONE)[0] == other.ms_per_token(ONE)[0]
    table.observe(0, first_token(8000.0, 4000.0))
    assert table.describe(0)["ms_per_token"] == pytest.approx(0.5, rel=0.05)


def test_weighted_medians_are_where_half_of_the_weight_lies_below() -> None:
    values = np.array([[3.0, 1.0], [1.0, 1.0]])
    assert weighted_medians(values, np.array([1.0, 1.0]), 2.0, 1.0).tolist() == [2.0, 1.0]
    assert weighted_medians(values, np.array([5.0, 1.0]), 2.0, 1.0).tolist() == [3.0, 1.0]


# Gauges


def test_gauges_keep_their_age_and_derive_used_tokens() -> None:
    table = GaugeTable()
    table.grow(2)
    table.observe(0, EngineGauges(running=3, waiting=1, kv_usage=0.25), kv_tokens=1000, now_s=5.0)
    assert table.column("used_tokens", ONE)[0] == 250.0
    described = table.describe(0, 8.0)
    assert described is not None
    assert {name: value for name, value in described.items() if value is not None} == {
        "running": 3,
        "waiting": 1,
        "kv_usage": 0.25,
        "age_s": 3.0,
    }
    assert table.describe(1, 8.0) is None


# Flights


def flight(number: int, uncached: float = 1000.0, at: float = 0.0, stream: bool = True, slot: int = 0) -> Flight:
    return Flight(
        flight_id=number,
        request_id=str(number),
        slot=slot,
        model="",
        stream=stream,
        exact=True,
        dispatched_s=at,
        prompt_tokens=uncached + 500,
        own_tokens=int(uncached) + 500,
        cached_tokens=500.0,
        uncached_tokens=uncached,
        work_tokens=uncached,
        ahead_tokens=0.0,
        network_ms=100.0,
        predicted_ms=100.0 + uncached * 0.1,
        path_blocks=0,
        answer_blocks=0,
        rest=np.empty(0, dtype=np.uint32),
        hashes=b"",
        credit=None,
    )


def ledger() -> Flights:
    flights = Flights()
    flights.grow(2)
    return flights


RATE = np.array([0.1])  # ms per token


def test_only_uncached_tokens_without_a_first_token_are_queued() -> None:
    flights = ledger()
    flights.open(flight(1))
    flights.open(flight(2, uncached=200.0))
    assert flights.column("queued_tokens", ONE)[0] == 1200.0
    flights.prefilled(flights.get(1), 0.2)  # type: ignore[arg-type]
    assert flights.column("queued_tokens", ONE)[0] == 200.0
    assert flights.column("decoding", ONE)[0] == 1.0
    assert flights.column("waiting", ONE)[0] == 1.0


def test_the_backlog_shrinks_while_the_head_is_computed() -> None:
    flights = ledger()
    flights.open(flight(1))  # 100 ms of prefill, reaches the engine at 50 ms
    assert flights.backlog_ms(ONE, RATE, 0.05)[0] == pytest.approx(100.0)
    assert flights.backlog_ms(ONE, RATE, 0.11)[0] == pytest.approx(40.0)
    assert flights.backlog_ms(ONE, RATE, 0.16)[0] == pytest.approx(0.0)
    assert flights.ahead_tokens(0, 0.1, 0.11) == pytest.approx(400.0)


def test_the_next_one_becomes_the_head_when_the_first_has_its_token() -> None:
    flights = ledger()
    flights.open(flight(1))
    flights.open(flight(2))
    flights.prefilled(flights.get(1), 0.200)  # type: ignore[arg-type]  # left the engine at 150 ms
    assert flights.backlog_ms(ONE, RATE, 0.200)[0] == pytest.approx(50.0)


def test_a_replica_that_hangs_gets_dearer_with_every_second() -> None:
    flights = ledger()
    flights.open(flight(1))
    late = [flights.backlog_ms(ONE, RATE, at)[0] for at in (1.0, 2.0, 10.0)]
    assert late[0] > 500.0
    assert late[0] < late[1] < late[2]


def test_one_that_hangs_is_late_whoever_else_is_on_time() -> None:
    flights = ledger()
    flights.open(flight(1, slot=1))
    alone = flights.backlog_ms(slice(0, 2), np.array([0.1, 0.1]), 2.0)
    flights.open(flight(2, at=1.99, slot=0))
    fresh, hung = flights.backlog_ms(slice(0, 2), np.array([0.1, 0.1]), 2.0)
    assert (alone[0], hung) == (0.0, alone[1])
    assert hung > 1000.0
    assert fresh == pytest.approx(100.0)


def test_an_unstreamed_request_stops_blocking_at_its_predicted_prefill_end() -> None:
    flights = ledger()
    flights.open(flight(1, stream=False))  # 50 ms on the way, 100 ms of prefill
    flights.release_unstreamed(0.14)
    assert flights.column("waiting", ONE)[0] == 1.0
    flights.release_unstreamed(0.16)
    assert flights.column("waiting", ONE)[0] == 0.0
    assert flights.column("decoding", ONE)[0] == 1.0


def test_a_moved_flight_is_counted_at_its_new_replica_only() -> None:
    flights = ledger()
    flights.open(flight(1))
    moved = flights.get(1)
    assert moved is not None
    flights.move(moved, 1, 0.1)
    assert flights.column("waiting", np.array([0, 1])).tolist() == [0.0, 1.0]
    flights.close(1, 0.2)
    assert flights.column("waiting", np.array([0, 1])).tolist() == [0.0, 0.0]
