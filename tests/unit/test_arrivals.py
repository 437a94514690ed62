import math

import numpy as np
import pytest

from gorgo_plugin.policies.base import DECODING_SHARE, MOST_TURNS, MOST_UTILISATION, blocking_ms, next_turn_ms
from gorgo_plugin.signals.arrivals import HORIZON_S, Arrivals


def table() -> Arrivals:
    arrivals = Arrivals()
    arrivals.grow(2)
    return arrivals


def test_a_steady_stream_is_read_as_its_rate():
    arrivals = table()
    for number in range(1000):
        arrivals.sent(0, 50.0, 0.1 * number)
    per_ms = arrivals.lately(slice(0, 2), 100.0)[0]
    assert per_ms[0] == pytest.approx(0.010, rel=0.05)  # ten a second
    assert per_ms[1] == 0.0
    assert arrivals.lately(slice(0, 2), 100.0)[1] == pytest.approx(0.5, rel=0.05)


def test_demand_fades_when_nothing_comes():
    arrivals = table()
    arrivals.sent(0, 50.0, 5.0)
    before = arrivals.lately(slice(0, 2), 5.0)[0][0]
    assert arrivals.lately(slice(0, 2), 5.0 + HORIZON_S)[0][0] == pytest.approx(before / math.e)


def test_it_runs_for_months_and_through_jumps_of_the_clock():
    arrivals = table()
    for at_s in (0.0, 1e7, 1e7 + 1.0, 3.0, 4.0):
        arrivals.sent(0, 50.0, at_s)
        seen = arrivals.lately(slice(0, 2), at_s)[0][0]
        assert 1 / (HORIZON_S * 1000) <= seen <= 5 / (HORIZON_S * 1000)


def test_a_new_replica_in_an_old_row_has_no_demand():
    arrivals = table()
    arrivals.sent(1, 50.0, 1.0)
    arrivals.reset(1)
    assert arrivals.lately(slice(0, 2), 1.0)[0][1] == 0.0


def test_the_price_of_blocking_is_the_delay_of_those_who_come_meanwhile():
    """Against a first-come-first-served queue: arrivals at a fixed rate, with and without the prefill in it."""
    rate_per_ms, queue_ms, prefill_ms = 0.01, 400.0, 150.0
    steps = np.arange(0.0, queue_ms + prefill_ms, 0.01)
    delay = np.minimum(prefill_ms, queue_ms + prefill_ms - steps)  # of one who comes then
    expected = rate_per_ms * delay.sum() * 0.01
    priced = blocking_ms(np.array([prefill_ms]), np.array([queue_ms]), np.array([rate_per_ms]), np.zeros(1), 0.0)
    assert priced[0] == pytest.approx(expected, rel=1e-3)


def test_running_answers_count_for_their_share():
    priced = blocking_ms(np.array([200.0]), np.zeros(1), np.zeros(1), np.array([5.0]), 0.0)
    assert priced[0] == pytest.approx(200.0 * 5 * DECODING_SHARE)


@pytest.mark.parametrize(("utilisation", "expected_ms"), [(0.0, 0.0), (0.5, 50.0), (5.0, 810.0)])
def test_work_is_dearer_the_fuller_the_fleet_is(utilisation: float, expected_ms: float) -> None:
    priced = blocking_ms(np.array([100.0]), np.zeros(1), np.zeros(1), np.zeros(1), utilisation)
    assert priced[0] == pytest.approx(expected_ms)
    assert MOST_UTILISATION < 1.0


@pytest.mark.parametrize(("continued", "turns"), [(0.25, 4 / 3), (0.5, MOST_TURNS), (0.9, MOST_TURNS)])
def test_the_next_turns_pay_the_round_trip_of_where_this_one_went(continued: float, turns: float):
    priced = next_turn_ms(np.array([37.0, 279.0, 456.0]), np.full(3, 5000.0), continued)
    assert priced.tolist() == pytest.approx([0.0, continued * turns * 242.0, continued * turns * 419.0])


def test_the_next_turns_pay_no_more_than_going_elsewhere():
    """The nearest has all but 100 ms of the prompt: wherever this turn goes, the next one may go there."""
    priced = next_turn_ms(np.array([37.0, 279.0, 456.0]), np.array([100.0, 900.0, 900.0]), 1.0)
    assert priced.tolist() == pytest.approx([0.0, 100.0, 100.0])


def test_without_conversations_no_turn_follows():
    arrivals = table()
    for _ in range(100):
        arrivals.sent(0, 50.0, 1.0, continues=False)
    assert not next_turn_ms(np.array([37.0, 279.0]), np.full(2, 900.0), arrivals.continued).any()


def test_the_share_of_conversations_is_followed():
    arrivals = table()
    for number in range(2000):
        arrivals.sent(0, 50.0, 1.0, continues=number % 4 != 0)
    assert arrivals.continued == pytest.approx(0.75, abs=0.02)
